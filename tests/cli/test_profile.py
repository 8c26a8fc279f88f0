"""``--profile``: a table on stderr, a list in JSON, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import frodctl as package
from tests.conftest import EXAMPLE, Run

CORPUS = Path(__file__).parent.parent / "corpus" / "553d683"
KEYS = [
    "step", "dtype", "threads", "calls", "seconds", "flops", "gflops_per_second", "gemm_share", "bytes",
    "gigabytes_per_second",
]  # fmt: skip
COMMANDS: dict[str, list[Any]] = {
    "decompose": ["decompose", EXAMPLE, "--target-modules", "all-linear", "-o", "out.safetensors", "--force"],
    "merge": ["merge", EXAMPLE, CORPUS / "lean", "out", "--basis", CORPUS / "basis.safetensors", "--force"],
    "inspect": ["inspect", EXAMPLE, "--spectrum"],
}
STEPS = {
    "decompose": {"planning", "syevd", "gemm", "waiting for weights", "reading", "writing", "checking the file"},
    "merge": {"planning", "gemm", "inverse", "waiting for weights", "waiting for writes", "checking the files"},
    "inspect": {"planning", "matmul", "eigvalsh", "reading"},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_json_has_the_steps(name: str, frodctl: Run) -> None:
    done = frodctl(*COMMANDS[name], "--profile", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    steps = json.loads(done.stdout)["profile"]
    assert all(list(step) == KEYS for step in steps)
    assert {step["step"] for step in steps} >= STEPS[name]
    assert {step["threads"] for step in steps} <= {"command", "workers"}
    assert steps[-1]["step"] == "rest"
    for step in steps:
        assert (step["flops"] is None) == (step["gflops_per_second"] is None) == (step["gemm_share"] is None)
        assert step["flops"] is None or step["bytes"] is None


@pytest.mark.parametrize("name", ["decompose", "merge"])
def test_steps_hold_the_time_of_the_job(name: str, frodctl: Run) -> None:
    document = json.loads(frodctl(*COMMANDS[name], "--profile", "--json").stdout)
    total = sum(step["seconds"] for step in document["profile"] if step["threads"] == "command")
    assert total >= document["seconds"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_is_not_data(name: str, frodctl: Run, tmp_path: Path) -> None:
    plain = frodctl(*COMMANDS[name], "--format", "tsv")
    files = contents(tmp_path)
    measured = frodctl(*COMMANDS[name], "--format", "tsv", "--profile")
    assert contents(tmp_path) == files
    assert measured.stdout.splitlines()[0] == plain.stdout.splitlines()[0]
    assert len(measured.stdout.splitlines()) == len(plain.stdout.splitlines())
    assert "GFLOP/s" not in plain.stderr
    lines = measured.stderr.splitlines()
    (header,) = [line for line in lines if "GFLOP/s" in line]
    assert header.split()[:5] == ["step", "dtype", "in", "calls", "s"]
    assert any(line.startswith("total ") for line in lines)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_unasked_there_is_none(name: str, frodctl: Run) -> None:
    assert "profile" not in json.loads(frodctl(*COMMANDS[name], "--json").stdout)


@pytest.mark.parametrize("name", ["decompose", "merge"])
def test_a_dry_run_has_an_estimate_and_no_profile(name: str, frodctl: Run) -> None:
    refused = frodctl(*COMMANDS[name], "--dry-run", "--profile")
    assert refused.returncode == 2
    assert "--profile" in refused.stderr
    done = frodctl(*COMMANDS[name], "--dry-run", "--json")
    assert json.loads(done.stdout)["seconds_estimate"] > 0
    assert "operations, about " in done.stderr


def test_from_python(tmp_path: Path) -> None:
    result = package.decompose(EXAMPLE, tmp_path / "a.safetensors", profile=True)
    assert result.profile is not None
    assert "syevd" in {step.name for step in result.profile}
    assert package.decompose(EXAMPLE, tmp_path / "b.safetensors").profile is None
    assert package.inspect(EXAMPLE, profile=True).profile is not None
    merged = package.merge(
        EXAMPLE, CORPUS / "lean", tmp_path / "merged", basis=CORPUS / "basis.safetensors", profile=True
    )
    assert merged.profile is not None
    plan = package.decompose(EXAMPLE, dry_run=True)
    assert plan.seconds_estimate is not None


def test_no_estimate_for_a_device_that_is_not_here(frodctl: Run) -> None:
    done = frodctl(*COMMANDS["decompose"], "--dry-run", "--json", "--device", "cuda:99")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seconds_estimate"] is None
