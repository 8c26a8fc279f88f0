"""Checkpoints on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from frodctl.checkpoint import codec, manifest
from frodctl.checkpoint.companions import MODULES_FILE, companions, module_folders
from frodctl.checkpoint.hub_errors import clear_errors, is_offline, repo_and_revision
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
from frodctl.checkpoint.remote import Repository
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.pipeline import in_order

_TIMEOUT_SECONDS = 15
_CONNECTIONS = 8
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
#: What tells what a model is, beside its weights.
_CONFIGS = ("config.json", "generation_config.json")
#: What is fetched with the weights: those, and the weights' digests.
_WITH_WEIGHTS = (*_CONFIGS, manifest.FILE)


def download(
    location: Location,
    progress: Callable[[str], None] | None = None,
    *,
    everything: bool = False,
    partial_offline: bool = False,
) -> tuple[str, str | None, Path]:
    """Fetch weights, index and config into the Hub's cache, or find them there.

    With ``everything`` also the rest of what the model needs (see `frodctl.checkpoint.companions`). With
    ``partial_offline`` some of the shards may be missing where the Hub must not be asked.

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
        _require_cached(folder, repo, location.file, partial_offline)
    return repo, commit, folder


def download_adapter(location: Location, progress: Callable[[str], None] | None = None) -> Path:
    """Fetch the config and the weights of all the adapters in a repository; the cached folder that holds them."""

    def wanted(commit: str, files: list[str]) -> list[str]:
        return [file for file in files if PurePosixPath(file).name in ADAPTER_FILES]

    return _snapshot(location, f"*{ADAPTER_FILES[0]}", wanted, progress)[2]


def fetch_file(location: Location) -> Path:
    """Where the cache has the file that a URL names, which is downloaded if it has not."""
    with clear_errors(location, location.file):
        return Path(
            hf_hub_download(
                location.model,
                _prefixed(location, location.file),
                revision=location.revision,
                token=location.token,
                cache_dir=location.cache_dir,
                local_files_only=is_offline(location),
            )
        )


def file_metadata(location: Location) -> Mapping[str, str]:
    """The metadata in the safetensors file that a URL names; only its header is fetched."""
    if is_offline(location):
        return codec.read_header(fetch_file(location)).metadata
    repo, revision = repo_and_revision(location)
    with clear_errors(location, location.file):
        commit, files = _files(location, repo, revision)
        return Repository(location, commit).metadata(_entry(location, files, repo))


def list_files(location: Location) -> list[str]:
    """The paths below the folder (of the repository) that is asked for; offline those in the cache."""
    repo, revision = repo_and_revision(location)
    with clear_errors(location):
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
    repo, revision = repo_and_revision(location)
    fetch = partial(snapshot_download, repo, token=location.token, cache_dir=location.cache_dir)
    with clear_errors(location):
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


def _require_cached(folder: Path, repo: str, file: str, partially: bool) -> None:
    files = [path.name for path in folder.iterdir() if path.exists()] if folder.is_dir() else []
    entry = next((name for name in ([file] if file else WEIGHT_FILES) if name in files), None)
    shards = shards_of(read_json(folder / entry), str(folder / entry)) if entry and "index" in entry else {}
    needed = set(shards.values())
    single = entry or (not file and any(name.endswith(".safetensors") for name in files))
    if not single or (needed.isdisjoint(files) if partially and needed else not needed <= set(files)):
        raise FrodctlError(
            f"{repo}: not in the local cache as a whole, only what was needed is; run without `offline`, "
            "or fetch all of it with the Hub's own tool first (hf download)"
        )


