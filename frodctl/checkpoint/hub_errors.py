"""What the Hub's client raises, said in one line that tells what to do; and what is known without asking the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from frodctl.checkpoint.records import Location
from frodctl.errors import FrodctlError

_FILE_IN_URL = re.compile(r"/resolve/[^/]+/([^?]+)")


def is_offline(location: Location) -> bool:
    """Whether the Hub must not be asked: by the request or by HF_HUB_OFFLINE."""
    return location.offline or constants.HF_HUB_OFFLINE


def repo_and_revision(location: Location) -> tuple[str, str | None]:
    """The repository's id, and the revision that is asked for."""
    repo, _, revision = location.model.partition("@")
    return repo, location.revision or revision or None


@contextmanager
def clear_errors(location: Location, file: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into one line that says what to do; none shows the client's own text.

    With ``file`` it is the one that is asked for.
    """
    try:
        yield
    except FrodctlError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(location, cause, file) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FrodctlError(_failure(location, error, file)) from error


def _refusal(location: Location, error: HfHubHTTPError, file: str | None) -> FrodctlError:
    """What to say of an answer that is an error's."""
    repo, revision = repo_and_revision(location)
    if isinstance(error, GatedRepoError):
        text = "access is gated; accept its terms on the Hub and give a token (`token` or HF_TOKEN)"
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            "no such local file or folder, and no such model on the Hub "
            "(if it is private, give a token: `token` or HF_TOKEN)"
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"no revision {revision!r} on the Hub"
    else:
        status = error.response.status_code
        in_url = _FILE_IN_URL.search(str(error.response.url))
        what = file or (unquote(in_url[1]) if in_url else "the request")
        hint = "; the token is not valid" if status == 401 else ""
        text = f"the Hub refused {what} ({status}{hint})"
    return FrodctlError(f"{repo}: {text}")


def _failure(location: Location, error: Exception, file: str | None) -> str:
    """What to say where there was no answer, or none that can be used."""
    repo = repo_and_revision(location)[0]
    if isinstance(error, HFValidationError):
        return f"{repo}: no such file or folder, and not a Hub id (name or org/name)"
    if file and (isinstance(error, LocalEntryNotFoundError) or is_connection_error(error)):
        return f"{repo}: {file} was not fetched, the Hub is out of reach ({type(error).__name__}); try again"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        why = "off limits (`offline` or HF_HUB_OFFLINE)" if is_offline(location) else "out of reach"
        return f"{repo}: no such local file or folder, not in the local cache, and the Hub is {why}"
    if is_connection_error(error):
        why = f"the Hub is out of reach ({type(error).__name__}); try `offline=True`"
        return f"{repo}: no such local file or folder, and {why}"
    # an answer that is not the JSON expected, or a body that is not as long as announced
    size = str(error).startswith("Consistency check failed")
    what = str(error).splitlines()[0] if size else f"the Hub's answer is not what it should be ({type(error).__name__})"
    return f"{repo}: {what.rstrip('.')}; try again"


def is_connection_error(error: Exception) -> bool:
    """Whether it comes from the client's HTTP library, whose name changed between its versions."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
