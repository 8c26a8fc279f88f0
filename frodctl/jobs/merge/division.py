"""Which of several ranks makes which tensors of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from frodctl.adapted.matching import Weight
from frodctl.jobs.merge.plan import MergePlan, flops
from frodctl.method import cost
from frodctl.method.ranks import divided, shares


def names_of_ranks(plan: MergePlan, count: int) -> list[set[str]]:
    """By rank the names of its tensors in the output, or of slices that are written by themselves.

    Weights of one category stay together as far as that is as fast: whoever has one of them makes its basis ready.
    Tensors that are copied or replaced go where the fewest bytes of them are.
    """
    names: list[set[str]] = [set() for _ in range(count)]
    groups: dict[object, list[Weight]] = {}
    for weight in plan.weights:
        groups.setdefault(weight.group, []).append(weight)
    division = divided([_seconds(weights) for weights in groups.values()], count)
    for weights, members in zip(groups.values(), division, strict=True):
        for rank, own in zip(members, shares(len(weights), len(members)), strict=True):
            names[rank].update(plan.name(weights[i]) for i in own)
    sizes = {name: info.nbytes for name, info in plan.copied.items()}
    sizes |= {name: info.nbytes for name, (_, info) in plan.replaced.items()}
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        names[rank].add(name)
    return names


def _seconds(weights: Sequence[Weight]) -> Callable[[int], float]:
    """Operations of so many ranks, each of which inverts V."""
    n, parts = weights[0].target.n, len(weights[0].parts)
    inverse = parts * cost.FLOPS["inverse"](n)

    def seconds(ranks: int) -> float:
        most = -(-len(weights) // min(ranks, len(weights)))
        return inverse + max(sum(map(flops, weights[i : i + most])) for i in range(0, len(weights), most))

    return seconds
