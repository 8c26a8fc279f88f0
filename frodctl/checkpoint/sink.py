"""Output that appears whole or not at all: staged beside its destination, flushed, renamed.

What exists is replaced by ``force`` alone, what is read never, and of a folder only what frodctl or ``save_pretrained``
made. All that writes passes `check_output_file` or `check_output_folder`, before the work and again as the output gets
its name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Self

from frodctl.checkpoint import files, manifest
from frodctl.checkpoint.inputs import read_json
from frodctl.errors import FrodctlError, InvalidInput, OutOfResources, UsageError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMED = 8  # foreign files that a refusal names
_UNSENT = "unsent.json"


def check_output_file(path: Path, reads: Iterable[Path] = (), *, force: bool) -> None:
    """Refuse a destination that cannot or must not be written.

    Raises
    ------
    UsageError
        It is one of the files in ``reads`` by whatever path, or has the name of a part of a checkpoint or adapter in
        the folder of one; it exists and ``force`` is not given; it is no ordinary file, or its parent is no folder.
    FrodctlError
        Its parent is not writable.
    """
    _check_length(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not an ordinary file; name another")
    for given in reads:
        if path.exists() and given.exists() and path.samefile(given):
            raise UsageError(f"{path}: is one of the files that are read; name another")
    _check_name(path)
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path}: exists; `force=True` replaces it, or name another file")
    _check_parent(path)


def check_output_folder(path: Path, reads: Iterable[Path], *, force: bool) -> None:
    """Refuse a destination folder that cannot or must not be written.

    Raises
    ------
    UsageError
        It is, contains or lies in one of ``reads``, files or folders; it has the name of a part of a checkpoint in the
        folder of one; it exists and ``force`` is not given; it holds what `manifest.foreign` finds; or its parent is no
        folder.
    FrodctlError
        Its parent is not writable.
    """
    _check_length(path)
    for given in reads:
        if _lies_in(path, given) or _lies_in(given, path):
            raise UsageError(f"{path}: is, contains or lies in {given}, which is read; name a folder elsewhere")
    _check_name(path)
    if os.path.lexists(path):
        if not path.is_dir() or path.is_symlink():
            kind = "a link" if path.is_symlink() else "not a folder"
            raise UsageError(f"{path}: exists and is {kind}; name another")
        foreign = list(islice(manifest.foreign(path), _NAMED + 1))
        if foreign:
            names = ", ".join(foreign[:_NAMED]) + (" and more" if len(foreign) > _NAMED else "")
            raise UsageError(
                f"{path}: holds more than a checkpoint that frodctl may replace: {names}; move that away, or name "
                "another folder"
            )
        if not force:
            raise UsageError(f"{path}: exists; `force=True` replaces it, or name another folder")
    _check_parent(path)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a file or folder that exists or, by whatever links, below it."""
    starts = path.resolve(), Path(os.path.normpath(path.absolute()))
    places = {place for start in starts for place in (start, *start.parents)}
    return folder.exists() and any(place.exists() and place.samefile(folder) for place in places)


def _check_length(path: Path) -> None:
    """The names of unfinished work are a little longer than the output's."""
    try:
        os.lstat(f"{path}.partial")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{path}: too long a name for a file") from None


def _check_name(path: Path) -> None:
    """A file of such a name would take the place of a part of the model beside it, now or as it is loaded."""
    if manifest.PART_OF_A_MODEL.fullmatch(path.name) and path.parent.is_dir():
        others = {entry.name for entry in path.parent.iterdir()} - {path.name}
        if any(manifest.PART_OF_A_MODEL.fullmatch(name) for name in others):
            raise UsageError(f"{path}: would be taken for a part of the model in its folder; give it another name")


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise FrodctlError(f"{path.parent}: not writable; name an output elsewhere")


