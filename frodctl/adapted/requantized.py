"""A base's weights as a live model holds them in fewer bits: by the libraries that quantize and dequantize it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from frodctl.errors import FrodctlError

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

_BLOCK = 64  #: elements with one scale in bitsandbytes' 4 bits, unless it is told otherwise


def requantized(W: HostArray, kind: str, dtype: str) -> HostArray:
    """What a layer multiplies by.

    Parameters
    ----------
    W : HostArray, (m, n)
        The weight as the checkpoint has it, in nn.Linear's orientation.
    kind : str
        One of `KINDS`.
    dtype : str
        Of the model as it is loaded (the format's name), from which it is quantized.

    Returns
    -------
    HostArray, (m, n)
        float32.
    """
    import numpy as np
    import torch

    from frodctl.arrays import DTYPES, from_torch, to_torch

    X = to_torch(np.ascontiguousarray(W)).to(getattr(torch, DTYPES[dtype].name))
    with torch.no_grad():
        return from_torch(KINDS[kind](X).float().contiguous())


def require_library(kind: str) -> str:
    """The name and version of the library that quantizes so; `FrodctlError` where it is not installed."""
    library = "torchao" if kind == "int8" else "bitsandbytes"
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        raise FrodctlError(
            f"`base_as` {kind}: {library}, whose own code does it, is not installed: pip install 'frodctl[quantized]'"
        ) from None


def _in_4_bits(X: Any, quant_type: str, nested: bool) -> Any:
    """bitsandbytes' NF4 and FP4, whose layers multiply by what they dequantize to, in the dtype of the model."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(X, blocksize=_BLOCK, compress_statistics=nested, quant_type=quant_type)
    return functional.dequantize_4bit(codes, state)


def _weight_only_int8(X: Any) -> Any:
    """torchao's, with a scale for each row."""
    import torch
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-untyped]

    layer = nn.Linear(X.shape[1], X.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(X, requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    held: Any = layer.weight
    return held.dequantize(torch.float32)


def _llm_int8(X: Any) -> Any:
    """The weights of bitsandbytes' LLM.int8(), which go through float16 there."""
    from bitsandbytes import functional

    codes, stats, _ = functional.int8_vectorwise_quant(X.half())
    return functional.int8_vectorwise_dequant(codes, stats)


#: By the name that an adapter records.
KINDS: Mapping[str, Callable[[Any], Any]] = {
    "nf4": partial(_in_4_bits, quant_type="nf4", nested=False),
    "nf4-double": partial(_in_4_bits, quant_type="nf4", nested=True),
    "fp4": partial(_in_4_bits, quant_type="fp4", nested=False),
    "fp4-double": partial(_in_4_bits, quant_type="fp4", nested=True),
    "int8": _weight_only_int8,
    "llm-int8": _llm_int8,
}
