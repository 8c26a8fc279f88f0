"""Output that appears whole or not at all: staged beside its destination, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from frodctl.errors import FrodctlError, OutOfResources, UsageError


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
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise FrodctlError(f"{path.parent}: not writable; name another file with -o")


def require_disk(folder: Path, nbytes: int) -> None:
    """Raise `OutOfResources` if the disk under ``folder`` has less than ``nbytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutOfResources(
            f"{folder}: {nbytes / 1e6:.1f} MB needed on disk (output and staging), {free / 1e6:.1f} MB free"
        )


class Staging:
    """``FILE.partial/KEY/``: the finished pieces of the job KEY, until FILE is whole.

    A run that was killed leaves its pieces here, and the same job takes them up. Another job's pieces are
    left alone until FILE is published.
    """

    def __init__(self, output: Path, key: str, *, resume: bool) -> None:
        self.output = output
        self.root = output.with_name(output.name + ".partial")
        self.folder = self.root / key
        if not resume and self.root.exists():
            shutil.rmtree(self.root)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the finished piece ``name`` is, or will be."""
        return self.folder / name

    def finished_bytes(self) -> int:
        """What the finished pieces take on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write the piece ``name`` by calling ``write`` with a file; it appears only when complete."""
        _write_whole(self.path(name), self.folder / (name + ".tmp"), write)

    def publish(self, write: Callable[[IO[bytes]], None]) -> None:
        """Write FILE by calling ``write``, put it in place in one step, and clear the staging away."""
        _write_whole(self.output, self.folder / "output.tmp", write)
        shutil.rmtree(self.root, ignore_errors=True)

    def discard_if_empty(self) -> None:
        """Remove the folders again if no piece was finished."""
        for folder in (self.folder, self.root):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
