"""PEFT's FRoD layers with V given, and U derived from it when it is needed. Needs peft; written against 0.21.

PEFT derives every U as it builds its model, which holds as many numbers as the weights do. Here a layer on the CPU
waits for its first forward pass, or for its move to a GPU: then U is computed there, and the host never holds it.
Until the last layer has its U, each V⁻ᵀ is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.frod.layer import FrodLayer
from peft.tuners.frod.model import FrodModel
from torch import Tensor, nn

from frodctl.errors import FrodctlError
from frodctl.method.update import Factors
from frodctl.training.tensors import array_of, kernels_on, tensor_of

#: PEFT's methods that are replaced as it builds a model; where one is not there, importing this says so.
_DECOMPOSE = FrodModel._init_frod_projections.__name__
_FACTORS = FrodLayer._calculate_frod_u_and_lambda.__name__


def build(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    projections: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[nn.Module, Tensor],
    *,
    fresh: bool,
) -> Any:
    """PEFT's model over V and the pattern of each category, without a decomposition.

    Parameters
    ----------
    model : Module
    config : peft.FrodConfig
    adapter_name : str
    projections : mapping of str to (Tensor, Tensor)
        V (n, n) and positions (2, nnz) by category.
    scales : mapping of Module to Tensor
        λ' (n,) by base layer, where it is known; elsewhere λ is computed at once, and U with it.
    fresh : bool
        Whether ``scales`` are λ, where training begins.

    Returns
    -------
    peft.PeftModel

    Raises
    ------
    FrodctlError
        This PEFT does not take V from where 0.21 does.
    """
    derive = Derivation()
    with _given(projections, scales, derive):
        result = peft.get_peft_model(model, config, adapter_name=adapter_name)
    if not _has(result, adapter_name, projections):
        raise FrodctlError(f"peft {peft.__version__} builds its FRoD model in another way than 0.21: install that one")
    for layer in frod_layers(result).values():
        if adapter_name in layer.frod_U and not layer.frod_U[adapter_name].numel():
            start = scales[layer.get_base_layer()] if fresh else None
            layer.frod_U = AwaitedU(layer, adapter_name, derive, start)
    return result


def _has(model: Any, adapter_name: str, projections: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether these V are the model's."""
    try:
        held = {category: model.base_model.frod_V[category][adapter_name] for category in projections}
    except (AttributeError, KeyError):
        return False
    return all(torch.equal(held[category], V.to(held[category])) for category, (V, _) in projections.items())


def frod_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's FRoD layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FrodLayer)}


class Derivation:
    """U and λ of a layer from its V and W, as PEFT's routine gives them, with each V inverted once."""

    def __init__(self) -> None:
        self._factors: dict[tuple[object, ...], Factors] = {}

    def __call__(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
        W = layer._base_weight_before_merge if layer.merged else layer.get_base_layer().weight
        return self.of(layer, layer.frod_V[adapter_name].to(W.dtype), W.T if layer.fan_in_fan_out else W)

    def of(self, layer: Any, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """The same for this V and W (m, n)."""
        kernels = kernels_on(W.device)
        key = layer.frod_V, V.dtype, W.device  # layers of a category share what holds V
        if key not in self._factors:
            self._factors[key] = Factors(array_of(V, kernels), kernels)
        with torch.autocast(W.device.type, enabled=False):
            U, scales = self._factors[key](array_of(W, kernels))
        return tensor_of(U), tensor_of(scales)


class AwaitedU(BufferDict):
    """A layer's U by adapter; the one of ``adapter_name`` is derived when it is asked for, or moves to a GPU.

    λ' that still is ``start`` then becomes the λ that goes with U: V may have been rounded to the model's dtype since.
    """

    def __init__(self, layer: nn.Module, adapter_name: str, derive: Derivation, start: Tensor | None) -> None:
        super().__init__({}, persistent=False)
        self._awaited: tuple[Any, str, Derivation, Tensor | None] | None = (layer, adapter_name, derive, start)

    def _awaits(self, key: str) -> bool:
        awaited = self._awaited
        return awaited is not None and awaited[1] == key

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _derive(self) -> None:
        if (awaited := self._awaited) is None:  # another thread was first
            return
        layer, name, derive, start = awaited
        with torch.inference_mode(False), torch.no_grad():  # a tensor of that mode could not be trained with later
            U, scales = derive(layer, name)
            dtype, trained = U.dtype, layer.frod_lambda_l[name]
            if start is not None and torch.equal(trained, start.to(dtype).to(trained)):
                trained.copy_(scales.to(dtype))
        self[name] = U.to(layer.get_base_layer().weight.device)

    def __contains__(self, key: str) -> bool:
        return self._awaits(key) or super().__contains__(key)  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> Tensor:
        if self._awaits(key):
            self._derive()
        found: Tensor = super().__getitem__(key)  # type: ignore[no-untyped-call]
        return found

    def __setitem__(self, key: str, U: Tensor) -> None:
        super().__setitem__(key, U)  # type: ignore[no-untyped-call]
        if self._awaits(key):
            self._awaited = None

    def __delitem__(self, key: str) -> None:
        if self._awaits(key):
            self._awaited = None
        else:
            super().__delitem__(key)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # W has moved already: the base layer is the first of its layer's modules
        if self._awaited is not None and self._awaited[0].get_base_layer().weight.is_cuda:
            self._derive()
        result: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result


@contextmanager
def _given(
    projections: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[nn.Module, Tensor], derive: Derivation
) -> Iterator[None]:
    """Within it PEFT takes V and patterns from here; layers on the CPU whose λ is known get an empty U."""

    def decompose(self: Any, config: Any, adapter_name: str) -> None:
        if not hasattr(self, "frod_V"):
            self.frod_V, self.frod_s_indices, self.frod_s_size = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        for category, (V, indices) in projections.items():
            size = torch.tensor([len(V)] * 2)
            values = (self.frod_V, V.to(dtype)), (self.frod_s_indices, indices), (self.frod_s_size, size)
            for held, tensor in values:
                if category not in held:
                    held[category] = BufferDict({}, persistent=config.save_projection)
                held[category][adapter_name] = tensor

    def factors(layer: Any, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        known = scales.get(layer.get_base_layer())
        return derive.of(layer, V, W) if known is None or W.device.type != "cpu" else (W.new_empty(0), known)

    with _replaced(FrodModel, _DECOMPOSE, decompose), _replaced(FrodLayer, _FACTORS, factors):
        yield


@contextmanager
def _replaced(kind: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    before = getattr(kind, name)
    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, before)
