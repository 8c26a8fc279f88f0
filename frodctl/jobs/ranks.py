"""torchrun's ranks: processes that share a job. torch.distributed has their messages, and nothing else is torch's.

A rank whose peer has ended hears of it in its next message, and ends as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from frodctl.checkpoint import files, sink
from frodctl.errors import FrodctlError, UsageError
from frodctl.method.ranks import ALONE, Ranks, shares
from frodctl.pipeline import within

if TYPE_CHECKING:
    import torch.distributed as distributed

    from frodctl.arrays import Array

T = TypeVar("T")

#: What torch and its messages add to a rank's resident memory.
RANK_BYTES = 190_000_000
#: For all ranks to be there.
_START = timedelta(minutes=5)
#: One rank may wait this long for another's arithmetic.
_PATIENCE = timedelta(days=7)
_CHUNK = 1 << 26  # elements in one message
_TOKEN = "ranks"  # by which all see that they write to one folder
_ALONE = "without RANK and WORLD_SIZE in the environment this is one process"


class RankLost(FrodctlError):
    """Another rank has ended, so this one cannot go on."""


class World(Ranks, Protocol):
    """All ranks of a job."""

    def group(self, members: Sequence[int]) -> Ranks | None:
        """Some of them, the first of whom leads; None for who is not one. Everybody asks for the same groups."""
        ...


class Group:
    """Ranks that send each other messages. See `Ranks`.

    Parameters
    ----------
    members : sequence of int
        Their numbers in the world.
    number : int
        This one's place among them.
    handle : ProcessGroup, optional
        torch's; None for the world.
    """

    def __init__(self, members: Sequence[int], number: int, handle: distributed.ProcessGroup | None = None) -> None:
        self.members = tuple(members)
        self.number = number
        self.count = len(self.members)
        self._handle = handle

    def own(self, count: int) -> range:
        return shares(count, self.count)[self.number]

    def sum(self, X: Array) -> Array:
        import torch.distributed as distributed

        with _messages():
            for part in _tensor(X).view(-1).split(_CHUNK):
                distributed.all_reduce(part, group=self._handle)
        return X

    def largest(self, x: float) -> float:
        return max(math.inf if math.isnan(each) else each for each in self.gather(x))

    def share(self, values: Sequence[Any] | None, source: int = 0) -> list[Any]:
        import torch.distributed as distributed

        described = [None if values is None else [_Blank.of(value) for value in values]]
        sender = self.members[source]
        with _messages():
            distributed.broadcast_object_list(described, src=sender, group=self._handle)
            sends = self.number == source and values is not None
            shared = list(values or ()) if sends else _made(described[0])
            for array in filter(_is_array, shared):
                for part in _tensor(array, sent=sends).view(-1).split(_CHUNK):
                    distributed.broadcast(part, src=sender, group=self._handle)
        return shared

    def gather(self, value: T) -> list[T]:
        import torch.distributed as distributed

        values: list[Any] = [None] * self.count
        with _messages():
            distributed.all_gather_object(values, value, group=self._handle)
        return values

    def group(self, members: Sequence[int]) -> Ranks | None:
        import torch.distributed as distributed

        if tuple(members) == self.members:
            return self
        if len(members) == 1:
            return ALONE if members[0] == self.number else None
        with _messages():
            handle = distributed.new_group(list(members), timeout=_PATIENCE)
        return Group(members, list(members).index(self.number), handle) if self.number in members else None


class _Blank:
    """An array to be received."""

    def __init__(self, shape: tuple[int, ...], dtype: str, on_device: bool) -> None:
        self.shape = shape
        self.dtype = dtype
        self.on_device = on_device

    @classmethod
    def of(cls, value: Any) -> Any:
        """What announces a value: itself, unless it is an array."""
        from frodctl.arrays import dtype_name

        if not _is_array(value):
            return value
        return cls(tuple(value.shape), dtype_name(value), getattr(value, "is_cuda", False))

    def made(self) -> Any:
        """Memory for it, on this rank's device if it is on the sender's."""
        import numpy

        from frodctl.arrays import NAMED

        if not self.on_device:
            return numpy.empty(self.shape, NAMED[self.dtype])
        import torch

        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="cuda")


def _made(described: Any) -> list[Any]:
    return [value.made() if isinstance(value, _Blank) else value for value in described]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and bool(value.shape)


def _tensor(X: Any, *, sent: bool = False) -> Any:
    """The tensor over an array's own memory; or, where it is only sent, of its values."""
    import numpy

    from frodctl.arrays import to_torch

    if not isinstance(X, numpy.ndarray):
        return X.contiguous() if sent else X
    assert sent or (X.flags.writeable and X.flags.c_contiguous), "a message is to change the array itself"
    return to_torch(numpy.ascontiguousarray(X))


@contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "another rank has ended or cannot be reached; its message, or torchrun's, says why, and the same command "
            f"resumes ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:160] or "no answer"


