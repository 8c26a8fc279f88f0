"""Checkpoints whose weights are packed or scaled: FP8 with scales is read, all else recognised and refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod

from frodctl.checkpoint.codec import DTYPE_BITS
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import Checkpoint, Scaled, TensorInfo
from frodctl.errors import InvalidInput

_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|weight_blocks|\w+_blocks"
    r"|SCB|W_q|weight_format|weight\.(absmax|quant_map|quant_state\..*|nested_absmax))$"
)
_CODES = ("F8_E4M3", "F8_E5M2")
#: What DeepSeek's and compressed-tensors' checkpoints call the scales of a module's weight.
_SCALES = ("weight_scale_inv", "weight_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16")
#: Of the activations, for arithmetic in 8 bits: no part of the weights.
_ACTIVATIONS = ("input_scale", "activation_scale")
_DEFAULT_BLOCK = (128, 128)


def with_scales(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each weight of 8 bits and its scales as one tensor, whose values are read.

    Its scales are DeepSeek's ``weight_scale_inv`` or compressed-tensors' ``weight_scale``, for the whole weight, each
    row or each block, whose size the config says. What has other scales, or none, is left as it is.
    """
    blocks = [*_blocks(checkpoint.config), _DEFAULT_BLOCK]
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, info in checkpoint.tensors.items():
        scaled = _scaled(info, checkpoint.tensors, blocks)
        if scaled is not None:
            found[name] = replace(info, dtype="F32", scaled=scaled)
            used |= {scaled.scales.name, *(_beside(name, scale) for scale in _ACTIVATIONS)}
    if not found:
        return checkpoint
    tensors = {name: found.get(name, info) for name, info in checkpoint.tensors.items() if name not in used}
    return replace(checkpoint, tensors=tensors)


def _scaled(info: TensorInfo, tensors: Mapping[str, TensorInfo], blocks: Collection[tuple[int, int]]) -> Scaled | None:
    """The weight's parts; None where it is none of 8 bits, or its scales are not understood."""
    if not info.name.endswith(".weight") or info.dtype not in _CODES or len(info.shape) != 2 or 0 in info.shape:
        return None
    if _beside(info.name, "weight_zero_point") in tensors:
        return None
    scales = next((found for name in _SCALES if (found := tensors.get(_beside(info.name, name)))), None)
    if scales is None or scales.dtype not in _SCALE_DTYPES or not (info.is_plain and scales.is_plain):
        return None
    block = _block(info.shape, scales.shape, blocks)
    return None if block is None else Scaled(info, scales, block)


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """What one scale is for, where (m, n) has scales of such a shape."""
    m, n = shape
    if prod(scales) == 1:
        return m, n
    if scales in ((m,), (m, 1)):
        return 1, n
    return next((block for block in blocks if scales == (-(-m // block[0]), -(-n // block[1]))), None)


def _blocks(config: Mapping[str, Json]) -> Iterator[tuple[int, int]]:
    """The sizes of blocks that a config speaks of: transformers' FP8, and compressed-tensors' groups of modules."""
    for settings in _settings(config):
        groups = settings.get("config_groups")
        schemes = [group.get("weights") for group in _objects(groups.values() if isinstance(groups, dict) else ())]
        for size in (settings.get("weight_block_size"), *(s.get("block_structure") for s in _objects(schemes))):
            if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
                yield size[0], size[1]


def _settings(config: Mapping[str, Json]) -> Iterator[Mapping[str, Json]]:
    """What a config, or the part of it for one tower, says of quantization."""
    yield from (s for part in (config, *_objects(config.values())) for s in _objects([part.get("quantization_config")]))


def _objects(values: Collection[Json]) -> list[dict[str, Json]]:
    return [value for value in values if isinstance(value, dict) and value]


def _beside(name: str, other: str) -> str:
    """What the module of the weight ``name`` calls another of its tensors."""
    return f"{name.removesuffix('.weight')}.{other}"


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `InvalidInput` for a GPTQ, AWQ, bitsandbytes or other checkpoint whose weights cannot be read."""
    settings = next(_settings(checkpoint.config), None)
    method = str(settings.get("quant_method", "unknown method")) if settings else None
    if any(info.scaled for info in checkpoint.tensors.values()):
        method = None  # the tensors tell whether all are read
    packed = next((name for name in checkpoint.tensors if _PACKED.search(name)), None)
    narrow = next((t for t in checkpoint.tensors.values() if _is_packed(t)), None)
    if method is None and packed is None and narrow is None:
        return
    evidence = f"quantization_config: {method}" if method else f"tensor {packed or (narrow and narrow.name)}"
    raise InvalidInput(
        f"{checkpoint.model}: the weights are quantized ({evidence}), and of such only FP8 with scales of weights, "
        "rows or blocks is read. Take the full-precision checkpoint this one was made from."
    )


def _is_packed(info: TensorInfo) -> bool:
    narrow = info.dtype.startswith("F") and DTYPE_BITS[info.dtype] <= 8
    return narrow or (info.name.endswith(".weight") and info.dtype in ("I8", "U8", "I32", "U32"))
