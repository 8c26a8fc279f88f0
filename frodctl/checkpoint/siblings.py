"""Which layers of a block read the same activations, known from their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from frodctl.checkpoint import names

#: Query, key and value of an attention. In self-attention all of them read one tensor, in cross-attention the last two.
_ATTENTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
_CROSS_ATTENTION = re.compile(r"cross|enc.*att", re.IGNORECASE)
#: Gate and input projection of a gated feed-forward network.
_GATED = (("gate_proj", "up_proj"), ("wi_0", "wi_1"))
#: The same as Mixtral and the first Llama call it; elsewhere a w3 may come after a w1.
_GATED_BY_NUMBER = ("w1", "w3")
_HAS_GATED_BY_NUMBER = re.compile(r"experts|feed_forward")


def joined(widths: Mapping[str, int]) -> dict[str, str]:
    """Paths that stand for several modules, which read one tensor.

    Parameters
    ----------
    widths : mapping of str to int
        Modules and their ``in_features``.

    Returns
    -------
    dict of str to str
        For each module that reads the same as others of them, beside it and of the same width, a path for all of
        these: their parent's, and their names.

    Examples
    --------
    >>> joined({"layers.0.attn.q_proj": 8, "layers.0.attn.v_proj": 8, "layers.0.attn.o_proj": 8})
    {'layers.0.attn.q_proj': 'layers.0.attn.q_proj_v_proj', 'layers.0.attn.v_proj': 'layers.0.attn.q_proj_v_proj'}
    """
    places: dict[tuple[str, int], set[str]] = {}
    for module, width in widths.items():
        parent, _, last = names.role(module).rpartition(".")
        places.setdefault((parent, width), set()).add(last)
    together = {place: _together(place[0], lasts) for place, lasts in places.items()}
    found = {}
    for module, width in widths.items():
        parent, _, last = module.rpartition(".")
        if group := together[names.role(module).rpartition(".")[0], width].get(last):
            found[module] = f"{parent}.{group}" if parent else group
    return found


def _together(parent: str, lasts: set[str]) -> dict[str, str]:
    """By name, for those of a parent's modules that read one tensor, the names of all that do."""
    groups = [*_attentions(parent, lasts), *_GATED]
    if _HAS_GATED_BY_NUMBER.search(parent.rpartition(".")[2]):
        groups.append(_GATED_BY_NUMBER)
    present = [[name for name in group if name in lasts] for group in groups]
    return {name: "_".join(group) for group in present if len(group) > 1 for name in group}


def _attentions(parent: str, lasts: set[str]) -> list[tuple[str, ...]]:
    """Keys and values without a query may be of something else than self-attention: RWKV's differ in their input."""
    if any(map(_CROSS_ATTENTION.search, parent.split(".")[-3:])):
        return [group[1:] for group in _ATTENTIONS]
    return [group for group in _ATTENTIONS if group[0] in lasts]
