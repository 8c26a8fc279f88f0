"""Checkpoints on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from frodctl.checkpoint import codec
from frodctl.checkpoint.companions import MODULES_FILE, companions, module_folders
from frodctl.checkpoint.inputs import read_json
from frodctl.checkpoint.records import (
    ADAPTER_FILES,
    WEIGHT_FILES,
    Checkpoint,
    Location,
    TensorInfo,
    check_complete,
    check_is_checkpoint,
    choose_weights,
    shards_of,
)
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.pipeline import in_order

_TIMEOUT_SECONDS = 15
_CONNECTIONS = 8
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_FILE_IN_URL = re.compile(r"/resolve/[^/]+/([^?]+)")


def is_offline(location: Location) -> bool:
    """Whether the Hub must not be asked: by the request or by HF_HUB_OFFLINE."""
    return location.offline or constants.HF_HUB_OFFLINE


def download(
    location: Location, progress: Callable[[str], None] | None = None, *, everything: bool = False
) -> tuple[str, str | None, Path]:
    """Fetch weights, index and config into the Hub's cache, or find them there.

    With ``everything`` also the rest of what the model needs (see `frodctl.checkpoint.companions`).

    Returns
    -------
    model : str
        The repository's id.
    revision : str or None
        The commit.
    folder : Path
        The cached folder that holds the files.
    """
    repo, commit, folder = _snapshot(
        location, "config.json", lambda commit, files: _needed(location, commit, files, everything), progress
    )
    if is_offline(location):
        _require_cached(folder, repo)
    return repo, commit, folder


def download_adapter(location: Location, progress: Callable[[str], None] | None = None) -> Path:
    """Fetch the config and the weights of all the adapters in a repository; the cached folder that holds them."""

    def wanted(commit: str, files: list[str]) -> list[str]:
        return [file for file in files if PurePosixPath(file).name in ADAPTER_FILES]

    return _snapshot(location, f"*{ADAPTER_FILES[0]}", wanted, progress)[2]


def list_files(location: Location) -> list[str]:
    """The paths below the folder (of the repository) that is asked for; offline those in the cache."""
    repo, revision = _repo_and_revision(location)
    with _clear_errors(location):
        if not is_offline(location):
            return _files(location, repo, revision)[1]
        cached = snapshot_download(
            repo, revision=revision, token=location.token, cache_dir=location.cache_dir, local_files_only=True,
            allow_patterns=[_prefixed(location, "*config.json")],
        )  # fmt: skip
    folder = Path(cached) / location.subfolder
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _snapshot(
    location: Location,
    least: str,
    wanted: Callable[[str, list[str]], list[str]],
    progress: Callable[[str], None] | None,
) -> tuple[str, str | None, Path]:
    """The repository's id, the commit, and the cached folder with the files that `wanted` chooses.

    Offline only ``least`` is asked for: the client refuses a snapshot that lacks anything, and what else is needed
    the caller sees for itself.
    """
    repo, revision = _repo_and_revision(location)
    fetch = partial(snapshot_download, repo, token=location.token, cache_dir=location.cache_dir)
    with _clear_errors(location):
        if is_offline(location):
            only = [_prefixed(location, least)]
            folder = fetch(revision=revision, local_files_only=True, allow_patterns=only)
        else:
            commit, files = _files(location, repo, revision)
            names = wanted(commit, files)
            if progress is not None:
                progress(f"fetching {len(names)} files of {repo} at {commit[:12]} (cached ones are not fetched again)")
            folder = fetch(
                # by name, so that the cache learns what the name stands for and --offline can use it
                revision=revision,
                allow_patterns=[_prefixed(location, name) for name in names],
            )
    root = Path(folder)
    return repo, root.name, root / location.subfolder


def _require_cached(folder: Path, repo: str) -> None:
    files = [path.name for path in folder.iterdir() if path.exists()] if folder.is_dir() else []
    entry = next((name for name in WEIGHT_FILES if name in files), None)
    needed = shards_of(read_json(folder / entry), str(folder / entry)).values() if entry and "index" in entry else ()
    single = entry or any(name.endswith(".safetensors") for name in files)
    if not single or not set(needed) <= set(files):
        raise FrodctlError(f"{repo}: not in the local cache as a whole; run once without `offline`")


def remote_headers(location: Location) -> Checkpoint:
    """The checkpoint's headers by range requests, without its weights."""
    repo, revision = _repo_and_revision(location)
    with _clear_errors(location):
        commit, files = _files(location, repo, revision)
        config: dict[str, object] = {}
        files = [file for file in files if "/" not in file]
        if "config.json" in files:
            config = read_json(_fetch(location, repo, commit, "config.json"))
        entry = choose_weights(files, repo)
        if ".safetensors" not in entry:
            raise FrodctlError(
                f"{repo}: its weights ({entry}) are pickled, and their headers cannot be read remotely; "
                "download the checkpoint first"
            )
        shards = {}
        if entry.endswith(".index.json"):
            shards = shards_of(read_json(_fetch(location, repo, commit, entry)), f"{repo}/{entry}")
        tensors = _remote_tensors(location, repo, commit, sorted(set(shards.values())) or [entry])
    check_is_checkpoint(f"{repo}/{entry}", tensors)
    check_complete(shards, tensors, repo)
    return Checkpoint(repo, commit, None, config, tensors)


