"""In how many bits a live model holds the weights that its checkpoint has in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from frodctl.adapted.conversion import Place
from frodctl.arrays import NAMED, NAMES, dtype_name
from frodctl.checkpoint import names

_BLOCK = 64  #: elements with one scale in bitsandbytes' 4 bits, unless it is told otherwise


def quantization_of(model: nn.Module, places: Mapping[str, Iterable[Place]]) -> dict[str, object]:
    """What an adapter records of its base: ``kind``, ``dtype`` and ``modules``; nothing where no layer is quantized.

    The kind is one of `frodctl.adapted.requantized.KINDS`, or for people alone. The modules are all that are quantized,
    by what an adapter calls those that it trains (``places``), and else by the model's own paths.
    """
    called: dict[str, list[str]] = {}
    for module, held in places.items():
        for place in held:
            called.setdefault(names.unwrapped(place.path), []).append(module)
    found: dict[str, tuple[str, torch.dtype]] = {}
    for path, layer in model.named_modules():
        kind = _kind(layer)
        if kind is not None:
            own = names.unwrapped(path.removesuffix(".base_layer"))
            found |= dict.fromkeys(called.get(own, [own]), (kind, _dtype(layer, model)))
    if not found:
        return {}
    kinds, dtypes = (sorted(set(map(str, values))) for values in zip(*found.values(), strict=True))
    dtype = next(iter(found.values()))[1]
    return {
        "kind": " and ".join(kinds),
        "dtype": NAMES[NAMED[dtype_name(torch.empty(0, dtype=dtype))]] if len(dtypes) == 1 else None,
        "modules": sorted(found, key=names.natural_key),
    }


def _kind(layer: nn.Module) -> str | None:
    """How the layer's own weight is quantized; None if it is not."""
    weight: Any = layer._parameters.get("weight")
    if weight is None:
        return None
    library, kind = type(weight).__module__.partition(".")[0], type(weight).__name__
    if library == "bitsandbytes" and kind == "Params4bit":
        usual = weight.blocksize == _BLOCK
        return f"{weight.quant_type}{'-double' if weight.compress_statistics else ''}" if usual else kind
    if library == "bitsandbytes" and kind == "Int8Params":
        return None if weight.has_fp16_weights else "llm-int8"
    if library == "torchao":
        by_rows = kind == "Int8Tensor" and list(weight.block_size) == [1, weight.shape[-1]]
        return "int8" if by_rows and weight.act_quant_kwargs is None else f"torchao's {kind}"
    return None if weight.is_floating_point() else type(layer).__name__


def _dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """What the weight was quantized from: its library tells, or the rest of the model."""
    weight: Any = layer._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    known = getattr(state, "original_dtype", getattr(state, "dtype", weight.dtype))
    if isinstance(known, torch.dtype) and known.is_floating_point:
        return known
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
