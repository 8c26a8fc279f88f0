"""Weights that a checkpoint stores once and a model uses twice."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from frodctl.checkpoint import codec
from frodctl.checkpoint.source import Checkpoint

_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|output_projection)\.weight")
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration|ForPreTraining|ForSpeechSeq2Seq")


def is_head(tensor: str) -> bool:
    """Whether a language model's output layer has a weight of this name."""
    return _HEAD.fullmatch(tensor) is not None


def ties_broken_by(checkpoint: Checkpoint, changed: Collection[str], *, with_head: bool = True) -> list[str]:
    """Those of the ``changed`` tensors that are tied to one that is not changed alike.

    A tie is read off the config; where that is silent, off a language model without a head of its own, or with one
    that has the embedding's bytes; and off tensors of a pickled checkpoint that share theirs. Without ``with_head`` the
    model is used without its language-modelling head.
    """
    embeds = [name for name in checkpoint.tensors if _EMBEDDING.fullmatch(name)]
    heads = [name for name in checkpoint.tensors if is_head(name)]
    ours = [name for name in changed if is_head(name) or _EMBEDDING.fullmatch(name)]
    tied = ours if with_head and ours and _is_tied(checkpoint, embeds, heads) else []
    places: dict[Any, list[str]] = {}
    for info in checkpoint.tensors.values():
        if info.nbytes:
            places.setdefault((info.file, info.offset, info.shape, info.stride), []).append(info.name)
    shared = {name for group in places.values() if len(group) > 1 for name in group}
    return sorted({*tied, *(shared & set(changed))})


def _is_tied(checkpoint: Checkpoint, embeddings: Sequence[str], heads: Sequence[str]) -> bool:
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    flags = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    if flags:
        return any(flags)
    if heads:
        return any(_same_bytes(checkpoint, head, embedding) for head in heads for embedding in embeddings)
    architectures = checkpoint.config.get("architectures") or ()
    return any(_WITH_HEAD.search(str(name)) for name in architectures)


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.shape, one.dtype) != (other.shape, other.dtype) or checkpoint.root is None or one.data is not None:
        return False
    root = checkpoint.root
    pieces = zip(
        codec.read_chunks(root / one.file, one.offset, one.nbytes),
        codec.read_chunks(root / other.file, other.offset, other.nbytes),
        strict=False,
    )
    return all(a == b for a, b in pieces)
