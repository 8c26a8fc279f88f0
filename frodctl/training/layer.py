"""The trainable layer: a base layer that is left alone, and what is trained of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frodctl.arrays import to_torch
from frodctl.method.dual import Dual
from frodctl.method.update import csr_pattern
from frodctl.training.products import (
    Positions,
    ignore_beta_warning,
    input_side,
    trained_weight,
    updated_weight,
    weight_side,
)
from frodctl.training.tensors import kernels_on, tensor_of

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


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
        self.register_buffer("V", tensor_of(dual.V).to(dtype).to(device), persistent=False)
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
            with torch.inference_mode(False):  # tensors of that mode could not be trained with later
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

    Parameters
    ----------
    basis, pattern : Basis, Pattern
        Shared with the other layers of the category.
    scales : Tensor, (n,)
        λ, where training begins.
    dropout : float
        Probability with which an element of the correction's input is dropped in training.
    """

    base_scales: Tensor
    inverse_scales: Tensor

    def __init__(self, basis: Basis, pattern: Pattern, scales: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.basis, self.pattern = basis, pattern
        self.scale = 1.0
        self.dropout = nn.Dropout(dropout)
        start = scales.to(basis.V.device, torch.float32)
        self.delta = nn.Parameter(torch.zeros_like(start))
        self.values = nn.Parameter(torch.zeros(pattern.nnz, dtype=torch.float32, device=start.device))
        self.register_buffer("base_scales", start, persistent=False)
        self.register_buffer("inverse_scales", torch.where(start > 0, 1 / start, 0), persistent=False)

    def entries(self) -> Tensor:
        """The entries of Q = s diag(λ)⁻¹ (S + diag(λ' − λ)); rows with λ = 0 drop out."""
        trained = torch.cat([self.values, self.delta]).index_select(0, self.pattern.order)
        return trained * (self.scale * self.inverse_scales)[self.pattern.rows]

    def shifted(self, x: Tensor) -> Tensor:
        """x + D Q Vᵀ x, in x's dtype; the correction in float32, or in bfloat16 where the layer works in it."""
        dtype = correction_dtype(x)
        X = self.dropout(x).reshape(-1, x.shape[-1]).to(dtype)
        V, D = self.basis.matrices(x.device, dtype)
        correction = input_side(X, self.entries(), V, D, self.pattern.positions)
        return (x + correction.view(x.shape)).to(x.dtype)

    def product(self, base: nn.Module, x: Tensor) -> Tensor:
        """W' x + b for a base layer of which `is_plain` holds."""
        W: Any = base.weight
        V, D = self.basis.matrices(x.device, _change_dtype(W.dtype))
        positions, transposed = self.pattern.positions, is_transposed(base)
        bias: Any = base.bias
        return weight_side(x, self.entries(), W, bias, V, D, positions, transposed)

    def weight(self, base: nn.Module) -> Tensor:
        """W' of a base layer of which `holds_matrix` holds, as it stores its weight; gradients come back through it."""
        W: Any = base.weight
        V, D = self.basis.matrices(W.device, _change_dtype(W.dtype))
        return trained_weight(W, self.entries(), V, D, self.pattern.positions, is_transposed(base))

    @torch.no_grad()
    def merged_weight(self, base: nn.Module) -> Tensor:
        """W' of a dense base layer as it stores its weight: with V and D as they are here, rounded once."""
        W: Any = base.weight
        V, D = self.basis.matrices(W.device, torch.promote_types(W.dtype, torch.float32))
        return updated_weight(W, self.entries(), V, D, self.pattern.positions, is_transposed(base))


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
        """Whether W' is formed for these tokens: fewer operations, and nothing in the way.

        In units of n multiplications and additions, forward and backward (sparse products left out), T tokens take
        4 n T + 2 m T on the input side, and 3 m T + 5 m n by way of W'.
        """
        if update.dropout.p and self.training:
            return False
        n = x.shape[-1]
        if not is_plain(self.base_layer, x):
            return False
        m, tokens = out_features(self.base_layer), x.numel() // n
        return 3 * m * tokens + 5 * m * n < (4 * n + 2 * m) * tokens

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


def _change_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a change is computed: float16 may overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def correction_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return _change_dtype(torch.get_autocast_dtype(device))
    return _change_dtype(x.dtype)
