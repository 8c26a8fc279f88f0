"""A repository's weights, brought from the Hub while others are used: whole files into its cache, or ranges of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are in its __all__ alone
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from frodctl.checkpoint import codec
from frodctl.checkpoint.bounds import MAX_JSON_BYTES
from frodctl.checkpoint.hub_errors import clear_errors, is_connection_error
from frodctl.checkpoint.inputs import Json, decode_json
from frodctl.checkpoint.records import Location, TensorInfo
from frodctl.checkpoint.source import Folder, check, checked
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.pipeline import Workers, pause

if TYPE_CHECKING:
    from typing import Self

#: Seconds before each further try of a range of which nothing came.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
_HEADER_BYTES = 100_000  #: asked for at first: few headers are longer
_DOWNLOADS = 2  #: at once


@dataclass(frozen=True)
class Repository:
    """A folder of a repository at one commit; as a `Source` it is read by ranges, where the cache has not the file."""

    location: Location  #: whose model is the repository's id
    commit: str

    def fetch(self, file: str) -> Path:
        """Where the cache has the file, which is downloaded if it has not."""
        with clear_errors(self.location, file):
            return Path(
                hf_hub_download(
                    self.location.model,
                    self._path(file),
                    revision=self.commit,
                    token=self.location.token,
                    cache_dir=self.location.cache_dir,
                    tqdm_class=_Unseen,
                )
            )

    def cached(self, file: str) -> Path | None:
        """Where the cache has the file."""
        found = try_to_load_from_cache(
            self.location.model, self._path(file), cache_dir=self.location.cache_dir, revision=self.commit
        )
        return Path(found) if isinstance(found, str) else None

    def header(self, file: str) -> list[TensorInfo]:
        """The tensors of a safetensors file, which is not downloaded for it."""
        path = self.cached(file)
        if path is not None:
            return _infos(file, codec.read_header(path).tensors, 0)
        entries, end = self._entries(file)
        entries.pop("__metadata__", None)
        return _infos(file, codec.check_remote(entries, self.name(file)), end)

    def metadata(self, file: str) -> Mapping[str, str]:
        """The metadata of a safetensors file, which is not downloaded for it."""
        path = self.cached(file)
        if path is not None:
            return codec.read_header(path).metadata
        found = self._entries(file)[0].get("__metadata__")
        return found if isinstance(found, dict) else {}

    def _entries(self, file: str) -> tuple[dict[str, Json], int]:
        """The JSON object that a safetensors file begins with, and where it ends."""
        where = self.name(file)
        raw = self._beginning(file, _HEADER_BYTES)
        end = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < end <= MAX_JSON_BYTES:
            raw = self._beginning(file, end)
        try:
            entries = decode_json(raw[8:end], strict=True)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where}: not a safetensors header ({type(error).__name__})") from None
        if not isinstance(entries, dict):
            raise InvalidInput(f"{where}: not a safetensors header (it is no JSON object)")
        return entries, end

    def wait(self, info: TensorInfo) -> None:
        """Nothing: a range can be had at any time."""

    def read(self, info: TensorInfo, view: memoryview) -> None:
        path = self.cached(info.file)
        if path is not None:
            Folder(path.parent).read(info, view)
        else:
            self._read(info.file, info.offset, view)
            check(info, view, self.where(info))

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        path = self.cached(info.file)
        if path is not None:
            return Folder(path.parent).chunks(info)
        return checked(info, self._ranges(info), self.where(info))

    def _ranges(self, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes in pieces, of one request each."""
        buffer = memoryview(bytearray(min(info.nbytes, codec.CHUNK_BYTES)))
        for start in range(0, info.nbytes, codec.CHUNK_BYTES):
            piece = buffer[: min(codec.CHUNK_BYTES, info.nbytes - start)]
            self._read(info.file, info.offset + start, piece)
            yield piece

    def where(self, info: TensorInfo) -> str:
        return self.name(info.file)

    def name(self, file: str) -> str:
        """The file, as messages name it."""
        return f"{self.location.model}/{file}"

    def _path(self, file: str) -> str:
        return str(PurePosixPath(self.location.subfolder, file))

    def _beginning(self, file: str, count: int) -> bytes:
        """The first bytes of a file, fewer where it is shorter."""
        buffer = bytearray(count)
        return bytes(buffer[: self._fill(file, 0, memoryview(buffer))])

    def _read(self, file: str, offset: int, view: memoryview) -> None:
        if self._fill(file, offset, view) < len(view):
            raise InvalidInput(f"{self.name(file)}: ends before a tensor that its header announces")

    def _fill(self, file: str, offset: int, view: memoryview) -> int:
        """Fill the view from a place in the file, the connection taken up again where it was cut.

        Returns
        -------
        int
            How many bytes there are, fewer than asked for where the file ends.
        """
        done = failures = 0
        with clear_errors(self.location, file):
            while done < len(view):
                try:
                    for piece in self._pieces(file, offset + done, offset + len(view)):
                        pause()
                        view[done : done + len(piece)] = piece
                        done, failures = done + len(piece), 0
                    return done
                except Exception as error:
                    if not _may_pass(error) or failures == len(WAITS):
                        raise
                    pause(WAITS[failures])
                    failures += 1
        return done

    def _pieces(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """What the Hub, or the store it sends us to, answers to one request for a range.

        The client gives the token to the Hub alone, not to another host.
        """
        url = hf_hub_url(self.location.model, self._path(file), revision=self.commit)
        headers = build_hf_headers(token=self.location.token)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, **_NO_RETRIES) as answer:
            if answer.status_code == 416:  # the file ends there
                return
            hf_raise_for_status(answer)
            if answer.status_code != 206 and start > 0:
                raise FrodctlError(f"{self.name(file)}: the Hub sends no ranges of it; run without `stream`")
            left = stop - start
            for piece in answer.iter_bytes():
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return