@contextmanager
def staged(world: World, output: Path, staging: Callable[[], sink.Staging]) -> Iterator[sink.Pieces]:
    """The folder of the finished pieces: the first rank's, who opens it, and who alone has the `Staging`.

    Raises
    ------
    UsageError
        Another rank does not see it: it is on another machine's disk.
    """
    if world.count == 1:
        with staging() as single:
            yield single
        return
    opened = staging() if world.number == 0 else None
    token = os.urandom(8).hex()
    if opened is not None:
        files.write_text(opened.path(_TOKEN), token)
    key, token = world.share(None if opened is None else [opened.folder.name, token])
    with opened or sink.Pieces(output, key) as pieces:
        if files.read_bytes(pieces.path(_TOKEN)) != token.encode():
            raise UsageError(f"{output}: not the same folder for all ranks; name an output on a disk that all share")
        world.gather(None)
        if opened is not None:
            files.unlink(opened.path(_TOKEN))
        yield pieces


class Launch:
    """How this process was started: by torchrun as one of several, or by itself.

    Parameters
    ----------
    environ : mapping
        With torchrun's variables, if it is one of its ranks.

    Raises
    ------
    UsageError
        Some of torchrun's variables are missing, or are not what they can be.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        is_rank = "RANK" in environ or "WORLD_SIZE" in environ
        self.count = _number(environ, "WORLD_SIZE", 1) if is_rank else 1
        several = self.count > 1
        self.number = _number(environ, "RANK", 0, self.count - 1) if several or "RANK" in environ else 0
        self.local_count = _number(environ, "LOCAL_WORLD_SIZE", 1, self.count) if several else 1
        self.local_number = _number(environ, "LOCAL_RANK", 0, self.local_count - 1) if several else 0
        port = _number(environ, "MASTER_PORT", 1, 65535) if several else 0
        self._address = f"{_text(environ, 'MASTER_ADDR')}:{port}" if several else ""

    @cached_property
    def world(self) -> World:
        """All ranks, met; the first call waits for them.

        Raises
        ------
        RankLost
            Not all of them came.
        """
        if self.count == 1:
            return ALONE
        import torch
        import torch.distributed as distributed
        from torch.distributed.distributed_c10d import PrefixStore

        has_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        if has_gpus:
            torch.cuda.set_device(self.local_number % torch.cuda.device_count())
        if isinstance(self._store, Exception):
            why = _first_line(self._store)
            raise RankLost(f"the ranks of torchrun do not meet at {self._address} ({why}); {_ALONE}")
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
                store=PrefixStore("frodctl", self._store),
                rank=self.number,
                world_size=self.count,
                timeout=_START,
            )
            distributed.barrier()
        except RuntimeError as error:
            raise RankLost(
                f"not all of the {self.count} ranks of torchrun came ({_first_line(error)}); {_ALONE}"
            ) from error
        return Group(range(self.count), self.number, distributed.new_group(timeout=_PATIENCE))

    @cached_property
    def _store(self) -> Any:
        """torchrun's, through which the ranks find each other; or why it can be neither reached nor opened."""
        from torch.distributed.rendezvous import rendezvous

        def meet() -> Any:
            return next(rendezvous("env://", self.number, self.count, timeout=_START))[0]

        try:
            return within(2 * _START.total_seconds(), meet)  # torch's own patience has no end with who never answers
        except (RuntimeError, TimeoutError) as error:
            return error

    def first_to_fail(self) -> bool:
        """Whether no other rank has said yet that the job failed; asked once, by who is about to say so."""
        if self.count == 1 or isinstance(self._store, Exception):
            return True
        try:
            first: bool = self._store.add("frodctl failed", 1) == 1
        except RuntimeError:  # the store has ended with the first rank, where no torchrun keeps it
            return True
        return first

    def leave(self) -> None:
        """End the messages, after the last."""
        if "world" in self.__dict__ and self.count > 1:
            import torch.distributed as distributed

            with suppress(RuntimeError):  # all is done, whoever has left before
                distributed.barrier()
            distributed.destroy_process_group()


def _number(environ: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """One of torchrun's variables that is a whole number."""
    text = _text(environ, name)
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        wanted = f"from {least} to {most}" if most is not None else f"of {least} or more"
        count = environ.get("WORLD_SIZE")
        where = f" (WORLD_SIZE={count})" if name != "WORLD_SIZE" and count else ""
        raise UsageError(f"{name}={text} in the environment is no whole number {wanted}{where}; {_ALONE}")
    return number


def _text(environ: Mapping[str, str], name: str) -> str:
    text = environ.get(name)
    if not text:
        raise UsageError(
            f"{name} is missing in the environment, where RANK or WORLD_SIZE make this one of several ranks, for which "
            f"torchrun sets it; {_ALONE}"
        )
    return text


#: One process.
BY_ITSELF = Launch({})
