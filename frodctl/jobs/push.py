"""What a job wrote, pushed to the Hub when it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from frodctl import values
from frodctl.checkpoint import sink
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
    resume: bool = option(True, values.flag)  #: take up what a killed run of the same job had finished

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private and self.push_to_hub is None:
            raise UsageError("`private` is of a repository that is made; it goes with `push_to_hub`")

    @property
    def pushes(self) -> bool:
        """Whether the output goes to the Hub too."""
        return self.push_to_hub is not None

    def may_replace(self, output: Path, key: str | None = None) -> bool:
        """Whether an output that exists may be made again: where that is asked for, or it was made and not pushed.

        With ``key`` by this very job, else by any.
        """
        return self.force or (self.pushes and self.resume and sink.is_unsent(output, key))

    def destination(self) -> Destination | None:
        """The repository, if there is to be one."""
        if self.push_to_hub is None:
            return None
        from frodctl.checkpoint.hub_push import Destination

        return Destination(replace(self.location_of_other(self.push_to_hub), remote=True), self.private, self.force)

    def check_destination(self, output: Path, *, beside: bool = False) -> None:
        """Refuse before the work what could not be pushed after it: ``output``, alone or ``beside`` others there.

        Errors are those of `Destination.check`.
        """
        destination = self.destination()
        if destination is not None:
            destination.check((output.name,) if beside else (), again=self.may_replace(output))


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


def push_folder(result: W, staging: sink.Staging, options: PushOptions, progress: Callback) -> W:
    """The result, with the folder that was published on the Hub if that is asked for."""
    folder = staging.output
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return _push(result, staging, options, files, progress, str(folder), beside=False)


def push_file(result: W, staging: sink.Staging, options: PushOptions, card: str, progress: Callback) -> W:
    """The result, with the file that was published on the Hub if that is asked for: beside others, with a card."""
    file = staging.output
    files: dict[str, Path | bytes] = {file.name: file, "README.md": card.encode(errors="replace")}
    return _push(result, staging, options, files, progress, f"{file} {file.name}", beside=True)


def _push(
    result: W,
    staging: sink.Staging,
    options: PushOptions,
    files: Mapping[str, Path | bytes],
    progress: Callback,
    names: str,
    *,
    beside: bool,
) -> W:
    """``names`` are what `hf upload` is given, which sends it too when this was in vain."""
    destination = options.destination()
    if destination is None:
        return result

    def sent(path: str, done: int, total: int) -> None:
        progress(Progress(f"sending {path} to {destination.repo}", done, total))

    try:
        commit = destination.push(files, sent, beside=beside)
    except FrodctlError as error:
        raise type(error)(
            f"{error}; what was made is here and whole, and the same command sends it later, or "
            f"hf upload {destination.repo} {names}"
        ) from error
    staging.clear()
    return replace(result, pushed=Pushed(destination.repo, commit))