def _infos(file: str, tensors: Mapping[str, tuple[codec.TensorSpec, int]], start: int) -> list[TensorInfo]:
    return [TensorInfo(spec.name, spec.dtype, spec.shape, file, start + at) for spec, at in tensors.values()]


#: Of errors: those that pass are tried again here, where it is known what has come.
_NO_RETRIES: dict[str, Any] = {"retry_on_exceptions": (), "retry_on_status_codes": 429}


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 408 or error.response.status_code >= 500
    return is_connection_error(error)


class _Unseen(tqdm):
    """What the client reports a download's progress to: shows nothing, and ends it when nobody waits for it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]

    def update(self, n: float | None = 1) -> None:
        pause()


class Downloads:
    """A `Source` of files that are being downloaded, in their order, two at once; a context manager.

    Parameters
    ----------
    repository : Repository
    tensors : collection of TensorInfo
        Those that will be read, in the order in which they are needed.
    progress : callable
        Called with a line of text before what is waited for.

    Raises
    ------
    FrodctlError
        By `wait`, where a file could not be fetched.
    InvalidInput
        By `wait`, where a file is not what its header said.
    """

    def __init__(
        self, repository: Repository, tensors: Collection[TensorInfo], progress: Callable[[str], None]
    ) -> None:
        self._repository = repository
        self._progress = progress
        self._tensors = list(dict.fromkeys(tensors))
        self._files = deque(dict.fromkeys(info.file for info in tensors))
        self._here: dict[str, Path] = {}
        self._workers = Workers[Path](_DOWNLOADS)

    def __enter__(self) -> Self:
        for file in self._files:
            self._workers.add(partial(self._repository.fetch, file))
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def wait(self, info: TensorInfo) -> None:
        while info.file not in self._here:
            file = self._files.popleft()
            self._progress(f"fetching {file}")
            path = self._workers.take()
            self._check(path)
            self._here[file] = path

    def read(self, info: TensorInfo, view: memoryview) -> None:
        self._folder(info).read(info, view)

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        return self._folder(info).chunks(info)

    def where(self, info: TensorInfo) -> str:
        return str(self._here[info.file])

    def _folder(self, info: TensorInfo) -> Folder:
        return Folder(self._here[info.file].parent)

    def _check(self, path: Path) -> None:
        """`InvalidInput` where the file is damaged, or its tensors are not where its header said."""
        tensors = codec.read_header(path).tensors
        for info in self._tensors:
            if info.file == path.name:
                spec = codec.TensorSpec(info.name, info.dtype, info.shape)
                if tensors.get(info.name) != (spec, info.offset):
                    raise InvalidInput(f"{path}: tensor {info.name} is not as the Hub described it; download it again")
