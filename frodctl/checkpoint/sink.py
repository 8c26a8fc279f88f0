"""Output that appears whole or not at all: staged beside its destination, flushed, renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

from frodctl.checkpoint.source import WEIGHT_FILES
from frodctl.errors import FrodctlError, OutOfResources, UsageError

try:
    import fcntl
except ImportError:  # not on Windows; two runs at once are not told apart there
    fcntl = None  # type: ignore[assignment]

#: Marks the model card of a merge.
MERGED_BY = "Merged by frodctl"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_output_file(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a destination that cannot or must not be written.

    Raises
    ------
    UsageError
        It exists and ``force`` is not given, it is a folder, or its parent is no folder.
    FrodctlError
        Its parent is not writable.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not an ordinary file; name another with -o")
    if path.exists() and not force:
        raise UsageError(f"{path}: exists; use --force to replace it, or name another file with -o")
    _check_parent(path)


def check_output_folder(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse, before any work, a destination folder that cannot or must not be written.

    Raises
    ------
    UsageError
        It is in the folder of an input or holds one; it exists and ``force`` is not given; it exists and holds
        more than a checkpoint, so that it can hardly be meant; or its parent is no folder.
    FrodctlError
        Its parent is not writable.
    """
    target = path.resolve()
    for given in inputs:
        source = given.resolve()
        if target == source or target.is_relative_to(source) or source.is_relative_to(target):
            raise UsageError(f"{path}: is, contains or lies in {given}, which is read; name a folder elsewhere")
    if path.exists() or path.is_symlink():
        if not force:
            raise UsageError(f"{path}: exists; use --force to replace it, or name another folder")
        if not path.is_dir() or path.is_symlink():
            raise UsageError(f"{path}: is not a folder; name another")
        if not _may_be_replaced(path):
            raise UsageError(
                f"{path}: holds more than a checkpoint, so --force does not replace it; name another folder"
            )
    _check_parent(path)


def _may_be_replaced(folder: Path) -> bool:
    """Whether a folder is empty, an earlier merge, or a checkpoint and nothing else that somebody could miss."""
    entries = list(folder.iterdir())
    names = {entry.name for entry in entries}
    card = folder / "README.md"
    if not entries or (card.is_file() and MERGED_BY in card.read_text(encoding="utf-8", errors="replace")):
        return True
    others = [e for e in entries if e.is_dir() or e.is_symlink() or e.name.startswith((".", "adapter_"))]
    weights = any(name in WEIGHT_FILES for name in names)
    bases = any(name.endswith(".frod.safetensors") for name in names)
    return weights and "config.json" in names and not others and not bases


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise FrodctlError(f"{path.parent}: not writable; name an output elsewhere")


def require_disk(folder: Path, nbytes: int) -> None:
    """Raise `OutOfResources` if the disk under ``folder`` has less than ``nbytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutOfResources(
            f"{folder}: {nbytes / 1e6:.1f} MB needed on disk (output and staging), {free / 1e6:.1f} MB free"
        )


class Staging:
    """``OUTPUT.partial/KEY/``: the finished pieces of the job KEY, until OUTPUT is whole.

    A run that was killed leaves its pieces here, and the same job takes them up. Another job's pieces are
    left alone until OUTPUT is published. One run at a time: a second one is refused. Used in a ``with`` statement.
    """

    def __init__(self, output: Path, key: str, *, resume: bool) -> None:
        self.output = output
        self.root = output.with_name(output.name + ".partial")
        self.folder = self.root / key
        self._previous = self.root / "previous"
        self.root.mkdir(exist_ok=True)
        self._lock = _lock(self.root)
        _put_back(self._previous, output)
        if not resume:
            for piece in self.root.iterdir():
                shutil.rmtree(piece)
        self.folder.mkdir(exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the finished piece ``name`` is, or will be."""
        return self.folder / name

    def finished_bytes(self) -> int:
        """What the finished pieces take on disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write the piece ``name`` by calling ``write`` with a file; it appears only when complete."""
        _write_whole(self.path(name), self.folder / (name + ".tmp"), write)

    def publish(self, write: Callable[[IO[bytes]], None]) -> None:
        """Write the file OUTPUT by calling ``write``, put it in place in one step, and clear the staging away."""
        _write_whole(self.output, self.folder / "output.tmp", write)
        shutil.rmtree(self.root, ignore_errors=True)

    def publish_folder(self, name: str) -> None:
        """Put the piece ``name``, a folder, in OUTPUT's place and clear the staging away.

        An OUTPUT that exists is exchanged for it in one step; where the system has no such step it is moved aside
        first, and put back by the next run if that was all that happened.
        """
        for path in [*self.path(name).rglob("*"), self.path(name)]:
            _sync(path)
        if not self.output.exists():
            os.rename(self.path(name), self.output)
        elif not _exchange(self.path(name), self.output):
            os.rename(self.output, self._previous)
            os.rename(self.path(name), self.output)
        _sync(self.output.parent)
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the folders again if no piece was finished, and let another run in."""
        for folder in (self.folder, self.root):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)


def replace_files(folder: Path, writers: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Write files into a folder that may hold others, so that they are never seen mixed with earlier ones.

    All are written beside their places first. The last one is taken for the mark of a whole set: it is removed
    before the others are replaced, and put in place after them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = {name: folder / f"{name}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            _write_whole(temporaries[name], folder / f"{name}.part", write)
        (folder / list(writers)[-1]).unlink(missing_ok=True)
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    _sync(folder)


def _lock(folder: Path) -> int | None:
    """A lock on the folder, which ends with the process; its handle."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FrodctlError(f"{folder}: another run is writing this output; wait for it, or name another") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def _put_back(previous: Path, output: Path) -> None:
    """Mend what a run that was cut between the two steps of `Staging.publish_folder` left."""
    if previous.exists() and not output.exists():
        os.rename(previous, output)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file in one step, over whatever was there."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    _write_whole(path, path.with_name(path.name + ".partial"), write)


def _write_whole(path: Path, temporary: Path, write: Callable[[IO[bytes]], None]) -> None:
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the renames in a folder; not every system lets a folder be opened.

    Windows flushes only what is open for writing.
    """
    try:
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
