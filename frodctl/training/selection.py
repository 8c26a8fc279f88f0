"""Choosing the positions of S by the gradient, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frodctl import values
from frodctl.arrays import from_torch
from frodctl.checkpoint import names, sink
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.basis_file import check_name, open_basis, write_patterns
from frodctl.training.attached import Attached, frod_layers, require_attachment, updates_of
from frodctl.training.layer import FrodLinear, Pattern, Update, is_transposed

_ROWS = 1 << 12  # tokens whose gradients are multiplied at a time


def loss_of_batch(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    """``model(**batch).loss``, as transformers' models have it."""
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"`batches`: one of them is a {type(batch).__name__}; give mappings of the model's arguments, or `loss`"
        )
    output = model(**batch)
    if not hasattr(output, "loss"):
        raise UsageError(
            f"`loss`: {type(model).__name__} returns a {type(output).__name__} without one; give a function"
        )
    loss: Tensor = output.loss
    return loss


def select_pattern(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] = loss_of_batch,
    output: str | Path | None = None,
    force: bool = False,
) -> dict[str, Tensor]:
    """Train S where the loss is steepest, instead of at random positions.

    The gradient with respect to all n² entries of a layer's S is Uᵀ (∂L/∂W) V. Its squares are added up over batches
    and over the layers of a category, which share their positions; as many off-diagonal ones as the active adapter
    trains are kept, those with the largest sums. Nothing is trained, and the optimizer's parameters stay the same
    objects. Takes n² float32 numbers of memory a category. In distributed training the processes' sums are added, so
    that all choose the same positions.

    The positions are saved with the adapter; with ``output`` in a basis file of their own, for further runs (and for
    resuming one: attach that file, and do not select again).

    Parameters
    ----------
    model : Module
        With an adapter attached and not trained yet. It runs in the mode (train, eval) that it is in.
    batches : iterable
        A few batches of the training data, on the model's device.
    loss : callable
        ``loss(model, batch)``, a scalar Tensor; by default ``model(**batch).loss``.
    output : path, optional
        Write the shared-basis file with these positions as ``indices.{category}``.
    force : bool
        Replace an existing output.

    Returns
    -------
    dict of str to Tensor
        The positions by category, (2, nnz) int64, by rows.

    Raises
    ------
    UsageError
        Nothing is attached, S or λ' have moved already, there is no batch, a batch has no loss, or the output exists.
    InvalidInput
        A gradient is NaN or Inf.

    Examples
    --------
    >>> model = frodctl.attach(model, "my-model.frod.safetensors")  # doctest: +SKIP
    >>> frodctl.select_pattern(model, itertools.islice(loader, 16))  # doctest: +SKIP
    """
    require_batches(batches, loss)
    force = values.flag(force, "force")
    output = None if output is None else values.path(output, "output")
    attachment = require_attachment(model)
    attached = attachment.adapters[attachment.active]
    updates = whole_updates(model, attached)
    for path, update in updates.items():
        if update.delta.any() or update.values.any():
            raise UsageError(f"{path}: trained already; select the pattern right after attach")
    if output is not None and attached.basis.aliases:
        raise UsageError(
            f"{attached.basis.path}: holds its basis itself; load it with the basis file (`basis`) for `output`"
        )
    if output is not None:
        sink.check_output_file(output, [attached.basis.path], force=force)
        check_name(output)
    counts = {update.basis.category: update.pattern.nnz for update in updates.values()}
    indices = _steepest(gradient_squares(model, attached, updates, batches, loss), counts)
    attached = replace(attached, seed=None, selected=True)
    if output is not None:
        arrays = {category: from_torch(positions) for category, positions in indices.items()}
        write_patterns(attached.basis, output, arrays, attached.sparsity, force=force)
        attached = replace(attached, basis=open_basis(output), selected=False)
    exchange(updates.values(), indices)
    attachment.adapters[attachment.active] = attached
    return indices


