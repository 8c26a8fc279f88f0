"""The trainable layer: a base layer that is left alone, and what is trained of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frodctl.arrays import to_torch
from frodctl.method.dual import Dual
from frodctl.method.step_cost import Shape, input_flops, weight_flops
from frodctl.method.update import csr_pattern
from frodctl.training.kept import KeptWeight, Source, WaitingGradient
from frodctl.training.products import (
    Factors,
    Positions,
    corrected,
    dual_columns,
    ignore_beta_warning,
    projected,
    trained_weight,
)
from frodctl.training.shared import SharedProduct
from frodctl.training.tensors import kernels_on, tensor_of

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


#: How a layer may be computed; see `frodctl.attach`.
FORMS = ("auto", "input", "weight", "weight+U")


class KeepsDtype(nn.Module):
    """A module that follows its model to another device, but keeps its dtypes where the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor if moved.device == tensor.device else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class Basis(KeepsDtype):
    """V and its dual D = V⁻ᵀ of one category, held once for all of the category's layers.

    Parameters
    ----------
    V : ndarray, (n, n), floating point
        As it is stored. D is its inverse in float64, rounded then.
    category, digest : str
        Its name, and ``sha256:…`` of V's stored bytes.
    layers : int
        How many layers were decomposed together: λ is about 1/√layers.
    dtype : torch.dtype
        Of V and D here, in which corrections are computed: never float16, which Vᵀx may leave.
    device : torch.device
    """

    V: Tensor
    D: Tensor

    def __init__(
        self, V: HostArray, category: str, digest: str, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.category, self.digest, self.layers = category, digest, layers
        dual = Dual.of(V, kernels_on(device))
        # by columns: so a row of Vᵀ, of which sparse products are made, is contiguous
        self.register_buffer("V", tensor_of(dual.V).to(dtype).T.contiguous().T.to(device), persistent=False)
        self.register_buffer("D", tensor_of(dual.D).to(dtype).contiguous().to(device), persistent=False)
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def n(self) -> int:
        return len(self.V)

    @property
    def is_rounded(self) -> bool:
        """Whether V and D have fewer bits than float32."""
        return self.V.dtype.itemsize < 4

    def matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """V and D there, in that dtype. Copies, where it takes any, are kept."""
        if self.V.device == device and self.V.dtype == dtype:
            return self.V, self.D
        if torch.compiler.is_compiling():
            return self.V.to(device, dtype), self.D.to(device, dtype)
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False), torch.no_grad():  # tensors of that mode could not be trained with later
                self._copies[device, dtype] = self.V.to(device, dtype), self.D.to(device, dtype)
        return self._copies[device, dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        self._copies.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_copies": {}}

    def extra_repr(self) -> str:
        return f"{self.category}, n={self.n}, dtype={self.V.dtype}"


class Pattern(KeepsDtype):
    """The positions of S, (2, nnz) int64, and of the diagonal; held once for all of a category's layers."""

    rows: Tensor
    row_starts: Tensor
    columns: Tensor
    order: Tensor

    def __init__(self, indices: HostArray, n: int, device: torch.device) -> None:
        super().__init__()
        self.nnz = indices.shape[1]
        names = ("rows", "row_starts", "columns", "order")
        for name, array in zip(names, csr_pattern(indices, n), strict=True):
            self.register_buffer(name, to_torch(array).to(device), persistent=False)
        ignore_beta_warning()

    @property
    def positions(self) -> Positions:
        return Positions(self.rows, self.row_starts, self.columns)

    def indices(self) -> Tensor:
        """The positions of S, (2, nnz), as they were given."""
        found = torch.empty(2, len(self.order), dtype=torch.int64, device=self.order.device)
        found[:, self.order] = torch.stack([self.rows, self.columns])
        return found[:, : self.nnz].contiguous()

    def extra_repr(self) -> str:
        return f"nnz={self.nnz}"


class Update(KeepsDtype):
    """What one adapter trains of one layer: δ = λ' − λ (n,) and the values of S (nnz,), float32, from 0.

    Of a stack of weights, (experts, n) and (experts, nnz): `frodctl.training.experts`.

    Parameters
    ----------
    basis, pattern : Basis, Pattern
        Shared with the other layers of the category.
    scales : Tensor, (n,) or (experts, n)
        λ, where training begins.
    dropout : float
        Probability with which an element of the correction's input is dropped in training.
    form : str
        Of `FORMS`.
    projection : SharedProduct, optional
        Of the layers that read the same tensor.
    """

    base_scales: Tensor
    inverse_scales: Tensor

    def __init__(
        self,
        basis: Basis,
        pattern: Pattern,
        scales: Tensor,
        dropout: float = 0.0,
        form: str = "auto",
        projection: SharedProduct | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection or SharedProduct(basis.category)
        self.projection.layers += 1
        self.basis, self.pattern = basis, pattern
        self.scale = 1.0
        self.form = form
        self.dropout = nn.Dropout(dropout)
        start = scales.to(basis.V.device, torch.float32)
        self.delta = nn.Parameter(torch.zeros_like(start))
        self.values = nn.Parameter(start.new_zeros(*start.shape[:-1], pattern.nnz))
        self.register_buffer("base_scales", start, persistent=False)
        self.register_buffer("inverse_scales", torch.where(start > 0, 1 / start, 0), persistent=False)
        self.kept, self.waiting = KeptWeight(), WaitingGradient()
        self._own = (self.delta,)

    @property
    def is_whole(self) -> bool:
        """Whether the trained numbers are held here; not where they are sharded, and gathered for each pass."""
        return self.delta is self._own[0]

    def entries(self) -> Tensor:
        """The entries of Q = s diag(λ)⁻¹ (S + diag(λ' − λ)); rows with λ = 0 drop out."""
        trained = torch.cat([self.values, self.delta], dim=-1).index_select(-1, self.pattern.order)
        return trained * (self.scale * self.inverse_scales)[..., self.pattern.rows]

    def shifted(self, x: Tensor) -> Tensor:
        """x + D Q Vᵀ x, in x's dtype; the correction in float32, or in bfloat16 where the layer works in it."""
        V, D = self.basis.matrices(x.device, correction_dtype(x))
        drops = self.dropout.p and self.training
        Z = projected(self.dropout(x), V) if drops else self.projection.of(self, x, V)
        correction = corrected(Z, self.entries(), D, self.pattern.positions)
        return (x + correction.view(x.shape)).to(x.dtype)

    def product(self, base: nn.Module, x: Tensor) -> Tensor:
        """W' x + b for a base layer of which `is_plain` holds."""
        W: Any = base.weight
        bias: Any = base.bias
        updated = self.weight(base, _product_dtype(W))
        if not is_transposed(base):
            return F.linear(x, updated, bias)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ updated if bias is None else torch.addmm(bias, rows, updated)
        return y.view(*x.shape[:-1], y.shape[-1])

    def weight(self, base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """W' of a base layer of which `holds_matrix` holds, as it stores its weight; gradients come back through it."""
        W: Any = base.weight
        dtype = dtype or W.dtype
        kept = self._keeps(W)
        return trained_weight(self._factors(base, dtype, kept), self.entries(), dtype, self if kept else None)

    def is_formed(self, base: nn.Module) -> bool:
        """Whether W' for the present numbers is there, to multiply by."""
        W: Any = base.weight
        return self._keeps(W) and self.kept.holds(Source.of(W, _product_dtype(W)), self.entries)

    def kept_weight(self, W: Tensor, entries: Tensor, dtype: torch.dtype, form: Callable[[], Tensor]) -> Tensor:
        """As `frodctl.training.products.Keeper` has it."""
        with torch.inference_mode(False), torch.no_grad():  # tensors of that mode could not be trained with later
            return self.kept.weight(Source.of(W, dtype), entries, form)

    def whole_gradient(self, gradient: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor | None:
        """As `frodctl.training.products.Keeper` has it."""
        trained = [p for p in (self.delta, self.values) if p.requires_grad and p.numel()]
        return self.waiting.added(gradient, trained, lambda total: self._add_gradient(project(total)))

    @torch.no_grad()
    def merged_weight(self, base: nn.Module) -> Tensor:
        """W' of a dense base layer as it stores its weight: with V and D as they are here, rounded once."""
        W: Any = base.weight
        return self._factors(base, torch.promote_types(W.dtype, torch.float32), False).updated(self.entries(), W.dtype)

    def _keeps(self, W: Tensor) -> bool:
        return not torch.compiler.is_compiling() and self.is_whole and W.device.type != "meta"

    def _factors(self, base: nn.Module, dtype: torch.dtype, kept: bool) -> Factors:
        """For products in a dtype."""
        W: Any = base.weight
        V, D = self.basis.matrices(W.device, _change_dtype(dtype))
        factors = Factors(W, V, D, self.pattern.positions, is_transposed(base))
        if not (kept and self.form == "weight+U"):
            return factors
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            B = self.kept.columns(Source.of(W, D.dtype), lambda: dual_columns(factors.oriented(W).to(D.dtype), D))
        return replace(factors, B=B)

    @torch.no_grad()
    def _add_gradient(self, of_entries: Tensor) -> None:
        """Add to the parameters' gradients what ∂L/∂Q makes of them."""
        scaled = of_entries.to(self.delta.dtype) * (self.scale * self.inverse_scales)[self.pattern.rows]
        found = torch.empty_like(scaled)
        found[self.pattern.order] = scaled
        parts = zip((self.values, self.delta), found.split([self.pattern.nnz, self.basis.n]), strict=True)
        for parameter, part in parts:
            if parameter.requires_grad:
                parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        self.kept.clear()
        super()._apply(fn, recurse)
        self._own = (self.delta,)
        return self

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"kept": KeptWeight(), "waiting": WaitingGradient()}


class Changes(Protocol):
    """What is trained of one weight: an `Update`, or a view of one expert's."""

    @property
    def scale(self) -> float: ...
    @property
    def delta(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...


def changes(update: Changes) -> bool:
    """Whether an update is not 0 exactly."""
    return bool(update.scale and (update.delta.any() or update.values.any()))


class FrodLinear(nn.Module):
    """A base layer that computes W x + b, with one trained `Update` of W active at a time, or none.

    Attributes that it does not have itself are the base layer's.

    Parameters
    ----------
    base_layer : Module
    gives_weight : bool
        Whether `weight` is W', and not W, which costs nothing to ask for its dtype.
    """

    def __init__(self, base_layer: nn.Module, gives_weight: bool = True) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gives_weight = gives_weight
        self.adapters = nn.ModuleDict()
        self.active = ""
        self.enabled = True
        self.train(base_layer.training)

    def train(self, mode: bool = True) -> FrodLinear:
        """As for any module, but a base layer that would lose its gradient in evaluation does not hear of it."""
        super().train(mode)
        if _packs_for_inference(self.base_layer):
            self.base_layer.train()
        return self

    def update(self, name: str | None = None) -> Update | None:
        """The update of the adapter with this name, or of the active one; None where it leaves this layer alone."""
        name = name or self.active
        if name not in self.adapters:
            return None
        found = self.adapters[name]
        assert isinstance(found, Update)
        return found

    def activate(self, name: str) -> None:
        """Apply this adapter from now on, and keep nothing of another one's."""
        self.active = name
        others = (module for other, held in self.adapters.items() if other != name for module in held.modules())
        for module in others:
            if isinstance(module, Update):
                module.kept.clear()

    @property
    def weight(self) -> Tensor:
        """W' of a base layer that holds a matrix, for a model that multiplies by it instead of calling the layer.

        A dropout of the correction's input has no part in it.
        """
        update, base = self._applied(), self.base_layer
        if update is not None and self.gives_weight and holds_matrix(base):
            return update.weight(base)
        found: Tensor = base.weight  # type: ignore[assignment]
        return found

    def _applied(self) -> Update | None:
        """The update that changes anything now."""
        update = self.update() if self.enabled else None
        return None if update is None or update.scale == 0 else update

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        update = self._applied()
        if update is None:
            return self.base_layer(x, *args, **kwargs)
        if not (args or kwargs) and self._weight_side(update, x):
            return update.product(self.base_layer, x)
        return self.base_layer(update.shifted(x), *args, **kwargs)

    def _weight_side(self, update: Update, x: Tensor) -> bool:
        """Whether x is multiplied by W': as asked for, being there, or taking fewer operations; nothing in the way."""
        base = self.base_layer
        if update.form == "input" or (update.dropout.p and self.training) or not is_plain(base, x):
            return False
        if update.form != "auto":
            return True
        if not update.is_whole:  # where parameters are sharded no weight may be kept
            return False
        n = x.shape[-1]
        dense = x.device.type != "cpu" or torch.compiler.is_compiling()
        shape = Shape(out_features(base), n, update.pattern.nnz + n, dense, update.projection.layers)
        tokens = x.numel() // n * (2 if update.waiting.accumulates else 1)  # at least
        backward = self.training or torch.is_grad_enabled()
        if weight_flops(shape, tokens, backward=backward) < input_flops(shape, tokens, backward=backward):
            return True
        return update.is_formed(base)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        return f"active={self.active}, enabled={self.enabled}"


class SavedModule(nn.Module):
    """A module that is trained as a whole, by one or more adapters, each in a copy of its own."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active = ""
        self.enabled = True

    def chosen(self) -> nn.Module:
        """The active adapter's copy, or the original."""
        if self.enabled and self.active in self.modules_to_save:
            return self.modules_to_save[self.active]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.chosen()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.chosen(), name)


def _packs_for_inference(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' 4-bit layer on the CPU, which in evaluation packs its weight for good."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Linear4bit" and isinstance(weight, Tensor) and weight.device.type == "cpu"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which computes x A with A (n, m) the stored weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_transposed(module: nn.Module) -> bool:
    """Whether the stored weight is (n, m)."""
    return is_conv1d(module)


def in_features(module: nn.Module) -> int | None:
    """n of a layer that computes W x, where it tells."""
    weight: Any = getattr(module, "weight", None)
    found = weight.shape[0] if is_conv1d(module) else getattr(module, "in_features", None)
    return found if isinstance(found, int) else None


def out_features(module: nn.Module) -> int:
    """m of a dense layer."""
    shape: Any = module.weight.shape
    return int(shape[1] if is_transposed(module) else shape[0])


def holds_matrix(module: nn.Module) -> bool:
    """Whether it is a linear layer, or of a kind derived from it, and its weight a floating-point matrix."""
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.Linear) or is_conv1d(module)
    return known and type(weight) is nn.Parameter and weight.is_floating_point() and weight.dim() == 2


def is_dense(module: nn.Module) -> bool:
    """Whether it holds a floating-point matrix W and computes W x + b, nothing else."""
    return holds_matrix(module) and (type(module) is nn.Linear or is_conv1d(module))


@torch.no_grad()
def multiplies(module: nn.Module) -> bool:
    """Whether a layer that holds a matrix computes W x + b, by a few random x: `is_dense` knows the kinds that do."""
    if is_dense(module):
        return True
    W: Any = module.weight
    bias: Any = module.bias
    x = torch.randn(8, W.shape[0 if is_transposed(module) else 1], generator=torch.Generator().manual_seed(0)).to(W)
    expected = F.linear(x, W.T if is_transposed(module) else W, bias)
    mode = module.training
    try:
        found: Tensor = module.eval()(x)
    finally:
        module.train(mode)
    rounding = 8 * torch.finfo(W.dtype).eps * expected.float().norm()
    return found.shape == expected.shape and bool((found - expected).float().norm() <= rounding)


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer's product with x may be taken in its stead: dense, frozen, here, and without hooks."""
    if not is_dense(module) or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    weight: Any = module.weight
    frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return frozen and weight.device == x.device and in_features(module) == x.shape[-1]


def _product_dtype(W: Tensor) -> torch.dtype:
    """The dtype in which a product with W is taken here and now."""
    device = W.device.type
    if torch.is_autocast_enabled(device) and W.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return W.dtype


def _change_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a change is computed: float16 may overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def correction_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return _change_dtype(torch.get_autocast_dtype(device))
    return _change_dtype(x.dtype)
