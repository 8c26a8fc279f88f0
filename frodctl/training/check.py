"""Whether a live layer is the one that a basis was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frodctl.errors import InvalidInput

#: How far ‖W D[:, k]‖ may be from λ_k (relative, root mean square), by the dtype of W; None: quantized.
_TOLERANCE: dict[torch.dtype | None, float] = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-3,
    torch.float16: 5e-3,
    None: 1e-1,
}
_COLUMNS = 16


def columns_to_check(D: Tensor, scales: Tensor) -> Tensor:
    """The k whose ‖W D[:, k]‖ = λ_k is least touched by rounding W: those of the largest λ_k/‖D[:, k]‖."""
    gain = scales.to(D) / torch.linalg.vector_norm(D, dim=0)
    count = int((gain > 0).sum()) or len(gain)
    return torch.topk(gain, min(_COLUMNS, count)).indices


def check_gradient(base: nn.Module, n: int, dtype: torch.dtype, device: torch.device, path: str) -> None:
    """See that a gradient comes through the layer to its input (1, n); some quantized kernels are for inference only.

    Raises
    ------
    InvalidInput
        None does.
    """
    x = torch.ones(1, n, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad():
        y: Tensor = base(x)
        arrived = y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None
    if not arrived:
        raise InvalidInput(
            f"{path}: passes no gradient to its input (its weight is packed for inference); load the model anew and "
            "attach before it is evaluated, or take another quantization"
        )


@torch.no_grad()
def check_layer(base: nn.Module, D: Tensor, scales: Tensor, dtype: torch.dtype, path: str, where: str) -> None:
    """Compare ‖W D[:, k]‖ with λ_k on a few columns k, taken through the layer itself, whatever it holds.

    Parameters
    ----------
    base : Module
        Computes W x + b.
    D : Tensor, (n, n)
    scales : Tensor, (n,)
        λ of the layer.
    dtype : torch.dtype
        Of the layer's input.
    path, where : str
        The layer's path and the basis file, for the message.

    Raises
    ------
    InvalidInput
        They differ by more than rounding or quantization explains.
    """
    chosen = columns_to_check(D, scales)
    weight: Any = getattr(base, "weight", None)
    dense = type(weight) is nn.Parameter and weight.is_floating_point()
    tolerance = _TOLERANCE.get(weight.dtype if dense else None, _TOLERANCE[None])
    columns = D[:, chosen].T
    # as large as float16 can bear with ease, so that the bias does not swamp them
    factors = 64 / columns.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    inputs = torch.cat([columns * factors, torch.zeros_like(columns[:1])]).to(dtype)
    outputs = base(inputs).to(torch.float64)
    norms = torch.linalg.vector_norm((outputs[:-1] - outputs[-1]) / factors.to(outputs), dim=1)
    expected = scales[chosen].to(norms)
    error = ((norms - expected) / expected.clamp(min=1e-30)).square().mean().sqrt()
    if not error <= tolerance:
        found = f"{float(error):.1e} relative, {tolerance:.0e} allowed"
        raise InvalidInput(
            f"{path}: its weight is not the one that {where} was made from (scales differ by {found}); "
            "give the basis of this model, or load the model that the basis names"
        )
