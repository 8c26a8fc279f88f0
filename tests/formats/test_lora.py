"""LoRA's config, and the limits of those who read it."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from frodctl.formats.lora import Setting, config, factor_keys, refusals, served_rank


@pytest.mark.parametrize(
    ("rank", "limit"), [(1, 1), (2, 8), (8, 8), (17, 32), (64, 64), (200, 256), (257, 320), (512, 512), (513, None)]
)
def test_the_rank_that_vllm_is_to_be_told(rank: int, limit: int | None) -> None:
    assert served_rank(rank) == limit
    assert bool(refusals(rank, several_ranks=False, others=())) == (limit is None)


def test_ranks_of_their_own_are_patterns_of_peft() -> None:
    """The usual one is r; PEFT takes every field, and finds each module's rank."""
    ranks = {"layers.0.up": 4, "layers.1.up": 4, "layers.10.up": 9}
    found = config(ranks, Setting("base", fan_in_fan_out=True, modules_to_save=("score",), bias="all"))
    assert (found["r"], found["lora_alpha"]) == (4, 4)
    assert found["rank_pattern"] == found["alpha_pattern"] == {"layers.10.up": 9}
    assert found["target_modules"] == list(ranks)
    known = LoraConfig.from_peft_type(**found)
    assert (
        known.to_dict().items() >= {k: v for k, v in found.items() if k not in ("peft_type", "target_modules")}.items()
    )
    assert set(known.target_modules) == set(ranks)


def test_names() -> None:
    assert factor_keys("a.b") == ("base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight")
