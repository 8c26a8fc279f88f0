"""The benchmarks against other tools run, on tiny matrices; what they measure says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALL = Path(__file__).parent / "bench" / "all.py"


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
