"""The trainable layer of a mixture's experts, which transformers holds stacked: one parameter (experts, …) for a role.

A routed pair is a token and one of its experts e. For each pair the layer is exactly the base layer where Q_e = 0::

    input side    W_e (x + D Q_e Vᵀ x)            where all rows of W_e have one Q_e
    by parts      W_e x, and to rows r of it W_e[r] D Q_r Vᵀ x, where gate and up are one parameter in the model, but
                  were decomposed apart

All experts of a role share V: Vᵀx is computed once for each token, and D·(…) is one product for all pairs. What is
kept beside the base's weights has the size of the pairs, not of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frodctl.adapted.conversion import Place
from frodctl.errors import UsageError
from frodctl.training.experts_products import experts_product
from frodctl.training.layer import Basis, FrodLinear, Pattern, Update, changes, correction_dtype
from frodctl.training.products import Factors, projected

#: The flags of transformers' experts by which it dispatches them.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
#: The parameter by which what they computed goes back into the model.
OUTPUT = "down_proj"


def holds_experts(module: nn.Module) -> bool:
    """Whether it is stacked experts of one of the classes that transformers dispatches."""
    return all(hasattr(module, flag) for flag in _FLAGS) and isinstance(getattr(module, OUTPUT, None), nn.Parameter)


class ExpertsUpdate(Update):
    """What one adapter trains of one role of a layer's experts: δ (experts, n) and the values of S (experts, nnz)."""

    @property
    def rotation(self) -> object:
        """Equal for updates of which `rotated` is the same: V is, and nothing is dropped."""
        return self if self.dropout.p else self.basis

    def rotated(self, x: Tensor) -> Tensor:
        """Vᵀx for every row x of (tokens, n)."""
        V, _ = self.basis.matrices(x.device, correction_dtype(x))
        return projected(self.dropout(x), V)

    def correction(self, Z: Tensor, entries: Tensor, pairs: Pairs, W: Tensor | None = None) -> Tensor:
        """D Q_e z, or W_e D Q_e z, for every pair's z = Vᵀx (pairs, n), with the entries of every Q_e."""
        _, D = self.basis.matrices(Z.device, Z.dtype)
        positions, counts = self.pattern.positions, pairs.counts
        return pairs.in_groups(lambda Z: experts_product(Z, entries, D, positions, counts, W), Z)


@dataclass(frozen=True)
class Part:
    """What was decomposed as one module for each expert: all rows of their weights, or some."""

    parameter: str  #: of the base layer
    rows: tuple[int, int, int] | None = None  #: of out_features: from, to, step; None: all

    @classmethod
    def at(cls, place: Place) -> Part:
        """The one that has an expert's weight."""
        return cls(place.parameter.rpartition(".")[2], None if place.rows is None else (*place.rows, 1))

    @property
    def name(self) -> str:
        """Of the update in the layer: the parameter's, numbered by its first row where it has several parts."""
        return self.parameter if self.rows is None else f"{self.parameter}_{self.rows[0]}"


class Stacks(nn.Module):
    """What one adapter trains of stacked experts: an update for each part of their parameters."""

    def __init__(self, updates: Mapping[Part, ExpertsUpdate]) -> None:
        super().__init__()
        self.parts = tuple(updates)
        self.updates = nn.ModuleDict({part.name: update for part, update in updates.items()})

    def items(self) -> list[tuple[Part, ExpertsUpdate]]:
        """Parts, and their update."""
        return [(part, self.update(part)) for part in self.parts]

    def update(self, part: Part) -> ExpertsUpdate:
        """That of a part."""
        found = self.updates[part.name]
        assert isinstance(found, ExpertsUpdate)
        return found


@dataclass(frozen=True)
class OneExpert:
    """What is trained of one expert, as `Update` has it: views into what is trained of all."""

    of: ExpertsUpdate
    expert: int

    @property
    def basis(self) -> Basis:
        return self.of.basis

    @property
    def pattern(self) -> Pattern:
        return self.of.pattern

    @property
    def scale(self) -> float:
        return self.of.scale

    @property
    def delta(self) -> Tensor:
        return self.of.delta[self.expert]

    @property
    def values(self) -> Tensor:
        return self.of.values[self.expert]

    @property
    def base_scales(self) -> Tensor:
        return self.of.base_scales[self.expert]