def require_disk(folder: Path, nbytes: int) -> None:
    """Raise `OutOfResources` if the disk under ``folder`` has less than ``nbytes`` free."""
    free = files.free_bytes(folder)
    if free < nbytes:
        raise OutOfResources(
            f"{folder}: {nbytes / 1e6:.1f} MB needed on disk (output and staging), {free / 1e6:.1f} MB free"
        )


def is_unsent(output: Path, key: str | None = None) -> bool:
    """Whether OUTPUT is as a run left it that was to send it on and did not: one of the job ``key``, or of any."""
    root = _unfinished(output)
    folders = [root / key] if key is not None else sorted(root.iterdir()) if root.is_dir() else []
    return any(_unsent_piece(folder, output) is not None for folder in folders)


def _unsent_piece(folder: Path, output: Path) -> str | None:
    """What OUTPUT was called among the pieces in this folder, if it is the one that was made of them and not sent."""
    try:
        note = read_json(folder / _UNSENT)
        known = note["state"] == _state(output) and re.fullmatch(r"\w+", str(note["piece"]))
    except (OSError, InvalidInput, KeyError):
        return None
    return str(note["piece"]) if known else None


def _state(output: Path) -> list[int]:
    """What tells a file or a folder's entries from changed ones."""
    found = files.stat(output)
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


