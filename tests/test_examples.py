"""The examples, run as their users run them."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: Any, timeout: float = 600) -> str:
    """What the script prints to stdout."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=timeout, check=False)
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
        assert losses[-1] < losses[0], run
        if run["method"] != "full fine-tuning":
            assert run["trained"] <= 0.018 * numbers["encoder"]
