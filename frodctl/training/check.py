"""Whether a live layer is the one that a basis was made from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frodctl.adapted.conversion import Place
from frodctl.arrays import DTYPES, from_torch
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.stream import digest
from frodctl.errors import InvalidInput
from frodctl.formats.basis_file import ModuleRecord
from frodctl.training.layer import Basis, holds_matrix, is_dense, is_transposed

#: How far ‖W D[:, k]‖ may be from λ_k (relative, root mean square) without a further question, by the dtype of W; None:
#: quantized.
_TOLERANCE: dict[torch.dtype | None, float] = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-3,
    torch.float16: 5e-3,
    None: 1e-1,
}
#: Rounding of a quantized weight's elements, relative to their root mean square: that of 4 bits, about.
_QUANTIZATION = 0.15
_COLUMNS = 16
_BLOCK_ROWS = 1024


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


@dataclass(frozen=True)
class Held:
    """A live layer that holds a weight, or rows of it."""

    base: nn.Module  #: computes W x + b
    place: Place


@torch.no_grad()
def check_layer(
    held: Sequence[Held],
    basis: Basis,
    scales: Tensor,
    record: ModuleRecord,
    dtype: torch.dtype,
    where: str,
    alike: Tensor | None = None,
) -> None:
    """Compare ‖W D[:, k]‖ with λ_k on a few columns k; where they differ, find out whether that is rounding.

    Norms that agree to a fixed tolerance settle it. Else, where the layer holds W as a matrix, its digest may: the
    weight is the recorded one if its bytes are, in the dtype that they had in the checkpoint, and another one if they
    are not although the model has no fewer bits. Weights that were rounded to fewer bits, and quantized ones, may be
    off by what that explains (`_tolerance`). Where V is so badly conditioned that this is more than the layers of a
    category differ by, weights in each other's places are not told apart; another model's are, being off by the
    condition number.

    Parameters
    ----------
    held : sequence of Held
        The layers that have W, or rows of it, all of them together.
    basis : Basis
    scales : Tensor, (n,)
        λ of the weight.
    record : ModuleRecord
        What the basis file says of the weight.
    dtype : torch.dtype
        Of the layers' input.
    where : str
        The basis file, for the message.
    alike : Tensor, (N, n), optional
        λ of all of the category's weights: norms that agree with several of them settle nothing, and the digest must.

    Raises
    ------
    InvalidInput
        They differ by more than rounding or quantization explains.
    """
    weight: Any = getattr(held[0].base, "weight", None)
    kept = weight.dtype if type(weight) is nn.Parameter and weight.dtype in _TOLERANCE else None
    allowed = _TOLERANCE[kept]
    chosen = _columns(scales, basis.D.abs().amax(dim=0))
    norms = _norms(held, basis, chosen, dtype)
    error = float(_error(norms, scales[chosen]))
    if error <= allowed:
        several = alike is not None and int((_error(norms, alike[:, chosen]) <= allowed).sum()) > 1
        if several and kept is not None and _is_recorded(held, record) is False:
            raise _another(held, where, "its scales are, but its bytes are not")
        return
    spread = _spread(basis, scales)
    chosen = _columns(scales, spread)
    ratio = float((spread[chosen] / scales[chosen]).nan_to_num(0).double().square().mean().sqrt())
    recorded = _is_recorded(held, record) if kept is not None else None
    if recorded is None:
        error = float(_error(_norms(held, basis, chosen, dtype), scales[chosen]))
        noise = ratio * (_QUANTIZATION if kept is None else torch.finfo(kept).eps / 2)
        allowed = max(allowed, _tolerance(noise, record))
    if not (recorded or error <= allowed):
        raise _another(held, where, f"scales differ by {error:.1e} relative, {allowed:.0e} allowed")
    if ratio * torch.finfo(basis.D.dtype).eps / 2 > 1:
        kind = str(basis.D.dtype).removeprefix("torch.")
        warnings.warn(
            f"{record.category}: V is so badly conditioned that its inverse is mostly rounding in {kind}, and steps of "
            "training have far larger effects than meant; load the model in a dtype of more bits",
            stacklevel=2,
        )


def _another(held: Sequence[Held], where: str, found: str) -> InvalidInput:
    return InvalidInput(
        f"{held[0].place.path}: its weight is not the one that {where} was made from ({found}); "
        "give the basis of this model, or load the model that the basis names"
    )


def _columns(scales: Tensor, spread: Tensor) -> Tensor:
    """The k where λ_k is largest beside what rounding makes of ‖W D[:, k]‖."""
    gain = torch.where(scales > 0, scales / spread.to(scales), 0)
    count = int((gain > 0).sum()) or len(gain)
    return torch.topk(gain, min(_COLUMNS, count)).indices


def _norms(held: Sequence[Held], basis: Basis, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W D[:, k]‖ for the chosen k."""
    columns = basis.D[:, chosen].T.to(_wide(basis.D.device))
    parts = []
    for layer in held:
        base, rows = layer.base, slice(*(layer.place.rows or (None,)))
        products = _dense_products(base, columns) if is_dense(base) else _layer_products(base, columns, dtype)
        parts.append(products[:, rows])
    norms: Tensor = torch.linalg.vector_norm(torch.cat(parts, dim=1), dim=1)
    return norms


