"""The examples, run as their users run them, only shorter."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.documents import in_shell

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(script: str, *arguments: Any) -> str:
    """What the example prints to stdout."""
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetune_compares_the_methods(tmp_path: Path) -> None:
    shown = run_example("finetune.py", "--short", "--json", tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    methods = {run["method"] for run in numbers["runs"]}
    assert methods == {"full fine-tuning", "head alone", "LoRA, r = 8 (PEFT)", "FRoD (PEFT)", "FRoD (frodctl)"}
    for method in methods:
        assert shown.count(f"\n| {method} |") == 4  # rates, losses, accuracies, steps
        assert sum(run["method"] == method for run in numbers["tries"]) == 2
    for run in numbers["runs"]:
        losses = [point["loss"] for point in run["curve"]]
        assert all(map(isfinite, losses))
        assert losses[-1] < losses[0] or run["method"] == "head alone", run
        if run["method"] != "full fine-tuning":
            assert run["trained"] <= 0.018 * numbers["encoder"]


@pytest.mark.long
def test_compressed_measures_what_is_left() -> None:
    shown = run_example("compressed.py", "--short")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    [[_, *lines], [_, *whole]] = split_at_headers(rows)
    for first, second, *_ in (lines, whole):
        assert first[2:4] == ["0.0", "1.000"]  # the base keeps nothing
        assert second[2:4] == ["100.0", "0.000"]
    assert [line[0] for line in lines[2:]] == ["LoRA, r = 16", "LoRA, r = 64", "LoRA, r = 256"]
    kept = [float(line[2]) for line in lines[2:]]
    assert 0 < kept[0] < kept[1] < kept[2] < 100
    for three in (whole[2:5], whole[5:]):  # at about equal bytes
        assert [line[0].split()[0] for line in three] == ["FRoD,", "LoRA,", "the"]
        sizes = [float(line[1].removesuffix(" MB")) for line in three]
        assert max(sizes) <= 1.3 * min(sizes)
        assert all(0 < float(line[2]) < 100 for line in three)


def split_at_headers(rows: list[list[str]]) -> list[list[list[str]]]:
    """Tables, each with its header and without the line below it."""
    starts = [number - 1 for number, row in enumerate(rows) if row[0] == "---"]
    ends = [*starts[1:], len(rows)]
    return [[rows[start], *rows[start + 2 : end]] for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized(quantization: str, example: Path, tmp_path: Path) -> None:
    shown = run_example("quantized.py", example, tmp_path, "--quantization", quantization, "--steps", 10)
    rows = {line[:36].strip(): [float(v.rstrip("%")) for v in line[36:].split()] for line in shown.splitlines()[1:]}
    for where in ("quantized", "full precision"):
        untrained, trained = rows[f"held-out loss, {where}"]
        assert trained < untrained - 0.1
    untrained, trained = rows["KL(quantized ‖ full precision)"]
    assert 0 < trained < 2 * untrained
    assert min(rows["same most likely token"]) > 75
    assert 0 < rows["KL(quantized ‖ merged as trained)"][0] < trained
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}  # as the base


def test_the_story(example: Path, tmp_path: Path) -> None:
    """Every command of it, with fewer steps; `tests/test_docs.py` runs them one by one, with what they print."""
    code, shown = in_shell(f"bash {EXAMPLES}/story.sh {tmp_path} --steps 3")
    assert code == 0, shown
    assert "nothing has changed" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"basis.safetensors", "adapter", "merged"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_peft_bridge(example: Path, tmp_path: Path) -> None:
    lines = run_example("peft_bridge.py", example, tmp_path, "--steps", 3).splitlines()
    changed = float(lines[0].split("by up to ")[1].split(";")[0])
    wrong, repaired, loaded = ([float(value) for value in line.split()[-2:]] for line in lines[2:5])
    assert min(wrong) > 0.5 * changed > 0.1
    assert max(repaired + loaded) < 1e-4 * changed
    assert [line.endswith("repair mended 56 layers") for line in lines[5:]] == [True, True]
