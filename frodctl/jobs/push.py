"""What a job wrote, pushed to the Hub when it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from frodctl import values
from frodctl.checkpoint.inputs import Json
from frodctl.errors import FrodctlError, UsageError
from frodctl.jobs.options import HubOptions
from frodctl.jobs.profile import Profiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.values import option, optional

if TYPE_CHECKING:
    from frodctl.checkpoint.hub_push import Destination


@dataclass(frozen=True)
class PushOptions(HubOptions):
    """Of every job that writes an output."""

    push_to_hub: str | None = option(None, optional(values.repository))  #: where the output goes, beside its place here
    private: bool = option(False, values.flag)  #: of a repository that is made for it
    force: bool = option(False, values.flag)  #: replace an existing output, here and there

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private and self.push_to_hub is None:
            raise UsageError("`private` is of a repository that is made; it goes with `push_to_hub`")

    def destination(self) -> Destination | None:
        """The repository, if there is to be one."""
        if self.push_to_hub is None:
            return None
        from frodctl.checkpoint.hub_push import Destination

        return Destination(replace(self.location_of_other(self.push_to_hub), remote=True), self.private, self.force)

    def check_destination(self, file: Path | None = None) -> None:
        """Refuse before the work what could not be pushed after it; ``file`` may have others beside it there.

        Errors are those of `Destination.check`.
        """
        destination = self.destination()
        if destination is not None:
            destination.check((file.name,) if file is not None else ())


@dataclass(frozen=True)
class Pushed:
    """Where a result is on the Hub."""

    repo: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class Written(Profiled):
    """A job's result: what it wrote here, which may be on the Hub too."""

    pushed: Pushed | None = None  #: None where that was not asked for

    def pushed_dict(self) -> dict[str, Json]:
        """What JSON has of it: nothing where there is none."""
        return {} if self.pushed is None else {"pushed": asdict(self.pushed)}


W = TypeVar("W", bound=Written)


def push_folder(result: W, folder: Path, options: PushOptions, progress: Callback) -> W:
    """The result, with its folder on the Hub if that is asked for."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return _push(result, options, files, progress, f"hf upload {options.push_to_hub} {folder}", beside=False)


def push_file(result: W, file: Path, options: PushOptions, card: str, progress: Callback) -> W:
    """The result, with its file on the Hub if that is asked for: beside others, with a card where there is none."""
    files: dict[str, Path | bytes] = {file.name: file, "README.md": card.encode(errors="replace")}
    return _push(result, options, files, progress, f"hf upload {options.push_to_hub} {file} {file.name}", beside=True)


def _push(
    result: W, options: PushOptions, files: Mapping[str, Path | bytes], progress: Callback, again: str, *, beside: bool
) -> W:
    """``again`` is the command that sends it when this was in vain."""
    destination = options.destination()
    if destination is None:
        return result

    def sent(path: str, done: int, total: int) -> None:
        progress(Progress(f"sending {path} to {destination.repo}", done, total))

    try:
        commit = destination.push(files, sent, beside=beside)
    except FrodctlError as error:
        raise type(error)(f"{error}; what was made is here and whole: {again}") from error
    return replace(result, pushed=Pushed(destination.repo, commit))
