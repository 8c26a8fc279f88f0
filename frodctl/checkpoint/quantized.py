"""Recognise checkpoints whose weights are packed or scaled: their tensors are not the model's weights."""

from __future__ import annotations

import re

from frodctl.checkpoint.codec import DTYPE_BITS
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.errors import InvalidInput

_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|weight_blocks|\w+_blocks"
    r"|SCB|W_q|weight_format|weight\.(absmax|quant_map|quant_state\..*|nested_absmax))$"
)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `InvalidInput` for a GPTQ, AWQ, bitsandbytes, FP8 or other quantized checkpoint."""
    configs = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    settings = next((s for c in configs if isinstance(s := c.get("quantization_config"), dict) and s), None)
    method = str(settings.get("quant_method", "unknown method")) if settings else None
    packed = next((name for name in checkpoint.tensors if _PACKED.search(name)), None)
    narrow = next((t for t in checkpoint.tensors.values() if _is_packed(t)), None)
    if method is None and packed is None and narrow is None:
        return
    evidence = f"quantization_config: {method}" if method else f"tensor {packed or (narrow and narrow.name)}"
    raise InvalidInput(
        f"{checkpoint.model}: the weights are quantized ({evidence}). "
        "Decompose the full-precision checkpoint this one was made from."
    )


def _is_packed(info: TensorInfo) -> bool:
    narrow = info.dtype.startswith("F") and DTYPE_BITS[info.dtype] <= 8
    return narrow or (info.name.endswith(".weight") and info.dtype in ("I8", "U8", "I32", "U32"))
