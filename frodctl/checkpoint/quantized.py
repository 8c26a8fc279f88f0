"""Recognise checkpoints whose weights are packed or scaled: their tensors are not the model's weights."""

from __future__ import annotations

import re

from frodctl.checkpoint.source import Checkpoint
from frodctl.errors import InvalidInput

_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|weight_blocks|\w+_blocks"
    r"|SCB|weight_format|weight\.(absmax|quant_map|quant_state\..*|nested_absmax))$"
)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `InvalidInput` for a GPTQ, AWQ, bitsandbytes, FP8 or other quantized checkpoint."""
    settings = checkpoint.config.get("quantization_config")
    method = str(settings.get("quant_method", "unknown method")) if isinstance(settings, dict) else None
    packed = next((name for name in checkpoint.tensors if _PACKED.search(name)), None)
    narrow = next((t for t in checkpoint.tensors.values() if t.name.endswith(".weight") and _is_packed(t.dtype)), None)
    if method is None and packed is None and narrow is None:
        return
    evidence = f"quantization_config: {method}" if method else f"tensor {packed or (narrow and narrow.name)}"
    raise InvalidInput(
        f"{checkpoint.model}: the weights are quantized ({evidence}). "
        "Decompose the full-precision checkpoint this one was made from."
    )


def _is_packed(dtype: str) -> bool:
    return dtype.startswith(("F8", "F6", "F4")) or dtype in ("I8", "U8", "I32", "U32")
