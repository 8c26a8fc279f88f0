"""Weights that a checkpoint stores once, or as copies, and a model uses as one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frodctl.checkpoint.source import Source
from frodctl.errors import InvalidInput

if TYPE_CHECKING:  # which knows its ties
    from frodctl.checkpoint.records import TensorInfo

_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|wte|(word_)?embeddings?|shared|embed_in|tok_embeddings|tokens_embed|w)\.weight"
)
_HEAD = re.compile(
    r"(.*\.)?(lm_head|embed_out|lm_head\.decoder|predictions\.decoder|output_projection|output_layer|generator_lm_head"
    r"|vocab_projector|lm_loss|pred_layer\.proj|proj_out|ff_out)\.weight"
    r"|((language_)?model\.)?(output|head|decoder)\.weight"
)
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration|ForPreTraining|ForSpeechSeq2Seq")
_OTHER_TOWERS = re.compile(r"vision|audio|image|video|speech")


@dataclass(frozen=True)
class Ties:
    """Which of a checkpoint's tensors stand for one parameter."""

    copies: frozenset[str]  #: stored although another tensor stands for them
    words: frozenset[str]  #: input embeddings and language-modelling heads that are one with each other
    shared: frozenset[str]  #: other tensors that are one: they lie at the same place, or are embeddings alike

    def broken_by(self, changed: Collection[str], *, with_head: bool = True) -> list[str]:
        """Those of the ``changed`` tensors that are tied to another, sorted.

        Without ``with_head`` the model is used without its language-modelling head.
        """
        tied = self.shared | self.words if with_head else self.shared
        return sorted(tied & set(changed))

    def require_kept(self, changed: Collection[str], where: str, *, with_head: bool = True) -> None:
        """`InvalidInput`, which begins with ``where``, if `broken_by` names any."""
        if broken := self.broken_by(changed, with_head=with_head):
            raise InvalidInput(
                f"{where}: {broken[0]} is tied to another tensor, and the merge would break the tie or change both; "
                "untie them in the base first (tie_word_embeddings)"
            )


def is_head(tensor: str) -> bool:
    """Whether a language model's output layer has a weight of this name."""
    return _HEAD.fullmatch(tensor) is not None


def find_ties(tensors: Mapping[str, TensorInfo], config: Mapping[str, object], source: Source | None) -> Ties:
    """Find the tied tensors of a checkpoint.

    Tensors of a pickled checkpoint are tied where they share their bytes, input embeddings also where theirs are equal.
    A head is tied to the embedding of its shape where the config says so. Where it does not, or its parts disagree (for
    many kinds of model transformers leaves out what is its default), the head is tied if it has the embedding's bytes,
    and a language model's embedding if no head is stored.

    Parameters
    ----------
    tensors, config : mapping
        The checkpoint's.
    source : Source or None
        Of its tensors; None where there is none, and then their bytes are not compared.
    """
    embeddings = [info for name, info in tensors.items() if _EMBEDDING.fullmatch(name) and len(info.shape) == 2]
    heads = [info for name, info in tensors.items() if is_head(name) and len(info.shape) == 2]
    firsts = {info.shape: info for info in reversed(embeddings)}
    twins = _alike([info for info in embeddings if info is not firsts[info.shape]], firsts, source)
    said = _said(config)
    if said is None:
        tied = _alike(heads, firsts, source)
    else:
        tied = {head.name: firsts[head.shape].name for head in heads if said and head.shape in firsts}
    words = {*tied, *tied.values()}
    if said or (said is None and not heads and _has_head(config)):  # the head need not be stored
        words.update(info.name for info in embeddings)
    together, again = _at_one_place(tensors.values())
    shared = together | {*twins, *twins.values()}
    return Ties(frozenset(again | {*twins, *tied} | _biases(tied, tensors)), frozenset(words), frozenset(shared))


def _biases(tied: Collection[str], tensors: Mapping[str, TensorInfo]) -> set[str]:
    """BERT and its kin store the bias of a tied head's decoder a second time, one level up."""
    paths = [name.removesuffix(".decoder.weight") for name in tied if name.endswith(".decoder.weight")]
    return {f"{path}.decoder.bias" for path in paths if f"{path}.bias" in tensors}


def _said(config: Mapping[str, object]) -> bool | None:
    """What the config and its parts say of tie_word_embeddings; None where they do not, or not all the same."""
    found, parts = set(), [config]
    while parts:
        part = parts.pop()
        flag = part.get("tie_word_embeddings")
        found |= {flag} if isinstance(flag, bool) else set()
        parts += [value for key, value in part.items() if isinstance(value, dict) and not _OTHER_TOWERS.search(key)]
    return found.pop() if len(found) == 1 else None


def _has_head(config: Mapping[str, object]) -> bool:
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any(_WITH_HEAD.search(str(name)) for name in architectures)


def _at_one_place(tensors: Collection[TensorInfo]) -> tuple[set[str], set[str]]:
    """The names of tensors that lie at the same place in the same shape; and without the first of each place."""
    places: dict[object, list[str]] = {}
    for info in tensors:
        if info.nbytes:
            places.setdefault((info.file, info.offset, info.shape, info.stride), []).append(info.name)
    groups = [names for names in places.values() if len(names) > 1]
    return {name for names in groups for name in names}, {name for names in groups for name in names[1:]}


def _alike(
    tensors: Collection[TensorInfo], firsts: Mapping[tuple[int, ...], TensorInfo], source: Source | None
) -> dict[str, str]:
    """Those of the tensors that have the same bytes as the first embedding of their shape, and its name."""
    pairs = [(info, firsts[info.shape]) for info in tensors if info.shape in firsts]
    if source is None:
        return {}
    return {info.name: first.name for info, first in pairs if same_bytes(source, info, source, first)}


def same_bytes(source: Source, one: TensorInfo, other_source: Source, other: TensorInfo) -> bool:
    """Whether two tensors of one shape have the same dtype and, element by element, the same bytes."""
    if one.dtype != other.dtype:
        return False
    if not (one.is_plain and other.is_plain):
        from frodctl.checkpoint.stream import read_tensor, tensor_bytes

        mine, theirs = read_tensor(source, one), read_tensor(other_source, other)
        return tensor_bytes(mine) == tensor_bytes(theirs)
    pieces = zip(source.chunks(one), other_source.chunks(other), strict=True)
    return all(first == second for first, second in pieces)
