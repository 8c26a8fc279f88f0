"""A layer's experts: which of them a module belongs to, and how many of them a token has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from frodctl.checkpoint.records import Checkpoint
from frodctl.checkpoint.targets import Target, config_of

#: What configs call the number of experts that a token has.
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k")
_NUMBERED = re.compile(r"\[(\d+)\]$|\bexperts\.(\d+)\.")


def share_per_token(targets: Sequence[Target], checkpoint: Checkpoint) -> float | None:
    """The share of weights that takes part in one token: all, but of a layer's experts as many as its router chooses.

    None where the config does not say how many that are.
    """
    counts: dict[str, int] = {}
    for target in targets:
        if (number := expert_number(target.module)) is not None:
            layer = _NUMBERED.sub("", target.module)
            counts[layer] = max(counts.get(layer, 0), number + 1)
    shares = []
    for target in targets:
        count = counts.get(_NUMBERED.sub("", target.module))
        chosen = experts_per_token(config_of(target.module, checkpoint.config)) if count else None
        if count and chosen is None:
            return None
        shares.append(min(1.0, chosen / count) if count and chosen else 1.0)
    return sum(shares) / len(shares)


def expert_number(module: str) -> int | None:
    """Which of a layer's experts the module belongs to; None where it is no expert's.

    >>> expert_number("model.layers.3.mlp.experts.7.up_proj"), expert_number("model.layers.3.mlp.experts.up_proj[7]")
    (7, 7)
    """
    found = _NUMBERED.search(module)
    return None if found is None else int(found[1] or found[2])


def experts_per_token(config: Mapping[str, object]) -> int | None:
    """As a config says it; None where it does not."""
    found = (config.get(name) for name in _CHOSEN)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
