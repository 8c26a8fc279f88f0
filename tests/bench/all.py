"""frodctl against its peers on this machine: decompose, merge, inspect and the start, whole processes in turns.

    python tests/bench/all.py --weightwatcher-python ww/bin/python --output all.json --write

(How to make that Python: inspect_spectrum.py; without it frodctl's spectra stand alone.) Printed are medians of 3 and,
as they were at the beginning and at the end, the rates of the machine's matrix products. --output has every run in
JSON, written anew after each case; --write puts the tables into docs/measurements.md. A case that fails is reported,
and the others go on. --all-layers adds decompose for the 22 layers of TinyLlama-1.1B, half an hour by itself; --quick
runs every case once on tiny matrices, to see that all works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import decompose
import inspect_spectrum
import machine
import merge
import start
from checkpoints import SMOLLM2_135M, TINYLLAMA_1B, make_llama, make_matrices
from process import Row, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements.md"
BLOCK = re.compile(r"(?<=<!-- written by tests/bench/all\.py -->\n\n).*(?=\n<!-- end of what it wrote -->)", re.DOTALL)
#: The least that every program takes, for --quick.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SECTIONS = {
    "Decompose": """\
PEFT's process loads the model, calls `get_peft_model` and saves the adapter with its projections.""",
    "Merge": """\
All-linear adapters at sparsity 0.01, one in PEFT's layout and one of frodctl's, which PEFT cannot merge. PEFT's process
loads the model and its adapter, calls `merge_and_unload` and saves.""",
    "Inspect": """\
`frodctl inspect --spectrum` against [WeightWatcher](https://weightwatcher.ai)'s `analyze()` with its defaults, on one
thread and on one for each core.""",
    "Start": """\
`frodctl --help`, and `frodctl inspect` of a checkpoint's headers, beside what Python takes for nothing and
for imports.""",
}
TURNS = """\
Whole processes in turns, medians of {repeats}. The weights are random, in bfloat16, in the shapes of real models; every
linear layer of the blocks is taken. Before and after, the machine multiplied matrices at these rates:"""


@dataclass(frozen=True)
class Case:
    """A benchmark: its section and title, the minutes that it takes with 3 repeats on two cores, and how it is run."""

    section: str
    title: str
    minutes: float
    measure: Callable[[Path], list[Row]]


@dataclass
class Outcome:
    """What became of a case: its rows, or why there are none; the minutes that it took, preparations included."""

    section: str
    title: str
    minutes: float
    rows: list[Row]
    error: str = ""

    def failures(self) -> list[str]:
        """What failed, in whole."""
        rows = [f"{row.command}: {row.error}" for row in self.rows if row.error]
        return [self.error, *rows] if self.error else rows

    def shown(self) -> str:
        """The rows as a table, or the error in a line."""
        return f"(failed: {self.error.splitlines()[-1]})" if self.error else table(self.rows)


@dataclass
class Report:
    """Everything that is written: the machine, its rates as they were measured now and then, and the outcomes."""

    date: str
    processor: str
    cores: int
    load_average: float
    versions: dict[str, str]
    repeats: int
    gemm_size: int
    gemm_gflops: list[machine.Rates] = field(default_factory=list)
    cases: list[Outcome] = field(default_factory=list)


def cases(models: Path, arguments: argparse.Namespace) -> list[Case]:
    """All benchmarks; checkpoints are made in the folder ``models`` when they are first needed."""
    tiny, repeats, warm_up = TINY if arguments.quick else {}, arguments.repeats, not arguments.quick

    def small() -> Path:
        return make_llama(models / "SmolLM2-135M", SMOLLM2_135M | tiny)

    def large(layers: int) -> Path:
        return make_llama(models / f"TinyLlama-{layers}", TINYLLAMA_1B | {"num_hidden_layers": layers} | tiny)

    def matrices() -> Path:
        return make_matrices(models / "matrices", 8, *((64, 176) if arguments.quick else (2048, 5632)))

    def spectra(model: Path) -> list[Row]:
        return inspect_spectrum.measure(model, repeats, arguments.weightwatcher_python, warm_up=warm_up)

    found = [
        Case("Start", "`--help`, and `inspect` of headers", 1, lambda _: start.measure(small(), 5 * repeats)),
        Case(
            "Decompose",
            "SmolLM2-135M's shapes (30 layers, n = 576 and 1536)",
            2.5,
            lambda work: decompose.measure(small(), work, repeats, warm_up=warm_up),
        ),
        Case(
            "Merge",
            "SmolLM2-135M's shapes",
            3,
            lambda work: merge.measure(small(), work, repeats, warm_up=warm_up),
        ),
        Case("Inspect", "the 210 projections of SmolLM2-135M's shapes", 4, lambda _: spectra(small())),
        Case("Inspect", "eight matrices of 2048 × 5632", 4, lambda _: spectra(matrices())),
        Case(
            "Decompose",
            "TinyLlama-1.1B's shapes (n = 2048 and 5632), 4 layers",
            8,
            lambda work: decompose.measure(large(4), work, repeats, warm_up=False),
        ),
        Case(
            "Merge",
            "TinyLlama-1.1B's shapes, 4 layers",
            9,
            lambda work: merge.measure(large(4), work, repeats, warm_up=False),
        ),
    ]
    if arguments.all_layers:
        found.append(
            Case(
                "Decompose",
                "TinyLlama-1.1B's shapes, 22 layers",
                32,
                lambda work: decompose.measure(large(22), work, repeats, warm_up=False),
            )
        )
    return found


