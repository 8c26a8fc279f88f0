"""Each family from its checkpoint to a fine-tuned one and back; every day one for each way in which families differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import matrix
from tests.families.recipes import FAMILIES, STEPS, Family
from tests.families.trial import tried

#: Plain names; Conv1D; tied towers; a prefix and all names changed in loading; a tensor split, or fused; experts; a
#: weight that is read and not called; two towers.
EVERY_DAY = (
    "llama", "gpt2", "t5", "qwen2_vl", "vit", "dinov2, SwiGLU", "mixtral", "gpt_oss", "deepseek_v3", "mamba",
    "nemotron_h", "clip",
)  # fmt: skip
#: Whose experts are computed by code of their own: refused in words, and the rest trained.
WITHOUT_THEIR_EXPERTS = ("llama4", "llama4_text", "jetmoe")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name, marks=[] if f.name in EVERY_DAY else pytest.mark.long) for f in FAMILIES],
)
def test_a_family_comes_through_every_step_or_is_refused_in_words(family: Family, tmp_path: Path) -> None:
    row = tried(family, tmp_path)
    outcomes = {step: row.get(step, "not reached") for step in STEPS if step != "experts"}
    assert outcomes == dict.fromkeys(outcomes, "ok")
    expected = "refused" if family.name in WITHOUT_THEIR_EXPERTS else "ok"
    assert row.get("experts", "ok").partition(":")[0] == expected
    assert row["layers"] > 0


def test_the_families_of_every_day_are_there_and_no_name_twice() -> None:
    names = [family.name for family in FAMILIES]
    assert set(EVERY_DAY) <= set(names)
    assert len(set(names)) == len(names)


def test_the_table_of_a_run_that_goes_on_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All families are in the file already, and after them half a line of a run that was killed."""
    done = {"class": "X", "layers": 2, "note": "", "seconds": 1.0} | dict.fromkeys(STEPS, "ok")
    rows = [{**done, "family": family.name} for family in FAMILIES]
    rows[0] |= {"merge": "refused: model.layers.7.q_proj: too tall (and 3 more)"}
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[1], *lines]) + '\n{"family": "lla')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["matrix.py", "--output", str(tmp_path / "rows.jsonl")])
        assert matrix.main() == 0
    shown = capsys.readouterr().out
    assert f"{len(FAMILIES)} models, {len(FAMILIES) - 1} of them ok" in shown
    assert shown.count("`X`") == len(FAMILIES)
    assert "| refused (1) |" in shown
    assert "1. refused: …: too tall (and more)" in shown