def require_batches(batches: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> None:
    """`UsageError` where these are no batches, or no loss."""
    one = isinstance(batches, Mapping | Tensor | str | bytes)
    values.require(
        isinstance(batches, Iterable) and not one, "batches", batches, "expected a list of batches, or a loader"
    )
    values.require(callable(loss), "loss", loss, "expected a function of the model and a batch")


def whole_updates(model: nn.Module, attached: Attached) -> dict[str, Update]:
    """The updates of the active adapter, by module; `UsageError` where not each is that of one whole layer."""
    for module, places in attached.places.items():
        if places[0].expert is not None:
            raise UsageError(
                f"{module}: is one of a layer's experts, whose gradient is never formed as a whole, so that no pattern "
                "can be selected; leave experts out as you attach (`exclude_modules`)"
            )
        if len(places) > 1 or places[0].rows is not None:
            raise UsageError(
                f"{module}: {places[0].path} has rows of it, or of others too, for which no pattern can "
                "be selected; leave them out as you attach (`exclude_modules`)"
            )
    active = require_attachment(model).active
    return {name: update for name, update in updates_of(model, active).items() if isinstance(update, Update)}


def gradient_squares(
    model: nn.Module,
    attached: Attached,
    updates: Mapping[str, Update],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
) -> dict[str, Tensor]:
    """By category the squares of the gradients of S (n, n), summed over batches and layers; float32."""
    scores: dict[str, Tensor] = {}
    leaves = [update.delta for update in updates.values()]
    count = 0
    try:
        with _recording(_layers(model, attached, updates), scores), torch.enable_grad():
            for batch in batches:
                _scalar(loss(model, batch)).backward(inputs=leaves)
                count += 1
    finally:
        for leaf in leaves:
            leaf.grad = None
    if not count:
        raise UsageError("there is no batch to take gradients of")
    for path, update in updates.items():
        if update.basis.category not in scores:
            raise UsageError(f"{path}: the loss does not depend on it, nor on the others of its category")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for category in sorted(scores):
            torch.distributed.all_reduce(scores[category])
    for category, score in scores.items():
        if not torch.isfinite(score).all():
            raise InvalidInput(f"{category}: a gradient is NaN or Inf")
    return scores


def _layers(model: nn.Module, attached: Attached, updates: Mapping[str, Update]) -> list[tuple[FrodLinear, Update]]:
    """The layers with their updates."""
    layers = {names.unwrapped(path): layer for path, layer in frod_layers(model).items()}
    return [(layers[names.unwrapped(attached.places[name][0].path)], update) for name, update in updates.items()]


def _scalar(value: object) -> Tensor:
    if isinstance(value, Tensor) and value.requires_grad and value.numel() == 1:
        return value
    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise UsageError(
        f"the loss of a batch is {found}, not a scalar with a gradient; give batches with labels, or `loss`"
    )


@contextmanager
def _recording(layers: Sequence[tuple[FrodLinear, Update]], scores: dict[str, Tensor]) -> Iterator[None]:
    """Within it all layers go by the input, and backward passes add to the scores."""

    def shifted(update: Update, x: Tensor) -> Tensor:
        found: Tensor = _Observed.apply(Update.shifted(update, x), x, update, scores)  # type: ignore[no-untyped-call]
        return found

    def weight(update: Update, base: nn.Module) -> Tensor:
        W = Update.weight(update, base)
        found: Tensor = _ObservedWeight.apply(  # type: ignore[no-untyped-call]
            W, base.weight, update, is_transposed(base), scores
        )
        return found

    forms = [update.form for _, update in layers]
    try:
        for _, update in layers:
            update.form = "input"
            update.__dict__["shifted"], update.__dict__["weight"] = partial(shifted, update), partial(weight, update)
        yield
    finally:
        for (_, update), form in zip(layers, forms, strict=True):
            for name in ("shifted", "weight"):
                update.__dict__.pop(name, None)
            update.form = form


class _Observed(torch.autograd.Function):
    """x', what W is given for x. As the gradient g comes back to it, diag(λ)⁻¹ (g D)ᵀ (x V) = Uᵀ (∂L/∂W') V is squared
    and added.
    """

    @staticmethod
    def forward(ctx: Any, shifted: Tensor, x: Tensor, update: Update, scores: dict[str, Tensor]) -> Tensor:
        ctx.update, ctx.scores = update, scores
        ctx.save_for_backward(x)
        return shifted.view_as(shifted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        basis, (gradient,) = ctx.update.basis, gradients
        V, D = basis.V, basis.D
        total = torch.zeros(basis.n, basis.n, device=V.device)
        rows = zip(_split(gradient), _split(x), strict=True)
        with torch.autocast(V.device.type, enabled=False):
            for g, inputs in rows:
                total += (g.to(V) @ D).T @ (inputs.to(V) @ V)
        _add_squares(ctx.scores, ctx.update, total)
        return gradient, None, None, None


class _ObservedWeight(torch.autograd.Function):
    """W', where the model multiplies by it. As ∂L/∂W' comes back, Uᵀ (∂L/∂W') V is squared and added."""

    @staticmethod
    def forward(
        ctx: Any, trained: Tensor, W: Tensor, update: Update, transposed: bool, scores: dict[str, Tensor]
    ) -> Tensor:
        ctx.update, ctx.transposed, ctx.scores = update, transposed, scores
        ctx.save_for_backward(W)
        return trained.view_as(trained)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        V, D = ctx.update.basis.V, ctx.update.basis.D
        W, G = (tensor.T if ctx.transposed else tensor for tensor in (W, gradients[0]))
        with torch.autocast(V.device.type, enabled=False):
            total = ((W.to(V) @ D).T @ (G.to(V) @ V)).float()
        _add_squares(ctx.scores, ctx.update, total)
        return gradients[0], None, None, None, None


def _add_squares(scores: dict[str, Tensor], update: Update, gradient: Tensor) -> None:
    """Add the squares of diag(λ)⁻¹ ``gradient`` (n, n) to the category's sums."""
    squares = gradient.mul_(update.inverse_scales[:, None]).square_()
    category = update.basis.category
    if category in scores:
        scores[category] += squares.to(scores[category])
    else:
        scores[category] = squares


def _split(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.reshape(-1, x.shape[-1]), _ROWS)


def _steepest(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """So many off-diagonal positions with the largest scores, by rows."""
    indices = {}
    for category, score in scores.items():
        score.fill_diagonal_(-1)
        flat = score.flatten().topk(counts[category]).indices.sort().values.cpu()
        indices[category] = torch.stack([flat // len(score), flat % len(score)])
    return indices


def exchange(updates: Iterable[Update], indices: Mapping[str, Tensor]) -> None:
    """Give the updates these positions; those that shared a pattern share the new one."""
    made: dict[int, Pattern] = {}
    for update in updates:
        old = update.pattern
        if id(old) not in made:
            made[id(old)] = Pattern(from_torch(indices[update.basis.category]), update.basis.n, old.rows.device)
        update.pattern = made[id(old)]
