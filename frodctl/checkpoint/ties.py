"""Weights that a checkpoint stores once and a model uses twice."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from frodctl.checkpoint.source import Checkpoint

_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|output_projection)\.weight")
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration|ForPreTraining|ForSpeechSeq2Seq")


def is_head(tensor: str) -> bool:
    """Whether a language model's output layer has a weight of this name."""
    return _HEAD.fullmatch(tensor) is not None


def ties_broken_by(checkpoint: Checkpoint, changed: Collection[str]) -> list[str]:
    """Those of the ``changed`` tensors that are tied to one that is not changed alike.

    A tie is read off the config, off a language model without a head of its own, and off tensors of a pickled
    checkpoint that share their bytes.
    """
    tied = [name for name in changed if _is_tied(checkpoint) and (is_head(name) or _EMBEDDING.fullmatch(name))]
    places: dict[Any, list[str]] = {}
    for info in checkpoint.tensors.values():
        if info.nbytes:
            places.setdefault((info.file, info.offset, info.shape, info.stride), []).append(info.name)
    shared = {name for group in places.values() if len(group) > 1 for name in group}
    return sorted({*tied, *(shared & set(changed))})


def _is_tied(checkpoint: Checkpoint) -> bool:
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    flags = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    if flags:
        return any(flags)
    architectures = checkpoint.config.get("architectures") or ()
    has_head = any(is_head(name) for name in checkpoint.tensors)
    return not has_head and any(_WITH_HEAD.search(str(name)) for name in architectures)