def open_remote(location: Location, *, later: bool = False) -> Checkpoint | None:
    """The checkpoint's headers, by range requests where its files are not in the cache; None of a pickled one.

    With ``later`` the weights can be had from its `Checkpoint.repository`; and the cache gets the small files, and
    learns what the revision stands for.
    """
    repo, revision = repo_and_revision(location)
    with clear_errors(location):
        commit, files = _files(location, repo, revision)
        repository = Repository(replace(location, model=repo), commit)
        entry = _entry(location, files, repo)
        files = [file for file in files if "/" not in file]
        if ".safetensors" not in entry:
            return None
        if later:
            small = [_prefixed(location, name) for name in {*_WITH_WEIGHTS, entry} if name.endswith(".json")]
            fetch = partial(snapshot_download, repo, token=location.token, cache_dir=location.cache_dir)
            fetch(revision=revision, allow_patterns=small)
        config = read_json(repository.fetch("config.json")) if "config.json" in files else {}
        shards: dict[str, str] = {}
        if entry.endswith(".index.json"):
            shards = shards_of(read_json(repository.fetch(entry)), repository.name(entry))
        wanted = sorted(set(shards.values()) or {entry})
        if missing := sorted(set(wanted) - set(files)):
            raise InvalidInput(f"{repository.name(missing[0])}: named by the index but missing")
        own = repository.fetch(manifest.FILE).parent if later and manifest.FILE in files else None
        tensors = _remote_tensors(repository, shards, wanted, manifest.digests(own) if own else {})
    check_complete(shards, tensors, repo)
    return Checkpoint(repo, commit, None, config, tensors, repository=repository if later else None)


def remote_adapter(
    location: Location, choose: Callable[[list[str]], str]
) -> tuple[dict[str, object], list[TensorInfo]]:
    """The config and the headers of one of a repository's adapters, without its weights.

    ``choose`` is given the paths of all adapters' configs and returns one of them.
    """
    repo, revision = repo_and_revision(location)
    with clear_errors(location):
        commit, files = _files(location, repo, revision)
        path = choose([file for file in files if PurePosixPath(file).name == ADAPTER_FILES[0]])
        weights = str(PurePosixPath(path).parent / ADAPTER_FILES[1])
        if weights not in files:
            raise FrodctlError(f"{repo}/{weights}: not there, so its headers cannot be read remotely")
        repository = Repository(replace(location, model=repo), commit)
        return read_json(repository.fetch(path)), repository.header(weights)


def _remote_tensors(
    repository: Repository,
    shards: Mapping[str, str],
    files: Collection[str],
    digests: Mapping[str, Mapping[str, str]],
) -> dict[str, TensorInfo]:
    """The tensors of the files that an index names, ``shards``, or of one file where there is none."""

    def header(file: str) -> list[TensorInfo]:
        infos = manifest.with_digests(repository.header(file), digests.get(file, {}), repository.name(file))
        check_is_checkpoint(repository.name(file), [info.name for info in infos])
        return [info for info in infos if shards.get(info.name, file) == file]

    found = in_order([partial(header, file) for file in files], ahead=_CONNECTIONS, count=_CONNECTIONS)
    return {info.name: info for infos in found for info in infos}


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
    repo = repo_and_revision(location)[0]
    repository = Repository(replace(location, model=repo), commit)
    direct = [file for file in files if "/" not in file]
    entry = _entry(location, files, repo)
    wanted = {entry, *(name for name in direct if name in _WITH_WEIGHTS)}
    if entry.endswith(".index.json"):
        wanted.update(shards_of(read_json(repository.fetch(entry)), f"{repo}/{entry}").values())
    if everything:
        listed = repository.fetch(MODULES_FILE) if MODULES_FILE in files else None
        wanted.update(companions(files, module_folders(listed) if listed else ()))
        wanted.update({"README.md"} & set(files))
    return sorted(wanted)


def _entry(location: Location, files: list[str], repo: str) -> str:
    """The weights' entry point among a folder's files: the one that a URL names, or the usual one."""
    if not location.file:
        return choose_weights([file for file in files if "/" not in file], repo, files)
    if location.file not in files:
        raise FrodctlError(f"{repo}: no {_prefixed(location, location.file)} there")
    return location.file


def _prefixed(location: Location, name: str) -> str:
    return str(PurePosixPath(location.subfolder, name))
