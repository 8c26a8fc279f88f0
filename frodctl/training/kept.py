"""What a layer keeps from one pass to the next: W', and ∂L/∂W' of backward passes that others are to follow.

W' is formed once for as long as the trained numbers are the same: their values decide, as an optimizer may change them
in ways that torch does not count. ∂L/∂W' is projected onto the pattern's positions in each backward pass, unless
`frodctl.accumulating` says that another one follows before the optimizer's step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from frodctl.errors import UsageError


class Source(NamedTuple):
    """What W' is made from beside the trained numbers; equal as long as nothing has written to W."""

    W: int
    address: int
    version: int
    dtype: torch.dtype  #: of what is made

    @classmethod
    def of(cls, W: Tensor, dtype: torch.dtype) -> Source:
        return cls(id(W), W.data_ptr(), 0 if W.is_inference() else W._version, dtype)


class KeptWeight:
    """W' of a layer, and W D where that is to be kept too."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self._source: Source | None = None
        self._entries: Tensor | None = None
        self._weight: Tensor | None = None
        self._columns: tuple[Source, Tensor] | None = None

    def holds(self, source: Source, entries: Callable[[], Tensor]) -> bool:
        """Whether W' is here for these entries of Q."""
        return self._source == source and self._entries is not None and torch.equal(self._entries, entries())

    def weight(self, source: Source, entries: Tensor, form: Callable[[], Tensor]) -> Tensor:
        """W' for these entries of Q."""
        if self._weight is None or not self.holds(source, lambda: entries):
            self._weight = None  # the next one takes its memory
            self._weight = form()
            self._source, self._entries = source, entries.detach().clone()
        return self._weight

    def columns(self, source: Source, form: Callable[[], Tensor]) -> Tensor:
        """W D, kept until W changes."""
        if self._columns is None or self._columns[0] != source:
            self._columns = None
            self._columns = source, form()
        return self._columns[1]


class Mark(NamedTuple):
    """A parameter's gradient as it was when another one, which is to be added to it, began to wait."""

    parameter: nn.Parameter
    version: int

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Mark:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return cls(parameter, parameter.grad._version)

    @property
    def is_thrown_away(self) -> bool:
        """Whether `zero_grad` was called meanwhile, in either of its ways."""
        gradient = self.parameter.grad
        return gradient is None or (gradient._version != self.version and not gradient.any())


class WaitingGradient:
    """∂L/∂W' of one layer, added up until a backward pass that is the last one of its step.

    Meanwhile the gradients of what is trained are 0, unless something else has arrived in them; where they are thrown
    away, so is this.
    """

    def __init__(self) -> None:
        self.accumulating = False
        self.clear()

    @property
    def accumulates(self) -> bool:
        """Whether a backward pass now is not the last one of its step."""
        return self.accumulating or _accelerate_accumulates()

    def clear(self) -> None:
        """Forget what waits."""
        self._total: Tensor | None = None
        self._settle: Callable[[Tensor], None] | None = None
        self._marks: list[Mark] = []
        _WAITING.discard(self)

    def added(
        self, gradient: Tensor, parameters: Sequence[nn.Parameter], settle: Callable[[Tensor], None]
    ) -> Tensor | None:
        """The sum of the gradient with what has waited; None where it goes on waiting.

        ``settle`` adds what becomes of such a sum to the gradients of ``parameters``, should the last backward pass
        not come by this layer.
        """
        if any(mark.is_thrown_away for mark in self._marks):
            self.clear()
        total = self._total
        if self.accumulates:
            self._total = _wide_copy(gradient) if total is None else total.add_(gradient)
            self._settle, self._marks = settle, [Mark.of(parameter) for parameter in parameters]
            _WAITING.add(self)
            return None
        self.clear()
        if _WAITING:
            Variable._execution_engine.queue_callback(_settle_all)
        return gradient if total is None else total.add_(gradient)

    def settle(self) -> None:
        """Have what waits arrive."""
        if self._total is not None and self._settle is not None and not self.accumulating:
            self._settle(self._total)
            self.clear()

    def is_for(self, parameters: set[int]) -> bool:
        """Whether something waits that is for one of these parameters, by their ids."""
        return any(id(mark.parameter) in parameters for mark in self._marks)


_WAITING: WeakSet[WaitingGradient] = WeakSet()


def _settle_all() -> None:
    """At the end of a step's last backward pass: layers that it did not come by, such as experts without a token."""
    for waiting in list(_WAITING):
        waiting.settle()


def _wide_copy(gradient: Tensor) -> Tensor:
    """In float32 at least: sums of many terms in 16 bits would lose the last ones."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide, copy=True)


def _accelerate_accumulates() -> bool:
    """Whether accelerate, and so transformers' Trainer, is in a micro-batch that is not the last one of its step."""
    module = sys.modules.get("accelerate.state")
    if module is None:
        return False
    state = module.GradientState._shared_state
    synchronized = state.get("sync_gradients", True) or state.get("plugin_kwargs", {}).get("sync_each_batch", False)
    return not synchronized


def check_nothing_waits(optimizer: torch.optim.Optimizer) -> None:
    """Before a step.

    Raises
    ------
    UsageError
        A gradient has not arrived in the optimizer's parameters.
    """
    if _WAITING:
        taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(waiting.is_for(taken) for waiting in list(_WAITING)):
            raise UsageError(
                "an optimizer's step while gradients wait for the last backward pass: call that one outside of "
                "frodctl.accumulating(model)"
            )
