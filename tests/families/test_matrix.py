"""Each family from its checkpoint to a fine-tuned one and back; every day one for each way in which families differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.recipes import FAMILIES, Family
from tests.families.trial import STEPS, tried

#: Plain names; Conv1D; tied towers; a prefix and all names changed in loading; a tensor split, or fused; experts; a
#: weight that is read and not called; two towers.
EVERY_DAY = (
    "llama", "gpt2", "t5", "qwen2_vl", "vit", "dinov2, SwiGLU", "mixtral", "gpt_oss", "deepseek_v3", "mamba",
    "nemotron_h", "clip",
)  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name, marks=[] if f.name in EVERY_DAY else pytest.mark.long) for f in FAMILIES],
)
def test_a_family_comes_through_every_step_or_is_refused_in_words(family: Family, tmp_path: Path) -> None:
    row = tried(family, tmp_path)
    outcomes = {step: row.get(step, "not reached") for step in STEPS if step != "experts"}
    assert outcomes == dict.fromkeys(outcomes, "ok")
    assert row.get("experts", "ok").startswith(("ok", "refused: "))
    assert row["layers"] > 0


def test_the_families_of_every_day_are_there_and_no_name_twice() -> None:
    names = [family.name for family in FAMILIES]
    assert set(EVERY_DAY) <= set(names)
    assert len(set(names)) == len(names)