class FrodExperts(FrodLinear):
    """Stacked experts that are left alone, and what is trained of them, for one adapter at a time, or none."""

    def update(self, name: str | None = None) -> None:
        """There is not one update of such a layer."""

    def stacks(self, name: str | None = None) -> list[tuple[Part, ExpertsUpdate]]:
        """What the adapter with this name, or the active one, trains."""
        name = name or self.active
        held = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 (a ModuleDict has no get)
        return held.items() if isinstance(held, Stacks) else []

    def _changing(self) -> list[tuple[Part, ExpertsUpdate]]:
        """What changes anything now."""
        return [(part, update) for part, update in self.stacks() if update.scale != 0] if self.enabled else []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        updates = [(part, update, update.entries()) for part, update in self._changing()]
        base: Any = self.base_layer
        if not updates:
            return base(hidden_states, top_k_index, top_k_weights)
        inputs = [found for found in updates if found[0].parameter != OUTPUT]
        outputs = [found for found in updates if found[0].parameter == OUTPUT]
        parameter = "gate_up_proj" if base.has_gate else "up_proj"
        rotated = Rotated(hidden_states, inputs)

        def multiplied(pairs: Pairs) -> Tensor:
            y = _product(
                pairs, parameter, inputs, hidden_states.index_select(0, pairs.tokens), rotated.of(pairs.tokens)
            )
            y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
            y = _product(pairs, OUTPUT, outputs, y, Rotated(y, outputs).all)
            return base.post_expert_norm(y) if base.has_post_expert_norm else y

        routed = _ROUTED.get(base.config._experts_implementation, Grouped)(base, top_k_index, top_k_weights)
        return routed.combined(multiplied, hidden_states)

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the active adapter into the base layer's weights, each rounded once."""
        for part, update in self.stacks():
            entries = update.entries()
            for expert in range(len(entries)):
                if changes(OneExpert(update, expert)):
                    W: Any = as_linear(self.base_layer, part, expert).weight
                    V, D = update.basis.matrices(W.device, torch.promote_types(W.dtype, torch.float32))
                    factors = Factors(W, V, D, update.pattern.positions, transposed=False)
                    W.copy_(factors.updated(entries[expert]))


def as_linear(base: Any, part: Part, expert: int) -> nn.Linear:
    """One expert's rows as a layer, of which the weight is a view."""
    W = getattr(base, part.parameter).detach()[expert]
    W = (W.T if base.is_transposed else W)[slice(None) if part.rows is None else slice(*part.rows)]
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W, requires_grad=False)
    return layer


#: A part, what is trained of it, and the entries of every expert's Q, which are made once for a pass.
Applied = tuple[Part, ExpertsUpdate, Tensor]


class Rotated:
    """Vᵀx for every row x of (tokens, n), once for each V."""

    def __init__(self, x: Tensor, updates: Sequence[Applied]) -> None:
        self.all: dict[object, Tensor] = {}
        for _, update, _ in updates:
            if update.rotation not in self.all:
                self.all[update.rotation] = update.rotated(x)

    def of(self, rows: Tensor) -> dict[object, Tensor]:
        """For these of them."""
        return {key: Z.index_select(0, rows) for key, Z in self.all.items()}


def _product(
    pairs: Pairs, parameter: str, updates: Sequence[Applied], x: Tensor, rotated: Mapping[object, Tensor]
) -> Tensor:
    """W'_e x + b_e of every pair's x (pairs, n), with Vᵀx given."""
    for part, update, entries in updates:
        if part.rows is None:
            x = x + update.correction(rotated[update.rotation], entries, pairs).to(x.dtype)
    y = pairs.multiply(x, parameter)
    for part, update, entries in updates:
        if part.rows is not None:
            W = pairs.rows(parameter, slice(*part.rows))
            y[:, slice(*part.rows)] += update.correction(rotated[update.rotation], entries, pairs, W).to(y.dtype)
    return y


