"""Other positions of S than random ones, as many of them: by a structure, or by what training does to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frodctl.formats.basis_file import BasisFile, open_basis, write_patterns

from .methods import basis_of
from .tasks import Checkpoint, Learner, Task, batches, learner

Indices = NDArray[np.int64]
Score = Callable[[Task, Checkpoint, BasisFile], dict[str, list[Tensor]]]
BLOCK = 16
CAP = 4  # times what a column or a row has on average
SEED = 7  # of warm-ups and of random choices
WARM_UP = 12  # steps
BATCHES = 8  # for gradients


def chosen(how: str) -> Callable[[Learner, Checkpoint], Path]:
    """A basis file with positions chosen so, for a learner's task."""

    def basis(model: Learner, checkpoint: Checkpoint) -> Path:
        return basis_for(model.task, checkpoint, how)

    return basis


@cache
def basis_for(task: Task, checkpoint: Checkpoint, how: str) -> Path:
    opened = open_basis(basis_of(checkpoint))
    counts = {category: indices.shape[1] for category, indices in opened.indices().items()}
    if how in STRUCTURES:
        indices = {category: STRUCTURES[how](opened.width(category), nnz) for category, nnz in counts.items()}
    elif how in DIRECTIONS:
        order, share = DIRECTIONS[how]
        orders = order(task, checkpoint, opened)
        indices = {category: within(orders[category], nnz, share) for category, nnz in counts.items()}
    else:
        score, cap = SCORES[how]
        scores = squares(task, checkpoint, opened, score)
        indices = {category: largest(scores[category], nnz, cap) for category, nnz in counts.items()}
    file = checkpoint.folder.with_name(f"{checkpoint.folder.name}-{task.name}-{how.replace(' ', '-')}.safetensors")
    write_patterns(opened, file, indices, {}, force=True)
    return file


# By structure


def off_diagonal(positions: Iterator[tuple[int, int]], nnz: int) -> Indices:
    """The first ones that are not of the diagonal."""
    found = sorted(islice((place for place in positions if place[0] != place[1]), nnz))
    return np.ascontiguousarray(np.array(found, dtype=np.int64).T)


def banded(n: int, nnz: int) -> Indices:
    """Those next to the diagonal."""
    offsets = chain.from_iterable((distance, -distance) for distance in count(1))
    return off_diagonal(((r, r + o) for o in offsets for r in range(n) if 0 <= r + o < n), nnz)