class Pieces:
    """``OUTPUT.partial/KEY/``: the finished pieces of the job KEY, until OUTPUT is whole.

    Other processes of the job write pieces too, with this class; one of them has the `Staging`. Used in a ``with``
    statement.

    Raises
    ------
    FrodctlError
        The folder is not there.
    OutOfResources
        The disk filled up within the ``with`` statement.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.root = _unfinished(output)
        self.folder = self.root / key
        self._enter()

    def _enter(self) -> None:
        if not self.folder.is_dir():
            raise FrodctlError(f"{self.folder}: not there, where other processes of the job write; name another output")

    def path(self, name: str) -> Path:
        """Where the finished piece ``name`` is, or will be."""
        return self.folder / name

    def write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write the piece ``name`` by calling ``write`` with a file; it appears only when complete."""
        temporary = self.folder / (name + ".tmp")
        _write_new(temporary, write)
        files.replace(temporary, self.path(name))
        files.sync(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        _refuse_full_disk(self.output, error[1] if error else None, ", and a rerun resumes")


class Staging(Pieces):
    """The pieces of a job, with the right to give OUTPUT its name.

    A run that was killed leaves its pieces here, and the same job takes them up. Another job's pieces are
    left alone. One run at a time: a second one is refused. Used in a ``with`` statement.

    Parameters
    ----------
    output : Path
    key : str
        A digest of everything that the output depends on, in hexadecimal.
    check : callable
        Raises where OUTPUT must not be written; asked at once, and as OUTPUT gets its name.
    resume : bool
        Take up what there is.
    notice : callable, optional
        Told what a person should know of a file system that cannot do all that is promised here.

    Raises
    ------
    UsageError
        By ``check``; or OUTPUT.partial holds what is not of here, or links that writing would follow.
    FrodctlError
        Another run is writing the output.
    OutOfResources
        The disk filled up within the ``with`` statement.
    """

    def __init__(
        self,
        output: Path,
        key: str,
        check: Callable[[], None],
        *,
        resume: bool,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._check = check
        self._resume = resume
        self._notice = notice
        super().__init__(output, key)

    def _enter(self) -> None:
        self._previous = self.root / "previous"
        self._check()
        if os.path.lexists(self.root) and (self.root.is_symlink() or not self.root.is_dir()):
            raise UsageError(f"{self.root}: is not a folder, but unfinished work goes there; remove it")
        files.mkdir(self.root)
        self._lock = _lock(self.root)
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise

    def _prepare(self) -> None:
        for entry in files.listing(self.root):
            ours = entry.name == self._previous.name or re.fullmatch("[0-9a-f]{16}", entry.name)
            if not ours or not entry.is_dir(follow_symlinks=False):
                raise UsageError(f"{entry.path}: is not of an unfinished run; move it away from there")
        if _put_back(self._previous, self.output):
            self._check()
        if not self._resume:
            for entry in files.listing(self.root):
                files.rmtree(Path(entry.path))
        files.mkdir(self.folder)
        self._tell_what_is_lacking()
        piece = _unsent_piece(self.folder, self.output)
        taken_back = [self.output] if piece is not None and self.output.is_dir() else []
        for path in (path for folder in (self.folder, *taken_back) for path in folder.rglob("*")):
            state = path.lstat()
            if not stat.S_ISDIR(state.st_mode) and not (stat.S_ISREG(state.st_mode) and state.st_nlink == 1):
                raise UsageError(f"{path}: is a link or no ordinary file, and would be written to; remove {self.root}")
        if piece is not None and taken_back:  # it is a piece again, which the job finds finished
            files.rename(self.output, self.path(piece))

    def _tell_what_is_lacking(self) -> None:
        lacking = []
        if self._lock is None:
            lacking.append("it has no locks: see that no other run writes this output")
        if not files.sync(self.root):
            lacking.append("it flushes no folders: what was done last may be lost with the power")
        if lacking:
            self._notice(f"{self.output.parent}: of its file system, {'; '.join(lacking)}")

    def begin_folder(self, name: str, keep: Collection[str]) -> Path:
        """Make the piece ``name`` a folder that holds nothing but what an earlier run left of the names in ``keep``."""
        folder = self.path(name)
        files.mkdir(folder)
        for entry in files.listing(folder):
            if entry.is_dir(follow_symlinks=False):
                files.rmtree(Path(entry.path))
            elif entry.name not in keep:
                files.unlink(Path(entry.path))
        return folder

    def finished_bytes(self) -> int:
        """What the finished pieces take on disk."""
        return sum(files.stat(path).st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def publish(self, write: Callable[[IO[bytes]], None], *, unsent: bool = False) -> None:
        """Write the file OUTPUT by calling ``write``, put it in place in one step, and clear the staging away.

        Where it is ``unsent`` the pieces stay until `clear`, so that the same job does nothing but send it.
        """
        temporary = self.folder / "output.tmp"
        _write_new(temporary, write)
        try:
            _put(temporary, self.output, self._check, files.replace)
        except BaseException:
            _discard(temporary)
            raise
        self._published(temporary.name, unsent)

    def publish_folder(self, name: str, *, unsent: bool = False) -> None:
        """Put the piece ``name``, a folder, in OUTPUT's place and clear the staging away; ``unsent`` as in `publish`.

        An OUTPUT that exists is exchanged for it in one step; where the system has no such step it is moved aside
        first, and put back by the next run if that was all that happened.
        """
        for path in [*self.path(name).rglob("*"), self.path(name)]:
            files.sync(path)
        _put(self.path(name), self.output, self._check, self._replace_folder)
        self._published(name, unsent)

    def _published(self, piece: str, unsent: bool) -> None:
        if not unsent:
            self.clear()
            return
        with suppress(OSError):  # without a note a rerun is refused, as over any output
            for replaced in (self.path(piece), self._previous):
                if replaced.is_dir():
                    files.rmtree(replaced)
            note = {"piece": Path(piece).stem, "state": _state(self.output)}
            files.write_text(self.path(_UNSENT), json.dumps(note))

    def clear(self) -> None:
        """Remove what is of this job; another job's finished pieces are left for it."""
        for folder in (self.folder, self._previous):
            with suppress(OSError):
                files.rmtree(folder)
        with suppress(OSError):  # another job has pieces there
            files.rmdir(self.root)

    def _replace_folder(self, new: Path, old: Path) -> None:
        if not files.exchange(new, old):
            files.rename(old, self._previous)
            files.rename(new, old)

    def __exit__(self, *error: object) -> None:
        """Remove the folders again if no piece was finished, and let another run in."""
        with suppress(OSError):
            for folder in (self.folder, self.root):
                if folder.is_dir() and not files.listing(folder):
                    files.rmdir(folder)
        if self._lock is not None:
            with suppress(OSError):
                files.close(self._lock)
        super().__exit__(*error)


def write_file(path: Path, write: Callable[[IO[bytes]], None], reads: Iterable[Path] = (), *, force: bool) -> None:
    """Write one file by calling ``write``, in one step; errors are those of `check_output_file`."""
    reads = tuple(reads)
    check_output_file(path, reads, force=force)
    temporary = _beside(path)
    try:
        _write_new(temporary, write)
        _put(temporary, path, lambda: check_output_file(path, reads, force=force), files.replace)
    except BaseException as error:
        _discard(temporary)
        _refuse_full_disk(path, error)
        raise


def replace_files(folder: Path, writers: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Write files into a folder that may hold others, so that they are never seen mixed with earlier ones.

    All are written beside their places first. The last one is taken for the mark of a whole set: it is removed
    before the others are replaced, and put in place after them. Folders made for them go again if that fails.

    Raises
    ------
    UsageError
        The folder is a file or lies in one, or one of the files is a folder.
    OutOfResources
        The disk is full.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        for place in reversed(missing):
            files.mkdir(place)
        files.mkdir(folder)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder}: is a file, or lies in one; name a folder") from None
    for name in writers:
        if (folder / name).is_dir():
            raise UsageError(f"{folder / name}: is a folder, where a file is to be written; name another folder")
    temporaries = {name: _beside(folder / name) for name in writers}
    try:
        for name, write in writers.items():
            _write_new(temporaries[name], write)
        files.unlink(folder / list(writers)[-1])
        files.sync(folder)
        for name, temporary in temporaries.items():
            files.replace(temporary, folder / name)
    except BaseException as error:
        for temporary in temporaries.values():
            _discard(temporary)
        for place in missing:
            with suppress(OSError):  # somebody else's file came in
                files.rmdir(place)
        _refuse_full_disk(folder, error)
        raise
    files.sync(folder)


def _beside(path: Path) -> Path:
    """A name that nothing has, where what a file is to hold is written first."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _refuse_full_disk(output: Path, error: object, more: str = "") -> None:
    """Turn the error of a full disk into `OutOfResources`."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        text = f"{output}: {error.strerror}; nothing was left under the final name{more}"
        raise OutOfResources(text) from None


def _lock(folder: Path) -> int | None:
    """A lock on the folder, which ends with the process; its handle."""
    try:
        return files.locked(folder)
    except BlockingIOError:
        raise FrodctlError(f"{folder}: another run is writing this output; wait for it, or name another") from None


def _put_back(previous: Path, output: Path) -> bool:
    """Mend what a run that was cut between the two steps of `Staging.publish_folder` left."""
    if not previous.exists() or os.path.lexists(output):
        return False
    files.rename(previous, output)
    return True


def _put(new: Path, output: Path, check: Callable[[], None], replace: Callable[[Path, Path], None]) -> None:
    """Give a finished file or folder its name: over what ``check`` allows, and over nothing that appears after it."""
    exists = os.path.lexists(output)
    check()
    if exists:
        replace(new, output)
    elif not files.rename_new(new, output):
        check()
        files.rename(new, output)
    files.sync(output.parent)


def _write_new(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file that was not there, or that a killed run left; nothing is written through a link."""
    files.unlink(path)
    try:
        with files.named(path), files.open_write(path, "x") as file:
            write(file)
            file.flush()
            files.flush(file.fileno())
    except BaseException:
        _discard(path)
        raise


def _discard(path: Path) -> None:
    """Remove a file that is of no use, if that works: the error that made it so is the one to be told."""
    with suppress(OSError):
        files.unlink(path)
