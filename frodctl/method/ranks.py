"""Processes that share the layers of a computation among them; in most runs there is one, which has them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from frodctl.arrays import Array

T = TypeVar("T")


class Ranks(Protocol):
    """The processes, and which of them this one is. All of them call the same methods in the same order."""

    @property
    def number(self) -> int:
        """This process's, from 0, which leads."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def own(self, count: int) -> range:
        """Which of so many layers are this process's: neighbours, as many as every other's, or one more."""
        ...

    def sum(self, X: Array) -> Array:
        """X, replaced by the sum of everybody's; contiguous, and of one shape and dtype everywhere."""
        ...

    def largest(self, x: float) -> float:
        """The largest of everybody's; infinity where any is NaN."""
        ...

    def share(self, values: Sequence[Any] | None, source: int = 0) -> list[Any]:
        """The values, arrays or small things, that one process gives to all."""
        ...

    def gather(self, value: T) -> list[T]:
        """Everybody's value, a small one, by number; nobody goes on before all are here."""
        ...


class Alone:
    """One process, which has nobody to speak to. See `Ranks`."""

    number = 0
    count = 1

    def own(self, count: int) -> range:
        return range(count)

    def sum(self, X: Array) -> Array:
        return X

    def largest(self, x: float) -> float:
        return x

    def share(self, values: Sequence[Any] | None, source: int = 0) -> list[Any]:
        assert values is not None
        return list(values)

    def gather(self, value: T) -> list[T]:
        return [value]

    def group(self, members: Sequence[int]) -> Ranks:
        return self


ALONE = Alone()


def shares(items: int, count: int) -> list[range]:
    """So many items for so many ranks: neighbours, as many for each, or one more."""
    return [range(items * i // count, items * (i + 1) // count) for i in range(count)]


def divided(seconds: Sequence[Callable[[int], float]], count: int) -> tuple[tuple[int, ...], ...]:
    """Which of ``count`` ranks do each task together, so that the last is done as early as can be.

    Parameters
    ----------
    seconds : sequence of callables
        By task, how long so many ranks take over it together, in any unit; more ranks take no longer.
    count : int
        How many ranks there are.

    Returns
    -------
    tuple of tuples
        By task the numbers of its ranks, ascending. In every one of them the longest task comes first.
    """
    limits = sorted({task(ranks) for task in seconds for ranks in _to(count)}, reverse=True)  # the fewest ranks first
    plans = [_scheduled(seconds, count, limit) for limit in limits]
    return min(plans, key=lambda plan: plan[0], default=(0.0, ()))[1]


def _scheduled(
    seconds: Sequence[Callable[[int], float]], count: int, limit: float
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Each task by the fewest ranks that do it within a limit, or soonest; and when the last is done."""
    sizes = [min(_to(count), key=lambda ranks: max(task(ranks), limit)) for task in seconds]
    ends, chosen = [0.0] * count, dict[int, tuple[int, ...]]()
    for i in sorted(range(len(sizes)), key=lambda i: -seconds[i](sizes[i])):
        chosen[i] = tuple(sorted(sorted(range(count), key=ends.__getitem__)[: sizes[i]]))
        end = max(ends[rank] for rank in chosen[i]) + seconds[i](sizes[i])
        for rank in chosen[i]:
            ends[rank] = end
    return max(ends), tuple(chosen[i] for i in range(len(sizes)))


def _to(count: int) -> range:
    return range(1, count + 1)
