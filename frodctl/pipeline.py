"""Work in threads beside the caller's: ahead of it, as in reading, or behind it, as in writing.

All is begun in the order given. Results and errors come to the caller's thread; after an error, or once the caller
stops, nothing more is begun.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

#: Results that are made, or wait, while the caller uses one.
AHEAD = 2

T = TypeVar("T")
_thread = threading.local()


class Workers(Generic[T]):
    """Threads for a ``with`` block: they have ended after it, and what they had not begun is dropped.

    Parameters
    ----------
    count : int
        Threads.
    prepare : callable, optional
        Called first in each of them.
    """

    def __init__(self, count: int = 1, prepare: Callable[[], object] | None = None) -> None:
        self._pool = ThreadPoolExecutor(count, "frodctl", prepare)
        self._waiting: deque[Future[T]] = deque()
        self._stopped = False
        self._left = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._left.set()
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """Tasks whose results were not taken yet."""
        return len(self._waiting)

    def add(self, task: Callable[[], T]) -> None:
        """Have a task done after those before."""
        self._waiting.append(self._pool.submit(self._do, task))

    def take(self) -> T:
        """The result of the first task that is left, waited for; raises what the task raised."""
        return self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all that is left; raises what the first of them to fail raised."""
        while self._waiting:
            self.take()

    def _do(self, task: Callable[[], T]) -> T:
        if self._stopped:
            raise CancelledError
        _thread.left = self._left
        try:
            return task()
        except BaseException:
            self._stopped = True
            raise


def pause(seconds: float = 0.0) -> None:
    """Wait within a task, or not at all; raises `CancelledError` once nobody is left to take the task's result.

    A task that takes long calls it now and then, so that the caller need not wait for its end.
    """
    left: threading.Event | None = getattr(_thread, "left", None)
    if left is None:
        time.sleep(seconds)
    elif left.wait(seconds):
        raise CancelledError


def within(seconds: float, task: Callable[[], T]) -> T:
    """The result of a task that may never end: after so many seconds `TimeoutError`, and its thread is left behind."""
    found: Future[T] = Future()

    def do() -> None:
        try:
            found.set_result(task())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return found.result(seconds)


def in_order(
    tasks: Iterable[Callable[[], T]],
    *,
    ahead: int = AHEAD,
    count: int = 1,
    prepare: Callable[[], object] | None = None,
) -> Generator[T, None, None]:
    """Yield each task's result in order, computed by threads that stay ahead of the caller.

    A task is begun only when the caller is done with the result ``ahead + 1`` places before, so that as many buffers
    are enough. Leaving the iteration, or closing it, ends the threads.

    Parameters
    ----------
    tasks : iterable of callables
        Taken one by one, in the caller's thread.
    ahead : int
        Results that are made, or wait, while the caller uses one.
    count, prepare
        As for `Workers`.

    Yields
    ------
    Each task's result; an exception in a task is raised in its place.
    """
    with Workers[T](count, prepare) as workers:
        for task in tasks:
            workers.add(task)
            if len(workers) > ahead:
                yield workers.take()
        while len(workers):
            yield workers.take()
