"""The study: its driver as it is run, only shorter; what it goes on with; the tables and plots made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from examples.study import report
from examples.study.__main__ import SHORT, SHORTER
from examples.study.methods import METHODS
from examples.study.parts import PARTS, Lab, read
from examples.study.tasks import TASKS, checkpoints

ROOT = Path(__file__).parent.parent


def run_study(*arguments: Any) -> str:
    """What the driver says."""
    command = [sys.executable, "-m", "examples.study", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a short run of all parts."""
    folder = tmp_path_factory.mktemp("study")
    run_study("--short", "--output", folder / "runs.jsonl", "--folder", folder / "made")
    return folder / "runs.jsonl"


def test_every_method_has_as_many_tries_for_every_task(short: Path) -> None:
    runs = [run for run in read(short) if run.part == "methods"]
    for task in TASKS:
        for method in METHODS:
            own = [run for run in runs if (run.task, run.method) == (task, method)]
            tries = {run.rate: run.loss for run in own if run.held_out == "validation"}
            tests = [run for run in own if run.held_out == "test"]
            assert len(tries) == 5
            assert [run.rate for run in tests] == [min(tries, key=lambda rate: tries[rate])]
            assert not {run.seed for run in tests} & {run.seed for run in own if run.held_out == "validation"}


def test_every_part_tries_its_ways_as_often_and_ends_in_tests(short: Path) -> None:
    runs = list(read(short))
    assert list(dict.fromkeys(run.part for run in runs)) == list(PARTS)
    assert all(isfinite(run.loss) and 0 <= run.accuracy <= 1 for run in runs)
    for part in set(PARTS) - {"methods", "rates"}:
        splits: dict[str, list[str]] = {}
        for run in runs:
            if run.part == part:
                splits.setdefault(run.method, []).append(run.held_out)
        assert len(splits) > 2
        assert all(found == ["validation", "test"] for found in splits.values())
    merged = {run.method for run in runs if run.merged is not None and isfinite(run.merged)}
    assert merged == {"FRoD over NF4", "FRoD over int8"}


def test_equal_numbers(short: Path) -> None:
    runs = [run for run in read(short) if run.part == "methods"]
    for task in TASKS:
        counts = {run.method: run.trained for run in runs if run.task == task}
        others = {method: counts[method] for method in ("rsLoRA", "SHiRA", "FRoD")}
        assert others == pytest.approx(dict.fromkeys(others, counts["LoRA"]), rel=0.01)
        assert counts["head alone"] == 0 or task in ("code", "prose")
        assert counts["full"] > 10 * counts["LoRA"]


def test_goes_on_where_it_was_cut_off(short: Path, tmp_path: Path) -> None:
    lines = short.read_text().splitlines(keepends=True)
    file = tmp_path / "runs.jsonl"
    file.write_text("".join(lines[:-1]) + lines[-1][:40])
    said: list[str] = []
    made = checkpoints(short.with_name("made"), 2)
    lab = Lab(file, made, SHORT, 2, range(1), said.append, **SHORTER)
    for part in PARTS.values():
        part(lab)
    assert len(said) == 1
    again, before = (json.loads(text.splitlines()[-1]) for text in (file.read_text(), lines[-1]))
    for found in (again, before):
        for time in ("preparing", "training"):
            del found[time]
    assert again == before


def test_the_report_fills_a_document(short: Path, tmp_path: Path) -> None:
    document = tmp_path / "study.md"
    document.write_text(
        "before\n<!-- study: methods losses -->\nold\n<!-- end -->\nbetween\n"
        "<!-- study: another losses -->\nkept\n<!-- end -->\n"
    )
    study = report.Study(read(short))
    text = report.written(document.read_text(), study)
    assert "old" not in text
    assert "kept" in text
    assert report.written(text, study) == text
    for method in METHODS:
        assert f"\n| {method} |" in text
    for name, (part, plot) in report.PLOTS.items():
        if study.ran(part):
            plot(study, tmp_path / name)
            assert (tmp_path / name).stat().st_size > 10_000


def test_the_error_beside_the_reference_is_that_of_the_seeds() -> None:
    assert report.mean([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert report.mean([2.0], 1, sign="+") == "+2.0"


def test_the_document_is_what_the_runs_say() -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    assert report.written(text, report.Study(read(ROOT / "examples" / "study" / "runs.jsonl"))) == text