def main() -> None:
    arguments = _arguments()
    now = datetime.now(UTC)
    report = Report(
        date=f"{now.day} {now:%B %Y}",
        processor=machine.processor(),
        cores=machine.cores(),
        load_average=os.getloadavg()[0],
        versions=machine.versions(arguments.weightwatcher_python),
        repeats=arguments.repeats,
        gemm_size=256 if arguments.quick else 3072,
    )
    print(f"{machine.description(report.versions)}; load average {report.load_average:.2f}\n")
    with tempfile.TemporaryDirectory() as folder:
        todo = cases(Path(folder, "models"), arguments)
        _announce(todo, arguments)
        report.gemm_gflops.append(machine.gemm_rates(report.gemm_size))
        for case in todo:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                report.cases.append(_run(case, Path(work)))
            _save(report, arguments.output)
    report.gemm_gflops.append(machine.gemm_rates(report.gemm_size))
    _save(report, arguments.output)
    print(machine.rates_table(report.gemm_gflops, report.gemm_size))
    if arguments.write:
        block = _block(report)
        DOCUMENT.write_text(BLOCK.sub(lambda _: block, DOCUMENT.read_text()))
    failed = [f"{outcome.section}, {outcome.title}" for outcome in report.cases if outcome.failures()]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weightwatcher-python", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all-layers", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write and (arguments.quick or not arguments.weightwatcher_python):
        parser.error("--write needs all programs (--weightwatcher-python) and no --quick")
    if arguments.write and not BLOCK.search(DOCUMENT.read_text()):
        parser.error(f"{DOCUMENT} has no place for the tables")
    if arguments.quick:
        arguments.repeats = 1
    return arguments


def _announce(todo: Sequence[Case], arguments: argparse.Namespace) -> None:
    if arguments.quick:
        print("Tiny matrices, in about a minute; the figures mean nothing.\n", flush=True)
        return
    estimates = [case.minutes * arguments.repeats / 3 for case in todo]
    for case, minutes in zip(todo, estimates, strict=True):
        print(f"{case.section}, {case.title}: about {minutes:.0f} minutes")
    print(f"In all about {sum(estimates):.0f} minutes\n", flush=True)


def _run(case: Case, work: Path) -> Outcome:
    """Run a case and print what came of it; whatever fails in it is its outcome."""
    print(f"{case.section}, {case.title}\n", flush=True)
    began, rows, error = time.perf_counter(), [], ""
    try:
        rows = case.measure(work)
    except Exception:
        error = traceback.format_exc().strip()
    outcome = Outcome(case.section, case.title, (time.perf_counter() - began) / 60, rows, error)
    print(f"{outcome.shown()}\n\n({outcome.minutes:.1f} minutes)\n", flush=True)
    for failure in outcome.failures():
        print(failure, file=sys.stderr, flush=True)
    return outcome


def _save(report: Report, path: Path | None) -> None:
    """Write everything as JSON, whole or not at all."""
    if path is None:
        return
    written = {"schema_version": 1, **asdict(report)}
    for found, outcome in zip(written["cases"], report.cases, strict=True):
        found["rows"] = [_record(row) for row in outcome.rows]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


def _record(row: Row) -> dict[str, object]:
    return {
        "command": row.command,
        "seconds": row.seconds,
        "peak_mb": row.peak_mb,
        "ratio": row.ratio,
        "runs": [asdict(run) for run in row.runs],
        "error": row.error,
    }


def _block(report: Report) -> str:
    """The tables as docs/measurements.md has them."""
    machine_line = f"{report.date}: {machine.description(report.versions)}."
    parts = [
        textwrap.fill(machine_line, 120, break_on_hyphens=False),
        TURNS.format(repeats=report.repeats),
        machine.rates_table(report.gemm_gflops, report.gemm_size),
    ]
    for section, text in SECTIONS.items():
        parts += [f"## {section}", text]
        for outcome in (outcome for outcome in report.cases if outcome.section == section):
            parts += [f"{outcome.title[0].upper()}{outcome.title[1:]}:", outcome.shown()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
