"""What was made here to the Hub: looked at before the work, sent after it, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are in its __all__ alone
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from huggingface_hub.utils.sha import git_hash

from frodctl.checkpoint.hub_errors import is_connection_error, is_offline
from frodctl.checkpoint.manifest import WEIGHTS
from frodctl.checkpoint.records import Location
from frodctl.errors import FrodctlError, UsageError

_CARD = "README.md"
_MADE_BY_THE_HUB = {".gitattributes"}  # in a repository that is new
_REFUSALS = {
    401: "the token is not valid",
    402: "its account has no room for it",
    403: "the token may not write there",
    409: "it changed in the meantime",
    412: "it changed in the meantime",
}


@dataclass(frozen=True)
class Destination:
    """A repository on the Hub that is to be written to."""

    location: Location  #: whose model is the repository's id
    private: bool
    force: bool  #: replace what is there

    @property
    def repo(self) -> str:
        return self.location.model

    def check(self, files: Collection[str] = (), *, again: bool = False) -> None:
        """Refuse, before any work, what could not be pushed in the end; nothing is written.

        Parameters
        ----------
        files : collection of str
            The paths that will be written, where others may be beside them; none where the repository has to be new or
            empty.
        again : bool
            An earlier run may have sent them: `push` will see whether what is there is that.

        Raises
        ------
        UsageError
            Something is there and ``force`` is not given; a public repository is there, and ``private`` is asked for;
            the Hub is off limits.
        FrodctlError
            The token is not valid, or the Hub is out of reach.
        """
        if is_offline(self.location):
            raise UsageError(f"{self.repo}: the Hub is off limits (`offline` or HF_HUB_OFFLINE), so nothing is pushed")
        with _clear_errors(self.repo):
            self._api.whoami()
            found = self._info()
            if found is not None and not again:
                self._refuse_loss([path for path in _paths(found) if path in files or not files])

    def push(
        self, files: Mapping[str, Path | bytes], progress: Callable[[str, int, int], None], *, beside: bool
    ) -> str:
        """Send the files in one commit; its id, or that of the head where all of them are there.

        Weights that were there under other names are taken away. Whatever was sent before a cut is not sent again.

        Parameters
        ----------
        files : mapping
            What is sent, by its path in the repository.
        progress : callable
            Called with a file's path, and how many bytes of all have been sent, before each.
        beside : bool
            Leave all other files as they are, and a card that is there too.

        Raises
        ------
        UsageError, FrodctlError
            As by `check`; or the connection was cut for good.
        """
        with _clear_errors(self.repo), _no_bars():
            self._api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            found = self._info()
            there = _paths(found) if found is not None else []
            kept = {_CARD} & set(there) if beside else set()
            stale = [path for path in there if WEIGHTS.fullmatch(path) and path not in files and not beside]
            additions = [CommitOperationAdd(path, files[path]) for path in sorted(files.keys() - kept)]
            same = _same(found, additions)
            self._refuse_loss([path for path in there if path not in same | kept and (path in files or not beside)])
            if found is not None and len(same) == len(additions) and not stale:
                return str(found.sha)
            total, sent = sum(addition.upload_info.size for addition in additions), 0
            for addition in additions:
                progress(addition.path_in_repo, sent, total)
                self._api.preupload_lfs_files(self.repo, [addition], free_memory=False)
                sent += addition.upload_info.size
            done = self._api.create_commit(
                self.repo,
                [*additions, *map(CommitOperationDelete, stale)],
                commit_message="Upload by frodctl",
                parent_commit=found.sha if found is not None else None,
            )
        return str(done.oid)

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.location.token)

    def _info(self) -> ModelInfo | None:
        """What there is; None where there is no such repository. Errors are those of `check`."""
        try:
            info = self._api.model_info(self.repo, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        if self.private and info.private is False:
            raise UsageError(f"{self.repo}: is there already, and public; make it private on the Hub, or name another")
        return info

    def _refuse_loss(self, paths: Sequence[str]) -> None:
        if paths and not self.force:
            raise UsageError(
                f"{self.repo}: has {paths[0]} on the Hub already; `force=True` replaces it, or name another"
            )


def _paths(info: ModelInfo) -> list[str]:
    return [item.rfilename for item in info.siblings or () if item.rfilename not in _MADE_BY_THE_HUB]


def _same(info: ModelInfo | None, additions: Sequence[CommitOperationAdd]) -> set[str]:
    """The paths of those that the repository has as they are, by the digests that it tells."""
    items = {item.rfilename: item for item in (info.siblings if info is not None else None) or ()}
    return {addition.path_in_repo for addition in additions if _has(items.get(addition.path_in_repo), addition)}


def _has(item: RepoSibling | None, addition: CommitOperationAdd) -> bool:
    if item is None or item.size != addition.upload_info.size:
        return False
    if item.lfs is not None:
        return item.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return item.blob_id == git_hash(file.read())


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the client's own bars: progress is told to the caller."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _clear_errors(repo: str) -> Iterator[None]:
    """Turn the client's exceptions into one line that says what to do; none shows the client's own text."""
    try:
        yield
    except FrodctlError:
        raise
    except LocalTokenNotFoundError:
        raise FrodctlError(f"{repo}: writing to the Hub needs a token (`token`, HF_TOKEN or hf auth login)") from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of one upload among several
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            raise FrodctlError(f"{repo}: the Hub refused it ({status}: {_REFUSALS.get(status, 'try later')})") from None
        if isinstance(error, OSError) and error.errno is not None and not is_connection_error(error):
            raise
        found = cause if isinstance(cause, Exception) else error
        reason = "the connection was lost" if is_connection_error(found) else "the Hub's answer is unexpected"
        raise FrodctlError(f"{repo}: {reason} ({type(found).__name__})") from error
