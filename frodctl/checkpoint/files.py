"""Operations on files, one function for each, for whatever writes an output or takes up unfinished work.

They are called by this module's name, so that a test can have any one of them fail, end the process there, or forget
what was not flushed (`tests/trust`). An error says which file it was about.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open

try:
    import fcntl
except ImportError:  # not on Windows; two runs at once are not told apart there
    fcntl = None  # type: ignore[assignment]

COPIED_BYTES = 1 << 20  #: at once
_SEEKING = threading.Lock()
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
#: What a file system says to what it does not have.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Errors within tell the path, as those of handles do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


# One operation each.


def open_handle(path: str | Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def open_read(path: Path) -> FileIO:
    return open(path, "rb", buffering=0)


def open_mapped(path: Path) -> safe_open:
    """The safetensors library's view of a file, which it maps."""
    return safe_open(path, framework="np")  # of the frameworks it knows, the quickest to import


def close(handle: int) -> None:
    os.close(handle)


def read_into(file: FileIO, view: memoryview) -> int:
    """Fill some of the view; how many bytes, 0 at the file's end."""
    return file.readinto(view) or 0


def write(handle: int, data: memoryview) -> int:
    """Write some of the bytes; how many."""
    return os.write(handle, data)


def write_at(handle: int, data: memoryview, offset: int) -> int:
    """Write some of the bytes to their place; how many."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, offset)
    with _SEEKING:  # on Windows
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, data)


def truncate(handle: int, nbytes: int) -> None:
    os.ftruncate(handle, nbytes)


def fsync(handle: int) -> None:
    os.fsync(handle)


def lock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def stat(path: Path) -> os.stat_result:
    return path.stat()


def listing(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def mkdir(folder: Path) -> None:
    """Make a folder, where it is not there."""
    folder.mkdir(exist_ok=True)


def rmdir(folder: Path) -> None:
    folder.rmdir()


def unlink(path: Path) -> None:
    """Remove a file, where it is there."""
    path.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def rename_new(source: Path, target: Path) -> bool:
    """Rename to a name that nothing has; False where that did not work, or the system has no such step."""
    return _renameat2(source, target, _RENAME_NOREPLACE)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where that did not work, or the system has no such step."""
    return _renameat2(first, second, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0


# Made of these.


class _Raw(FileIO):
    """A file whose bytes go through `write`."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(os.fspath(path), mode, opener=open_handle)

    def write(self, data: Any) -> int:
        with named(self.name):
            return write(self.fileno(), memoryview(data))


def open_write(path: Path, mode: str) -> IO[bytes]:
    """Open a file to be written: "x" where there is none, "w" from its beginning, "a" from its end."""
    return BufferedWriter(_Raw(path, mode + "b"))


def open_nameless(folder: Path) -> IO[bytes]:
    """A file for reading and writing that is gone once it is closed."""
    with named(folder):
        return tempfile.TemporaryFile(dir=folder)


def write_all(handle: int, data: bytes | memoryview, offset: int) -> int:
    """Write the bytes to their place; how many they are."""
    view = memoryview(data)
    if not view.nbytes:
        return 0
    view = view.cast("B")
    done = 0
    while done < len(view):
        done += write_at(handle, view[done:], offset + done)
    return done


def read_bytes(path: Path) -> bytes:
    """All of a small file; nothing where there is none."""
    try:
        with open_read(path) as file, named(path):
            return file.read()
    except FileNotFoundError:
        return b""


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, over one that is there; half a surrogate pair becomes a question mark."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, over one that is there."""
    with open_write(path, "w") as file:
        file.write(data)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, over a file that is there."""
    buffer = memoryview(bytearray(COPIED_BYTES))
    with open_read(source) as given, open_write(target, "w") as made:
        while count := _read_some(given, buffer):
            made.write(buffer[:count])


def _read_some(file: FileIO, view: memoryview) -> int:
    with named(file.name):
        return read_into(file, view)


def rmtree(folder: Path) -> None:
    """Remove a folder and all that is below it; of links only themselves."""
    for entry in listing(folder):
        if entry.is_dir(follow_symlinks=False):
            rmtree(Path(entry.path))
        else:
            unlink(Path(entry.path))
    rmdir(folder)


def sync(path: Path) -> bool:
    """Flush a file, or the names in a folder, to the disk; False where nothing can.

    Windows flushes only what is open for writing, and lets no folder be opened; some network file systems flush no
    folders.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return False
    handle = open_handle(path, os.O_RDONLY if folder else os.O_RDWR)
    with named(path):
        try:
            return flush(handle)
        finally:
            close(handle)


def flush(handle: int) -> bool:
    """Flush what is open to the disk; False where the file system cannot."""
    try:
        fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def locked(folder: Path) -> int | None:
    """Lock a folder for this process, until it ends or closes the handle that this returns; None where nothing can.

    Raises
    ------
    BlockingIOError
        Another has it.
    """
    if fcntl is None:
        return None
    handle = open_handle(folder, os.O_RDONLY)
    try:
        with named(folder):
            lock(handle)
    except OSError as error:
        close(handle)
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return handle


def free_bytes(folder: Path) -> int:
    """What may be written to the disk under a folder."""
    return shutil.disk_usage(folder).free