def remote_adapter(
    location: Location, choose: Callable[[list[str]], str]
) -> tuple[dict[str, object], list[TensorInfo]]:
    """The config and the headers of one of a repository's adapters, without its weights.

    ``choose`` is given the paths of all adapters' configs and returns one of them.
    """
    repo, revision = _repo_and_revision(location)
    with _clear_errors(location):
        commit, files = _files(location, repo, revision)
        path = choose([file for file in files if PurePosixPath(file).name == ADAPTER_FILES[0]])
        weights = str(PurePosixPath(path).parent / ADAPTER_FILES[1])
        if weights not in files:
            raise FrodctlError(f"{repo}/{weights}: not there, so its headers cannot be read remotely")
        config = read_json(_fetch(location, repo, commit, path))
        return config, list(_remote_tensors(location, repo, commit, [weights]).values())


def _remote_tensors(location: Location, repo: str, commit: str, files: list[str]) -> dict[str, TensorInfo]:
    api = HfApi(token=location.token)

    def headers(file: str) -> list[TensorInfo]:
        try:
            found = api.parse_safetensors_file_metadata(repo, _prefixed(location, file), revision=commit)
        except HfHubHTTPError:
            raise
        except SafetensorsParsingError as error:
            raise InvalidInput(f"{repo}/{file}: {str(error).splitlines()[0]}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of what the client did not expect
            raise InvalidInput(f"{repo}/{file}: not a safetensors header ({type(error).__name__})") from None
        entries = {name: vars(tensor) for name, tensor in found.tensors.items()}
        tensors = codec.check_remote(entries, f"{repo}/{file}")
        return [TensorInfo(s.name, s.dtype, s.shape, file, at) for s, at in tensors.values()]

    found = in_order([partial(headers, file) for file in files], ahead=_CONNECTIONS, count=_CONNECTIONS)
    return {info.name: info for infos in found for info in infos}


def _repo_and_revision(location: Location) -> tuple[str, str | None]:
    repo, _, revision = location.model.partition("@")
    return repo, location.revision or revision or None


def _files(location: Location, repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit, and the paths below the folder (of the repository) that is asked for."""
    info = HfApi(token=location.token).model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
    folder = PurePosixPath(location.subfolder)
    paths = [PurePosixPath(sibling.rfilename) for sibling in info.siblings or ()]
    if not _COMMIT.fullmatch(info.sha or "") or any(path.is_absolute() or ".." in path.parts for path in paths):
        raise FrodctlError(f"{repo}: the Hub names no commit, or files outside the repository")
    return str(info.sha), [str(path.relative_to(folder)) for path in paths if path.is_relative_to(folder)]


def _needed(location: Location, commit: str, files: list[str], everything: bool) -> list[str]:
    """The files of a checkpoint that are worth fetching."""
    repo = _repo_and_revision(location)[0]
    direct = [file for file in files if "/" not in file]
    entry = choose_weights(direct, repo)
    wanted = {entry, *(name for name in direct if name in ("config.json", "generation_config.json"))}
    if entry.endswith(".index.json"):
        wanted.update(shards_of(read_json(_fetch(location, repo, commit, entry)), f"{repo}/{entry}").values())
    if everything:
        listed = _fetch(location, repo, commit, MODULES_FILE) if MODULES_FILE in files else None
        wanted.update(companions(files, module_folders(listed) if listed else ()))
        wanted.update({"README.md"} & set(files))
    return sorted(wanted)


def _fetch(location: Location, repo: str, commit: str, name: str) -> Path:
    return Path(
        hf_hub_download(
            repo,
            _prefixed(location, name),
            revision=commit,
            token=location.token,
            cache_dir=location.cache_dir,
        )
    )


def _prefixed(location: Location, name: str) -> str:
    return str(PurePosixPath(location.subfolder, name))


@contextmanager
def _clear_errors(location: Location) -> Iterator[None]:
    """Turn the client's exceptions into one line that says what to do; none shows the client's own text."""
    try:
        yield
    except FrodctlError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(location, cause) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FrodctlError(_failure(location, error)) from error


def _refusal(location: Location, error: HfHubHTTPError) -> FrodctlError:
    """What to say of an answer that is an error's."""
    repo, revision = _repo_and_revision(location)
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
        file = _FILE_IN_URL.search(str(error.response.url))
        hint = "; the token is not valid" if status == 401 else ""
        text = f"the Hub refused {unquote(file[1]) if file else 'the request'} ({status}{hint})"
    return FrodctlError(f"{repo}: {text}")


def _failure(location: Location, error: Exception) -> str:
    """What to say where there was no answer, or none that can be used."""
    repo = _repo_and_revision(location)[0]
    if isinstance(error, HFValidationError):
        return f"{repo}: no such file or folder, and not a Hub id (name or org/name)"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        why = "off limits (`offline` or HF_HUB_OFFLINE)" if is_offline(location) else "out of reach"
        return f"{repo}: no such local file or folder, not in the local cache, and the Hub is {why}"
    if _is_connection_error(error):
        why = f"the Hub is out of reach ({type(error).__name__}); try `offline=True`"
        return f"{repo}: no such local file or folder, and {why}"
    # an answer that is not the JSON expected, or a body that is not as long as announced
    size = str(error).startswith("Consistency check failed")
    what = str(error).splitlines()[0] if size else f"the Hub's answer is not what it should be ({type(error).__name__})"
    return f"{repo}: {what.rstrip('.')}; try again"


def _is_connection_error(error: Exception) -> bool:
    """Whether it comes from the client's HTTP library, whose name changed between its versions."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
