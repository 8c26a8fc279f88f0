"""Threads beside the caller's: what they do is in order, bounded, and over when the caller stops."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from frodctl.errors import InvalidInput
from frodctl.pipeline import AHEAD, Workers, in_order, pause, within


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frodctl")]


class Item:
    """What a task makes, as large as can be."""


class Counted:
    """Tasks that know how many of them were begun, and how many results are alive."""

    def __init__(self, number: int, failing: int | None = None) -> None:
        self.tasks = [partial(self._do, i, i == failing) for i in range(number)]
        self.begun: list[int] = []
        self._made: list[weakref.ref[Item]] = []

    def _do(self, i: int, fails: bool) -> Item:
        self.begun.append(i)
        if fails:
            raise InvalidInput(f"number {i}")
        item = Item()
        self._made.append(weakref.ref(item))
        return item

    @property
    def alive(self) -> int:
        return sum(made() is not None for made in list(self._made))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1, AHEAD, 9])
@pytest.mark.parametrize("number", [0, 1, 3, 50])
def test_results_come_in_order(number: int, ahead: int, count: int) -> None:
    tasks = [partial(pow, i, 2) for i in range(number)]
    assert list(in_order(tasks, ahead=ahead, count=count)) == [i * i for i in range(number)]
    assert list(in_order(iter(tasks), ahead=ahead, count=count)) == [i * i for i in range(number)]


@pytest.mark.parametrize("ahead", [0, 1, AHEAD, 9])
def test_as_many_results_are_alive_as_the_caller_counts_on(ahead: int) -> None:
    """The one in use and those ahead of it: a buffer is used again only when the caller is done with it."""
    counted = Counted(50)
    most = 0
    for number, item in enumerate(in_order(counted.tasks, ahead=ahead)):
        assert len(counted.begun) <= number + 1 + ahead
        most = max(most, counted.alive)
        del item
    assert most <= ahead + 1
    assert counted.begun == list(range(50))


def test_several_are_done_at_a_time() -> None:
    together = threading.Barrier(3, timeout=60)
    found = list(in_order([together.wait] * 9, ahead=3, count=3))
    assert sorted(found) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_each_thread_is_prepared() -> None:
    own = threading.local()

    def prepare() -> None:
        own.value = 7

    assert list(in_order([lambda: own.value] * 20, count=3, ahead=6, prepare=prepare)) == [7] * 20
    assert not hasattr(own, "value")


@pytest.mark.parametrize("failing", [0, 2, 9])
def test_an_error_is_raised_in_its_place_and_ends_all(failing: int) -> None:
    counted = Counted(10, failing)
    results = in_order(counted.tasks)
    for _ in range(failing):
        next(results)
    with pytest.raises(InvalidInput, match=f"number {failing}"):
        next(results)
    assert counted.begun == list(range(failing + 1))
    with pytest.raises(StopIteration):
        next(results)


def test_the_first_error_counts_among_several_threads() -> None:
    def fail(i: int) -> None:
        raise InvalidInput(f"number {i}")

    with pytest.raises(InvalidInput, match="number 0"):
        list(in_order([partial(fail, i) for i in range(30)], count=4, ahead=8))


def test_an_error_in_making_the_tasks_ends_all() -> None:
    def tasks() -> Iterator[Callable[[], int]]:
        yield lambda: 1
        raise InvalidInput("no more")

    with pytest.raises(InvalidInput, match="no more"):
        list(in_order(tasks()))


@pytest.mark.parametrize("taken", [0, 1, 2, 20])
@pytest.mark.parametrize("count", [1, 3])
def test_closing_it_ends_the_threads(taken: int, count: int) -> None:
    counted = Counted(100)
    results = in_order(counted.tasks, count=count)
    for _ in range(taken):
        next(results)
    results.close()
    begun = len(counted.begun)
    assert begun <= taken + AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frodctl")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_goes_wrong_in_the_loop_ends_the_threads(error: type[BaseException]) -> None:
    counted = Counted(100)

    def loop() -> None:
        for number, _ in enumerate(in_order(counted.tasks)):
            if number == 3:
                raise error("here")

    with pytest.raises(error, match="here"):
        loop()
    assert len(counted.begun) <= 4 + AHEAD


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to threads on POSIX alone")
def test_an_interrupt_while_the_caller_waits_ends_the_threads() -> None:
    counted = Counted(100)
    handled = threading.Event()

    def interrupting(task: Callable[[], Item]) -> Item:
        if len(counted.begun) == 1:  # the thread's start is over
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert handled.wait(60)
        return task()

    def handler(*_: object) -> None:
        handled.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(in_order([partial(interrupting, task) for task in counted.tasks]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert 2 <= len(counted.begun) <= 2 + AHEAD


def test_a_task_that_pauses_ends_when_nobody_takes_its_result() -> None:
    """However long it would have waited; one without a pool around it simply waits."""
    pause(0.0)
    begun = threading.Event()

    def endless() -> None:
        begun.set()
        while True:
            pause(1e6)

    with Workers[None]() as workers:
        workers.add(endless)
        assert begun.wait(60)


def test_a_pause_does_not_end_what_is_waited_for() -> None:
    def some() -> int:
        pause()
        pause(0.001)
        return 5

    with Workers[int](2) as workers:
        for _ in range(3):
            workers.add(some)
        assert [workers.take() for _ in range(3)] == [5] * 3


def test_a_process_ends_though_an_iteration_is_open() -> None:
    code = """
from frodctl.pipeline import in_order
results = in_order([int] * 1000, count=2)
next(results)
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in done.stderr


class TestBehind:
    def test_all_is_done_in_order(self) -> None:
        done: list[int] = []
        with Workers[None]() as workers:
            for i in range(50):
                workers.add(partial(done.append, i))
            workers.finish()
            assert done == list(range(50))
            assert len(workers) == 0

    def test_an_error_comes_when_its_turn_does_and_nothing_after_it_is_done(self) -> None:
        counted = Counted(10, failing=4)
        with Workers[Item]() as workers:
            for task in counted.tasks:
                workers.add(task)
            with pytest.raises(InvalidInput, match="number 4"):
                workers.finish()
        assert counted.begun == [0, 1, 2, 3, 4]

    def test_what_was_not_begun_is_dropped(self) -> None:
        begun, done = threading.Event(), list[int]()

        def until_the_end() -> None:
            begun.set()
            with suppress(RuntimeError):  # which says that the threads are to end
                while True:
                    workers.add(partial(done.append, 1))
            done.append(0)

        def leave() -> None:
            with workers:
                workers.add(until_the_end)
                assert begun.wait(60)
                raise ValueError("here")

        workers = Workers[None]()
        with pytest.raises(ValueError, match="here"):
            leave()
        assert done == [0]


def test_a_task_that_never_ends_is_left_behind() -> None:
    """And does not keep the process from ending."""
    assert within(10, lambda: 3) == 3
    with pytest.raises(InvalidInput):
        within(10, partial(Counted(1, failing=0)._do, 0, True))
    program = "import threading; from frodctl.pipeline import within; within(0.1, threading.Event().wait)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.splitlines()[-1].startswith("TimeoutError")
