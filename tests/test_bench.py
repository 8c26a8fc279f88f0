"""The benchmarks run, on tiny matrices; what they measure says nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent / "bench"
ALL, GPU = BENCH / "all.py", BENCH / "gpu.py"


@pytest.mark.long
def test_every_case_gives_figures(tmp_path: Path) -> None:
    output = tmp_path / "all.json"
    subprocess.run([sys.executable, ALL, "--quick", "--all-layers", "--output", output], check=True)
    report = json.loads(output.read_text())
    assert {case["section"] for case in report["cases"]} == {"Decompose", "Merge", "Inspect", "Start"}
    for case in report["cases"]:
        assert not case["error"]
        for row in case["rows"]:
            assert not row["error"]
            assert row["seconds"] > 0
            assert row["peak_mb"] > 5
    assert all(rate > 0 for rates in report["gemm_gflops"] for dtypes in rates.values() for rate in dtypes.values())


def test_the_figures_of_a_gpu_on_a_cpu() -> None:
    done = subprocess.run(
        [sys.executable, GPU, "--device", "cpu", "--small"], check=True, capture_output=True, text=True
    )
    for name in ("decompose", "merge", "inspect --spectrum"):
        assert re.search(rf"^\| {name} \| \d+\.\d+ s \| – \| \d+\.\d+ s \| \d+% \|", done.stdout, re.M), done.stdout
    for method in ("full", "input", "weight"):
        assert re.search(rf"^\| {method} \| 64 \| \d+ \|", done.stdout, re.M), done.stdout
    assert re.search(r"^\| syevd \| float64 \| \d+ \|", done.stdout, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = subprocess.run([sys.executable, GPU], check=True, capture_output=True, text=True)
    assert done.stdout == f"torch {torch.__version__} finds no GPU here: nothing to measure\n"
