"""Any operation of `frodctl.checkpoint.files` made to fail, to do half of its work, or to be the process's last."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from frodctl.checkpoint import files
from frodctl.errors import FrodctlError
from tests.trust.jobs import Job, content

OPERATIONS = (
    "open_handle", "open_read", "open_mapped", "open_nameless", "close", "read_into", "write", "write_at", "truncate",
    "fsync", "lock", "stat", "listing", "mkdir", "rmdir", "unlink", "rename", "replace", "rename_new", "exchange",
    "free_bytes",
)  # fmt: skip
WRITES = ("write", "write_at")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINTR, errno.EMFILE)
KILLED = 9

#: Does an operation, or not: its number among all of a run, its name, what calls it.
Around = Callable[[int, str, Callable[[], Any], tuple[Any, ...]], Any]


@contextmanager
def around(act: Around) -> Iterator[None]:
    """Have every operation done by ``act``; they are numbered from 0."""
    numbers, guard = iter(range(10**9)), threading.Lock()

    def replaced(name: str) -> Callable[..., Any]:
        real = getattr(files, name)

        def operation(*arguments: Any) -> Any:
            with guard:
                number = next(numbers)
            return act(number, name, lambda: real(*arguments), arguments)

        return operation

    with patch.multiple(files, **{name: replaced(name) for name in OPERATIONS}):
        yield


def names_of(run: Callable[[], object]) -> list[str]:
    """The operations of a run, in their order."""
    found: dict[int, str] = {}

    def act(number: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        found[number] = name
        return do()

    with around(act):
        run()
    return [found[number] for number in sorted(found)]


def failing(at: int, number: int) -> Around:
    """One operation fails with this error, or says that it did not work, where that is how it fails."""

    def act(count: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if count != at:
            return do()
        if name == "close":
            do()
        if name in ("rename_new", "exchange"):
            return False
        raise OSError(number, os.strerror(number), *(a for a in arguments[:1] if isinstance(a, Path | str)))

    return act


def half(name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """Write half of the bytes; anything else is done whole."""
    if name not in WRITES:
        return do()
    handle, data, *place = arguments
    return os.pwrite(handle, data[: len(data) // 2], *place) if place else os.write(handle, data[: len(data) // 2])


def short(at: int) -> Around:
    """One write, or read, takes fewer bytes than it was given, as it may."""

    def act(count: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if count == at and name in WRITES and len(arguments[1]) > 1:
            return half(name, do, arguments)
        if count == at and name == "read_into" and len(arguments[1]) > 1:
            return arguments[0].readinto(arguments[1][: len(arguments[1]) // 2])
        return do()

    return act


def ending(at: int, moment: str) -> Around:
    """The process ends before an operation, amid it, or after it."""

    def act(count: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if count == at and moment == "before":
            os._exit(KILLED)
        if count == at and moment == "amid":
            half(name, do, arguments)
            os._exit(KILLED)
        result = do()
        if count == at:
            os._exit(KILLED)
        return result

    return act


def killed(run: Callable[[], object], at: int, moment: str) -> bool:
    """Run in a process that ends at the operation with this number; False where the run has none."""
    child = os.fork()
    if child == 0:
        try:
            with around(ending(at, moment)):
                run()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def check_left(job: Job, folder: Path, inputs: dict[str, bytes | None]) -> bool:
    """What a cut run left: the output whole, as it was, or absent; unfinished work; the inputs as they were."""
    found = content(folder / job.output)
    assert found in (job.expected, job.before), sorted(found)
    assert {path.name for path in folder.iterdir()} <= {job.output, f"{job.output}.partial"}
    assert content(job.home) == inputs
    return found == job.expected


def check_rerun(job: Job, folder: Path, *, whole: bool) -> None:
    """The same command comes to the same bytes, and leaves nothing else."""
    if whole and not job.before:  # which is there, so that it would refuse
        return
    job.run(folder)
    assert content(folder / job.output) == job.expected
    assert [path.name for path in folder.iterdir()] == [job.output]


def fail_once(job: Job, folder: Path, inputs: dict[str, bytes | None], at: int, number: int) -> None:
    """A run in which one operation fails: it fails too, with an error that names a file, or does without."""
    job.prepare(folder)
    handles = len(os.listdir("/proc/self/fd"))
    caught: Exception | None = None
    try:
        with around(failing(at, number)):
            job.run(folder)
    except (FrodctlError, OSError) as error:
        caught = error
    assert not isinstance(caught, OSError) or caught.filename, caught  # of which the command's message is made
    assert len(os.listdir("/proc/self/fd")) == handles
    whole = check_left(job, folder, inputs)
    assert caught or whole
    check_rerun(job, folder, whole=whole)