def _error(norms: Tensor, expected: Tensor) -> Tensor:
    """(‖W D[:, k]‖ − λ_k)/λ_k, root mean square over k, the last dimension of ``expected``."""
    expected = expected.to(norms)
    differences = torch.where(norms == expected, 0, norms - expected) / expected
    return differences.nan_to_num(nan=0, posinf=math.inf).square().mean(dim=-1).sqrt()


def _dense_products(base: nn.Module, columns: Tensor) -> Tensor:
    """W c (k, m) for each of the columns c (k, n)."""
    weight: Any = base.weight
    W = weight.T if is_transposed(base) else weight
    return torch.cat([columns @ rows.to(columns).T for rows in torch.split(W, _BLOCK_ROWS)], dim=1)


def _layer_products(base: nn.Module, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The same through the layer itself, whatever it holds."""
    tiny = torch.finfo(columns.dtype).tiny
    # as large as float16 can bear with ease, so that the bias does not swamp them
    factors = torch.exp2(torch.floor(torch.log2(64 / columns.abs().amax(dim=1, keepdim=True).clamp(min=tiny))))
    inputs = torch.cat([columns * factors, torch.zeros_like(columns[:1])]).to(dtype)
    outputs: Tensor = base(inputs).to(columns)
    return (outputs[:-1] - outputs[-1]) / factors


def _is_recorded(held: Sequence[Held], record: ModuleRecord) -> bool | None:
    """Whether a weight's bytes have the recorded digest; None where rounding to fewer bits may be why they do not, or
    not all of the bytes are at hand.
    """
    weight = _together(held, record)
    if weight is None:
        return None
    for name in FLOAT_DTYPES if record.dtype is None else (record.dtype,):
        cast = weight.detach().cpu().to(getattr(torch, DTYPES[name].name))
        if any(digest(from_torch(ordered.contiguous())) == record.digest for ordered in (cast, cast.T)):
            return True
    has_all_bits = record.dtype is not None and torch.promote_types(weight.dtype, cast.dtype) == weight.dtype
    return False if has_all_bits else None


def _matrix(base: nn.Module) -> Tensor:
    W: Tensor = base.weight  # type: ignore[assignment]
    return W


def _together(held: Sequence[Held], record: ModuleRecord) -> Tensor | None:
    """The weight, its rows as the checkpoint has them; None where a layer does not hold a matrix."""
    matrices = [_matrix(layer.base) for layer in held if holds_matrix(layer.base)]
    places = [layer.place for layer in held]
    if len(matrices) < len(held):
        return None
    if all(place.rows is None and place.taken is None for place in places):
        return matrices[0] if len(held) == 1 else None
    whole = matrices[0].new_empty(record.shape)
    filled = 0
    for W, place in zip(matrices, places, strict=True):
        part = W[slice(*(place.rows or (None,)))]
        whole[slice(None) if place.taken is None else torch.from_numpy(place.taken).to(W.device)] = part
        filled += len(part)
    return whole if filled == len(whole) else None


def _spread(basis: Basis, scales: Tensor) -> Tensor:
    """How far ‖W D[:, k]‖ (n,) is off, in units of u, where every element of W and D is off by about u of itself.

    Independent errors u w_ij d_jk add up to u² Σ_j ‖W[:, j]‖² d_jk², and ‖W[:, j]‖² is about Σ_k λ_k² v_jk², as U has
    unit columns: λ and V say how much a rounded W may be off, whatever the W at hand.
    """
    wide = _wide(basis.V.device)
    squares = scales.to(wide).square()
    lengths = torch.cat([rows.to(wide).square() @ squares for rows in torch.split(basis.V, _BLOCK_ROWS)])
    blocks = zip(torch.split(lengths, _BLOCK_ROWS), torch.split(basis.D, _BLOCK_ROWS), strict=True)
    return torch.stack([part @ rows.to(wide).square() for part, rows in blocks]).sum(dim=0).sqrt()


def _tolerance(noise: float, record: ModuleRecord) -> float:
    """How much norms may differ (relative, root mean square) by noise of this size, relative to them.

    Noise e changes the norm of y by ŷᵀe + ‖e‖²/2‖y‖, where ŷᵀe is about ‖e‖/√m, and by no more than ‖e‖. Times a few,
    as rows may outweigh the others.
    """
    m = record.shape[1 if record.transposed else 0]
    return min(2 * noise, 6 * noise / math.sqrt(m) + noise**2)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
