"""Positions of S that move while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from frodctl import values
from frodctl.errors import UsageError
from frodctl.training.attached import require_attachment
from frodctl.training.layer import Update
from frodctl.training.selection import exchange, gradient_squares, loss_of_batch, require_batches, whole_updates

#: What torch's optimizers call their means of squared gradients, by which a step is divided.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def reallocate(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    share: float = 0.1,
    loss: Callable[[Any, Any], Tensor] = loss_of_batch,
) -> dict[str, Tensor]:
    """Move the positions of S that matter least to where the loss is steepest, in the middle of training.

    Of each category's positions, which its layers share, a share is given up: those with the smallest Σ S[r, c]² ‖v_c‖²
    over the layers, which is what ΔW loses. As many others are taken, off the diagonal, where the squares of the
    gradient Uᵀ (∂L/∂W') V, summed over batches and layers, are largest; there S begins with 0. So the number of
    trained values stays the same, and so do the parameters, in which they keep the order of rows. Call it between an
    optimizer's step and the next backward pass: gradients that are there are thrown away.

    In the optimizer's state the values that stay keep their moments. The new ones begin with a first moment of 0, and
    with a second one that is the mean of those that stay, lest Adam's first step there be three times its rate.
    Learning rates are left alone.

    The positions are the adapter's own from then on, and saved with it. Go on from a saved one by `load_adapter`:
    a checkpoint of transformers' Trainer, resumed over the basis file, would put the values at that file's positions.

    Parameters
    ----------
    model : Module
        With an adapter attached. It runs in the mode (train, eval) that it is in.
    batches : iterable
        A few batches of the training data, on the model's device. In distributed training the gradients' squares are
        added up over the processes, all of which must call this.
    optimizer : Optimizer
        That trains S.
    share : float
        Of the positions, above 0 and at most 1.
    loss : callable
        ``loss(model, batch)``, a scalar Tensor; by default ``model(**batch).loss``.

    Returns
    -------
    dict of str to Tensor
        The positions by category, (2, nnz) int64, by rows.

    Raises
    ------
    UsageError
        Nothing is attached, the optimizer does not train S or the numbers are sharded, there is no batch, or a batch
        has no loss.
    InvalidInput
        A gradient is NaN or Inf.

    Examples
    --------
    >>> if step % 100 == 0:  # doctest: +SKIP
    ...     frodctl.reallocate(model, itertools.islice(loader, 4), optimizer)
    """
    require_batches(batches, loss)
    share = values.share(share, "share", above=0, at_most=1)
    values.require(isinstance(optimizer, torch.optim.Optimizer), "optimizer", optimizer, "expected torch's")
    attachment = require_attachment(model)
    attached = attachment.adapters[attachment.active]
    updates = whole_updates(model, attached)
    _require_trained(updates, optimizer)
    scores = gradient_squares(model, attached, updates, batches, loss)
    indices, sources = {}, {}
    for category, score in scores.items():
        alike = [update for update in updates.values() if update.basis.category == category]
        indices[category], sources[category] = _moved(alike, score, share)
    for update in updates.values():
        _move(update, sources[update.basis.category], optimizer)
    exchange(updates.values(), indices)
    attachment.adapters[attachment.active] = replace(attached, seed=None, selected=True)
    return indices


def _require_trained(updates: Mapping[str, Update], optimizer: torch.optim.Optimizer) -> None:
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for path, update in updates.items():
        if update.values.shape != (update.pattern.nnz,) or hasattr(update.values, "full_tensor"):
            raise UsageError(f"{path}: its values of S are sharded, and positions move only where they are whole")
        if update.values.numel() and id(update.values) not in taken:
            raise UsageError(f"{path}: `optimizer` does not train its values of S; give the one that does")


@torch.no_grad()
def _moved(alike: list[Update], score: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The new positions of the layers of a category, by rows, and at which of the old ones each is: -1 for none."""
    n, pattern = len(score), alike[0].pattern
    old = pattern.indices().to(score.device)
    flat = old[0] * n + old[1]
    lengths = alike[0].basis.V.to(score).square().sum(dim=0)[old[1]]
    weights = sum(update.values.to(score).square() for update in alike) * lengths
    count = min(round(share * len(flat)), n * n - n - len(flat))
    stay = weights.topk(len(flat) - count).indices
    score.fill_diagonal_(-1)
    score.view(-1)[flat] = -1
    found = torch.cat([flat[stay], score.view(-1).topk(count).indices])
    source = torch.cat([stay, torch.full_like(found[len(stay) :], -1)])
    order = found.argsort()
    found = found[order].cpu()
    return torch.stack([found // n, found % n]), source[order]


@torch.no_grad()
def _move(update: Update, source: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Bring values and moments to where their positions are now."""
    parameter = update.values
    source = source.to(parameter.device)
    stays = source >= 0

    def moved(tensor: Tensor, new: Tensor | float) -> None:
        tensor.copy_(torch.where(stays, tensor[source], new))

    moved(parameter, 0.0)
    for name, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, Tensor) and state.shape == parameter.shape:
            moved(state, state[source[stays]].mean().nan_to_num() if name in _SECOND_MOMENTS else 0.0)
    update.delta.grad = parameter.grad = None
    update.waiting.clear()
    update.kept.clear()