class Pairs:
    """Routed pairs, and the experts' products with them.

    Parameters
    ----------
    base : Module
        The stacked experts.
    tokens, experts : Tensor, (pairs,), int64
        Of each pair.
    grouped : bool
        Whether those of an expert stand together, in order of the experts.
    """

    def __init__(self, base: Any, tokens: Tensor, experts: Tensor, *, grouped: bool) -> None:
        self.base, self.tokens, self.experts = base, tokens, experts
        self.counts = experts.new_zeros(base.num_experts).index_add_(0, experts, torch.ones_like(experts))
        self._order = None if grouped else torch.sort(experts, stable=True).indices

    def in_groups(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What a function of rows by pairs gives, which are in groups as it is called."""
        if self._order is None:
            return function(x)
        return function(x.index_select(0, self._order)).index_select(0, torch.argsort(self._order))

    def multiply(self, x: Tensor, parameter: str) -> Tensor:
        """W_e x + b_e for each pair's x (pairs, n), bit by bit as the base layer's own way computes it."""
        raise NotImplementedError

    def rows(self, parameter: str, rows: slice) -> Tensor:
        """Those rows of every W_e, (experts, m, n)."""
        W = self.weight(parameter)
        if W.requires_grad:
            raise UsageError(
                f"{parameter} of the experts: is trained itself, beside what is trained of it; freeze it, and shard it "
                "by fully_shard, not by FSDP's first version, which takes both for one parameter"
            )
        return (W.mT if self.base.is_transposed else W)[:, rows]

    def weight(self, parameter: str) -> Tensor:
        """Of all experts, as it is stored."""
        found: Tensor = getattr(self.base, parameter)
        return found

    def bias(self, parameter: str) -> Tensor | None:
        """b_e of each pair."""
        return self.weight(f"{parameter}_bias")[self.experts] if self.base.has_bias else None


class Routed:
    """All the pairs of a call, as transformers' functions go through them."""

    def __init__(self, base: Any, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        self.base, self.top_k = base, top_k_index.shape[-1]
        self.experts, self.weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)

    def combined(self, function: Callable[[Pairs], Tensor], like: Tensor) -> Tensor:
        """The weighted sum of each token's pairs (tokens, m), in the dtype of ``like``, for a function of the pairs."""
        raise NotImplementedError

    def _sums(self, y: Tensor, like: Tensor) -> Tensor:
        """The sum of each token's pairs, which stand together."""
        return y.view(len(like), self.top_k, y.shape[1]).sum(dim=1).to(like.dtype)


class Batched(Routed):
    """transformers' ``batched_mm``: a copy of the weight for each pair."""

    def combined(self, function: Callable[[Pairs], Tensor], like: Tensor) -> Tensor:
        tokens = torch.arange(len(self.experts), device=self.experts.device) // self.top_k
        y = function(self.Pairs(self.base, tokens, self.experts, grouped=False))
        return self._sums(y * self.weights[:, None], like)

    class Pairs(Pairs):
        def multiply(self, x: Tensor, parameter: str) -> Tensor:
            from transformers.integrations.moe import _batched_linear

            W = self.weight(parameter)[self.experts]
            y: Tensor = _batched_linear(x, W, self.bias(parameter), self.base.is_transposed)
            return y


class Grouped(Routed):
    """transformers' ``grouped_mm``: one product for all pairs."""

    def combined(self, function: Callable[[Pairs], Tensor], like: Tensor) -> Tensor:
        experts, order = torch.sort(self.experts)
        y = function(self.Pairs(self.base, order // self.top_k, experts, grouped=True))
        y = y * self.weights.index_select(0, order)[:, None]
        return self._sums(y.index_select(0, torch.argsort(order)), like)

    class Pairs(Pairs):
        def multiply(self, x: Tensor, parameter: str) -> Tensor:
            from transformers.integrations.moe import _grouped_linear

            ends = torch.cumsum(self.counts, 0, dtype=torch.int32)
            y: Tensor = _grouped_linear(x, self.weight(parameter), ends, self.bias(parameter), self.base.is_transposed)
            return y


class Eager(Routed):
    """The way that the classes themselves go: expert by expert, and of each first the pairs that are first choices."""

    def combined(self, function: Callable[[Pairs], Tensor], like: Tensor) -> Tensor:
        by_choice = torch.arange(len(self.experts), device=self.experts.device).view(-1, self.top_k).T.reshape(-1)
        order = by_choice[torch.sort(self.experts[by_choice], stable=True).indices]
        sums = torch.zeros_like(like)
        counts = torch.bincount(self.experts, minlength=self.base.num_experts).tolist()
        for chosen in filter(len, order.split(counts)):
            pairs = self.Pairs(self.base, chosen // self.top_k, self.experts[chosen], grouped=True)
            y = function(pairs) * self.weights[chosen][:, None]
            sums = sums.index_add(0, pairs.tokens, y.to(sums.dtype))
        return sums

    class Pairs(Pairs):
        def multiply(self, x: Tensor, parameter: str) -> Tensor:
            W, bias = self.weight(parameter)[self.experts[0]], self.bias(parameter)
            y = x @ (W if self.base.is_transposed else W.T)
            return y if bias is None else y + bias


_ROUTED: dict[str, type[Routed]] = {"batched_mm": Batched, "eager": Eager}
