"""What a step of training costs in operations and in bytes, by the forms of its layers, before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch import nn

from frodctl import values
from frodctl.checkpoint.experts import experts_per_token
from frodctl.errors import InvalidInput
from frodctl.method.step_cost import Shape, full_flops, input_flops, lora_flops, weight_flops
from frodctl.training.attached import frod_layers, require_attachment
from frodctl.training.experts import OUTPUT, ExpertsUpdate, FrodExperts, Part, as_linear
from frodctl.training.layer import Basis, Update, in_features, is_dense, out_features

LORA_RANK = 16
WAYS = ("input", "weight", "weight+U", f"LoRA, r = {LORA_RANK}", "full")
_TRAINED = 3  # numbers held for each one that is trained: its gradient and Adam's moments


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of the adapter's layers in one way; bytes are what is held beside the base's weights."""

    way: str  #: a form of `frodctl.attach`, or another method to compare with
    flops: float
    basis_bytes: int = 0  #: V and D
    weight_bytes: int = 0  #: W'
    dual_bytes: int = 0  #: W D = U diag(λ)
    waiting_bytes: int = 0  #: ∂L/∂W' while micro-batches add up
    trained_bytes: int = 0  #: gradients and Adam's moments
    input_bytes: int = 0  #: of activations kept for the backward pass, where no two layers share theirs

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(astuple(self)[2:])


@dataclass(frozen=True)
class _Layer:
    shape: Shape
    itemsize: int  #: of W
    trained: int  #: numbers
    dense: bool


def step_costs(model: nn.Module, tokens: int | str, *, micro_batches: int | str = 1) -> list[StepCost]:
    """What one optimizer step costs in each form, by LoRA and by full fine-tuning; from shapes alone.

    Only the layers of the active adapter are counted: attention, norms and heads cost the same whatever is trained.

    Parameters
    ----------
    model : Module
        With an adapter attached.
    tokens : int
        In all micro-batches of a step together, padding included.
    micro_batches : int
        Backward passes in a step; all but the last in `frodctl.accumulating`, or under transformers' Trainer.

    Returns
    -------
    list of StepCost
        ``input``, ``weight``, ``weight+U``, ``LoRA, r = 16``, ``full``. Layers that are not dense, and experts,
        are counted by their input in every form.

    Raises
    ------
    UsageError
        Nothing is attached, or a count is not positive.
    InvalidInput
        There are experts, and their config does not say how many of them a token has.
    """
    attachment = require_attachment(model)
    tokens, passes = values.count(tokens, "tokens"), values.count(micro_batches, "micro_batches")
    layers = list(_layers(model, attachment.active))
    bases = {id(module): module for module in model.modules() if isinstance(module, Basis)}
    basis_bytes = sum(2 * basis.V.nbytes for basis in bases.values())
    costs = []
    for way in WAYS:
        parts = zip(*(astuple(_of_layer(way, layer, tokens, passes))[1:] for layer in layers), strict=True)
        cost = StepCost(way, *map(sum, parts))
        costs.append(replace(cost, basis_bytes=basis_bytes) if way in WAYS[:3] else cost)
    return costs


def _of_layer(way: str, layer: _Layer, tokens: int, passes: int) -> StepCost:
    """All but what is shared."""
    shape = layer.shape
    inputs = tokens * shape.chosen * shape.n * layer.itemsize // passes
    matrix = shape.m * shape.n * layer.itemsize * shape.experts
    if way == "full":
        return StepCost(way, full_flops(shape, tokens), trained_bytes=_TRAINED * matrix, input_bytes=inputs)
    if way.startswith("LoRA"):
        trained = _TRAINED * 4 * LORA_RANK * (shape.m + shape.n) * shape.experts
        return StepCost(way, lora_flops(shape, tokens, LORA_RANK), trained_bytes=trained, input_bytes=inputs)
    trained = _TRAINED * 4 * layer.trained
    if way == "input" or not layer.dense:
        return StepCost(way, input_flops(shape, tokens), trained_bytes=trained, input_bytes=inputs)
    keeps_U = way == "weight+U"
    return StepCost(
        way,
        weight_flops(shape, tokens, keeps_U=keeps_U),
        weight_bytes=matrix,
        dual_bytes=matrix if keeps_U else 0,
        waiting_bytes=shape.m * shape.n * max(layer.itemsize, 4) if passes > 1 else 0,
        trained_bytes=trained,
        input_bytes=inputs,
    )


def _layers(model: nn.Module, adapter_name: str) -> Iterator[_Layer]:
    for layer in frod_layers(model).values():
        update = layer.update(adapter_name)
        if update is not None:
            yield _layer(layer.base_layer, update)
        if isinstance(layer, FrodExperts):
            yield from _experts(layer.base_layer, layer.stacks(adapter_name))


def _layer(base: nn.Module, update: Update) -> _Layer:
    weight: Any = getattr(base, "weight", None)
    dense, n = is_dense(base), update.basis.n
    m = out_features(base) if dense else int(getattr(base, "out_features", in_features(base) or n))
    on_gpu, readers = update.basis.V.device.type != "cpu", update.projection.layers
    shape = Shape(m, n, update.pattern.nnz + n, on_gpu, readers)
    itemsize = weight.itemsize if dense else update.basis.V.itemsize
    return _Layer(shape, itemsize, update.pattern.nnz + n, dense)


def _experts(base: Any, stacks: list[tuple[Part, ExpertsUpdate]]) -> Iterator[_Layer]:
    chosen = experts_per_token(base.config.to_dict())
    if chosen is None:
        raise InvalidInput(f"{type(base).__name__}: its config does not say how many experts a token has")
    for part, update in stacks:
        weight = as_linear(base, part, 0).weight
        m, n = weight.shape
        shape = Shape(
            m,
            n,
            update.pattern.nnz + n,
            dense=update.basis.V.device.type != "cpu",
            readers=sum(other.parameter == part.parameter and u.rotation == update.rotation for other, u in stacks),
            experts=base.num_experts,
            chosen=chosen,
            own_input=part.parameter == OUTPUT,
            in_rows=part.rows is not None,
        )
        yield _Layer(shape, weight.itemsize, base.num_experts * (update.pattern.nnz + n), dense=False)
