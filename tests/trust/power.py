"""What a disk may hold after the power went: what was not flushed is there, or is not, or is torn.

A run's changes are recorded as they pass `frodctl.checkpoint.files`. A file's bytes and size are safe once the file was
flushed after them; names are safe once one of the folders that they changed in was. At any moment all that is safe is
there, and of the rest each change by itself may be: no order holds, and of a write any beginning. That is harsher than
any one file system, in the way of ALICE (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trust.faults import around

ROOT = 0


@dataclass
class Change:
    """Entries of folders that change together, as (folder, name, what is there then), or bytes of a file."""

    entries: list[tuple[int, str, int | None]] = field(default_factory=list)
    file: int | None = None
    offset: int = 0
    data: bytes | None = None  #: None: the file gets the size ``offset``
    safe: int | None = None  #: the number of the change at which it was flushed


class Recorder:
    """What a run does below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folders: dict[int, dict[str, int]] = {}
        self.start: dict[int, bytes] = {}  #: files that are there before
        self.changes: list[Change] = []
        self._handles: dict[int, tuple[int, int]] = {}
        self._count = ROOT
        self._look(folder)
        self.before = {number: dict(entries) for number, entries in self.folders.items()}

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _look(self, folder: Path) -> int:
        number = self._new()
        self.folders[number] = {}
        for path in folder.iterdir():
            if path.is_dir():
                self.folders[number][path.name] = self._look(path)
            else:
                file = self.folders[number][path.name] = self._new()
                self.start[file] = path.read_bytes()
        return number

    def _place(self, path: Path) -> tuple[int, str]:
        """The folder's number, and the name in it."""
        number = ROOT
        *above, name = path.relative_to(self.folder).parts
        for part in above:
            number = self.folders[number][part]
        return number, name

    def _number(self, path: Path) -> int | None:
        if path == self.folder:
            return ROOT
        folder, name = self._place(path)
        return self.folders[folder].get(name)

    def _enter(self, *entries: tuple[int, str, int | None]) -> None:
        self.changes.append(Change(list(entries)))
        for folder, name, number in entries:
            if number is None:
                self.folders[folder].pop(name, None)
            else:
                self.folders[folder][name] = number

    def record(self, run: Callable[[], object]) -> None:
        def act(number: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
            note = getattr(self, f"_{name}", None)
            first = Path(arguments[0]) if isinstance(arguments[0], str | Path) else None
            if note is None or (first is not None and not first.is_relative_to(self.folder)):
                return do()
            known = first is not None and os.path.lexists(first)
            result = do()
            note(result, known, *arguments)
            return result

        with around(act):
            run()

    def _open_handle(self, handle: int, known: bool, path: Path | str, flags: int) -> None:
        path = Path(path)
        number = self._number(path)
        if number is None:
            number = self._new()
            self._enter((*self._place(path), number))
        elif flags & os.O_TRUNC:
            self.changes.append(Change(file=number, data=None))
        self._handles[handle] = number, 0

    def _close(self, result: None, known: bool, handle: int) -> None:
        self._handles.pop(handle, None)

    def _write(self, count: int, known: bool, handle: int, data: memoryview) -> None:
        number, place = self._handles[handle]
        self._write_at(count, known, handle, data, place)
        self._handles[handle] = number, place + count

    def _write_at(self, count: int, known: bool, handle: int, data: memoryview, offset: int) -> None:
        if handle in self._handles:  # else of a file without a name
            number, _ = self._handles[handle]
            self.changes.append(Change(file=number, offset=offset, data=bytes(data[:count])))

    def _truncate(self, result: None, known: bool, handle: int, nbytes: int) -> None:
        self.changes.append(Change(file=self._handles[handle][0], offset=nbytes))

    def _fsync(self, result: None, known: bool, handle: int) -> None:
        number, _ = self._handles[handle]
        for change in self.changes:
            if change.safe is None and (change.file == number or number in [folder for folder, *_ in change.entries]):
                change.safe = len(self.changes)

    def _mkdir(self, result: None, known: bool, folder: Path) -> None:
        if not known:
            number = self._new()
            self.folders[number] = {}
            self._enter((*self._place(folder), number))

    def _unlink(self, result: None, known: bool, path: Path) -> None:
        if known:
            self._enter((*self._place(path), None))

    _rmdir = _unlink

    def _rename(self, result: object, known: bool, source: Path, target: Path) -> None:
        self._enter((*self._place(source), None), (*self._place(target), self._number(source)))

    _replace = _rename

    def _rename_new(self, done: bool, known: bool, source: Path, target: Path) -> None:
        if done:
            self._rename(None, known, source, target)

    def _exchange(self, done: bool, known: bool, first: Path, second: Path) -> None:
        if done:
            one, other = self._number(first), self._number(second)
            self._enter((*self._place(first), other), (*self._place(second), one))

    def leave(self, folder: Path, moment: int, seed: int) -> None:
        """Make an empty folder what the disk may hold where the power went after as many changes."""
        chance = random.Random(seed)
        rate = chance.choice((0.0, 0.5, 0.9, 1.0))  # of what was not flushed
        folders = {number: dict(entries) for number, entries in self.before.items()}
        data = {number: bytearray(found) for number, found in self.start.items()}
        for change in self.changes[:moment]:
            safe = change.safe is not None and change.safe <= moment
            if not safe and chance.random() >= rate:
                continue
            for place, name, number in change.entries:
                entries = folders.setdefault(place, {})
                entries.pop(name, None)
                if number is not None:
                    entries[name] = number
            if change.file is not None:
                torn = not safe and chance.random() < 0.3
                _apply(change, data.setdefault(change.file, bytearray()), chance.random() if torn else 1.0)
        self._make(folder, ROOT, folders, data, set())

    def _make(
        self, path: Path, number: int, folders: dict[int, dict[str, int]], data: dict[int, bytearray], made: set[int]
    ) -> None:
        for name, inner in folders.get(number, {}).items():
            if inner in made:  # a rename of which the old name stayed: a file system would have one of them
                continue
            made.add(inner)
            if inner in self.folders:
                (path / name).mkdir()
                self._make(path / name, inner, folders, data, made)
            else:
                (path / name).write_bytes(data.get(inner, b""))


def _apply(change: Change, data: bytearray, share: float) -> None:
    if change.data is None:
        del data[change.offset :]
        data.extend(bytes(change.offset - len(data)))
        return
    written = change.data[: int(share * len(change.data))]
    data.extend(bytes(max(0, change.offset + len(written) - len(data))))
    data[change.offset : change.offset + len(written)] = written