def blocks(n: int, nnz: int) -> Indices:
    """Whole blocks, at random."""
    side = n // BLOCK
    order = np.random.default_rng(SEED).permutation(side * side).tolist()
    cells = [(r, c) for r in range(BLOCK) for c in range(BLOCK)]
    corners = ((BLOCK * (block // side), BLOCK * (block % side)) for block in order)
    return off_diagonal(((top + r, left + c) for top, left in corners for r, c in cells), nnz)


def scattered(n: int, nnz: int) -> Indices:
    """At random, for the numbers of the diagonal too."""
    order = np.random.default_rng(SEED).permutation(n * n).tolist()
    return off_diagonal((divmod(place, n) for place in order), nnz + n)


STRUCTURES: dict[str, Callable[[int, int], Indices]] = {"banded": banded, "blocks": blocks, "S alone": scattered}


# On few directions


def within(order: NDArray[np.int64], nnz: int, share: float) -> Indices:
    """At random among the first of n directions, for their numbers and those of the λ' of the others."""
    n = len(order)
    directions = order[: round(share * n)]
    k = len(directions)
    places = np.random.default_rng(SEED).permutation(k * k).tolist()
    return off_diagonal(((directions[p // k], directions[p % k]) for p in places), nnz + n - k)


def shared_first(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, NDArray[np.int64]]:
    """As V has them, by ascending τ."""
    return {category: np.arange(basis.width(category)) for category in basis.indices()}


def shared_last(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, NDArray[np.int64]]:
    return {category: order[::-1] for category, order in shared_first(task, checkpoint, basis).items()}


def steepest_first(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, NDArray[np.int64]]:
    """By the squared gradient of a direction's row and column of S."""
    scores = squares(task, checkpoint, basis, gradients)
    return {c: (one.sum(0) + one.sum(1)).argsort(descending=True).numpy() for c, one in scores.items()}


Order = Callable[[Task, Checkpoint, BasisFile], dict[str, NDArray[np.int64]]]
DIRECTIONS: dict[str, tuple[Order, float]] = {
    "shared quarter": (shared_first, 1 / 4),
    "unshared quarter": (shared_last, 1 / 4),
    "steep quarter": (steepest_first, 1 / 4),
    "shared half": (shared_first, 1 / 2),
}


# By what training does


def squares(task: Task, checkpoint: Checkpoint, basis: BasisFile, score: Score) -> dict[str, Tensor]:
    """(Uᵀ X V)² of what a score finds, by category."""
    weights = target_weights(learner(task, checkpoint, SEED), basis)
    return by_category(basis, weights, score(task, checkpoint, basis))


def target_weights(model: Learner, basis: BasisFile) -> dict[str, Tensor]:
    """By the basis' names."""
    return {record.name: model.backbone.get_submodule(record.name).weight for record in basis.metadata.modules}


def gradients(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, list[Tensor]]:
    """∂L/∂W of a few batches, once the head has been trained."""
    model = warmed_up(task, checkpoint, [])
    weights = target_weights(model, basis)
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for batch in islice(batches(task, SEED + 1), BATCHES):
        for name, gradient in zip(weights, torch.autograd.grad(model(**batch)[0], list(weights.values())), strict=True):
            found[name].append(gradient)
    return found


def changes(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, list[Tensor]]:
    """W' − W after a short training of all targets."""
    model = learner(task, checkpoint, SEED)
    before = {name: weight.detach().clone() for name, weight in target_weights(model, basis).items()}
    after = target_weights(warmed_up(task, checkpoint, list(before)), basis)
    return {name: [after[name].detach() - weight] for name, weight in before.items()}


def principal(task: Task, checkpoint: Checkpoint, basis: BasisFile) -> dict[str, list[Tensor]]:
    """W at an eighth of its rank."""
    found = {}
    for name, weight in target_weights(learner(task, checkpoint, SEED), basis).items():
        U, values, V = torch.linalg.svd(weight.detach(), full_matrices=False)
        rank = len(values) // 8
        found[name] = [U[:, :rank] * values[:rank] @ V[:rank]]
    return found


def warmed_up(task: Task, checkpoint: Checkpoint, modules: list[str]) -> Learner:
    """A learner whose head and these modules were trained for a few steps."""
    model = learner(task, checkpoint, SEED)
    groups: list[dict[str, Any]] = []
    if not task.pretrained_head:
        groups.append({"params": [model.head.weight], "lr": task.head_rate})
    if modules:
        groups.append({"params": [model.backbone.get_submodule(name).weight for name in modules], "lr": 4e-4})
    if groups:
        optimizer = torch.optim.Adam(groups)
        for batch in islice(batches(task, SEED), WARM_UP):
            model.zero_grad()
            model(**batch)[0].backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def by_category(basis: BasisFile, weights: dict[str, Tensor], found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """(Uᵀ X V)², summed over what was found and over a category's layers."""
    sums: dict[str, Tensor] = {}
    for record in basis.metadata.modules:
        V = torch.from_numpy(basis.tensor(f"V.{record.category}").astype(np.float64))
        B = weights[record.name].double() @ torch.linalg.inv(V).T
        U = B / B.norm(dim=0).clamp(min=1e-12)
        for X in found[record.name]:
            square = (U.T @ X.double() @ V).square()
            sums[record.category] = square + sums.get(record.category, torch.zeros_like(square))
    return sums


def largest(score: Tensor, nnz: int, cap: int | None) -> Indices:
    """Off-diagonal, and no more of a column or a row than a multiple of what it would have on average."""
    n = len(score)
    most = n if cap is None else cap * -(-nnz // n)
    rows, columns = np.zeros(n, int), np.zeros(n, int)

    def free() -> Iterator[tuple[int, int]]:
        for place in score.flatten().argsort(descending=True).tolist():
            r, c = divmod(place, n)
            if r != c and rows[r] < most and columns[c] < most:
                rows[r] += 1
                columns[c] += 1
                yield r, c

    return off_diagonal(free(), nnz)


SCORES: dict[str, tuple[Score, int | None]] = {
    "gradient capped": (gradients, CAP),
    "warm-up capped": (changes, CAP),
    "low rank": (principal, CAP),
}
