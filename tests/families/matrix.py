"""Tiny models of every family through decompose, attach, training, save, load and merge: a table of what came of it.

    python tests/families/matrix.py --output families.jsonl --write

Each family runs in a process of its own, two at a time, in about three minutes altogether on two cores. --output has a
line of JSON for every finished family, and a run that is started again with it goes on from there; --only NAME (again
and again) runs these anew. --write puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `tests` is, when this is run as a script

from tests.families.recipes import FAMILIES, STEPS, Family  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
BLOCK = re.compile(
    r"(?<=<!-- written by tests/families/matrix\.py -->\n\n).*(?=\n<!-- end of what it wrote -->)", re.DOTALL
)
LIMIT_SECONDS = 300

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    rows = _finished(arguments.output)
    chosen = [f for f in FAMILIES if f.name in arguments.only or (not arguments.only and f.name not in rows)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.families.trial"])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(partial(_run, context), chosen):
            rows[row["family"]] = row
            print(_line(row), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    found = [rows[family.name] for family in FAMILIES if family.name in rows]
    text = _block(found)
    print(f"\n{text}")
    if arguments.write:
        DOCUMENT.write_text(BLOCK.sub(lambda _: text, DOCUMENT.read_text()))
    return 1 if any(value.startswith("failed") for row in found for value in _outcomes(row)) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", default=[], choices=[f.name for f in FAMILIES], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write and not (DOCUMENT.is_file() and BLOCK.search(DOCUMENT.read_text())):
        parser.error(f"{DOCUMENT} has no place for the table")
    if arguments.write and arguments.only and not arguments.output:
        parser.error("--write needs all families: --output with those that are finished")
    return arguments


def _finished(output: Path | None) -> dict[str, Row]:
    """The rows of an earlier run, the last for each family."""
    lines = output.read_text().splitlines() if output is not None and output.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may have left half a line
    return {row["family"]: row for row in rows}


def _run(context: Any, family: Family) -> Row:
    """The family's row, from a process of its own that may crash or hang."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_record, args=(family, folder))
        process.start()
        process.join(LIMIT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        path = Path(folder, "row.json")
        if path.is_file():
            row: Row = json.loads(path.read_text())
        else:
            row = {"family": family.name, "class": family.model, "layers": 0, "note": ""}
            row["decompose"] = f"failed: its process ended with {process.exitcode}"
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def _record(family: Family, folder: str) -> None:
    """In the family's own process: try it, and leave its row in the folder."""
    from tests.families.trial import tried

    row = tried(family, Path(folder))
    partial_file = Path(folder, "row.json.partial")
    partial_file.write_text(json.dumps(row))
    partial_file.rename(Path(folder, "row.json"))


def _outcomes(row: Row) -> list[str]:
    return [row[step] for step in STEPS if step in row]


def _line(row: Row) -> str:
    outcomes = ", ".join(f"{step} {row[step]}" for step in STEPS if step in row)
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['family']}: {row['layers']} layers, {outcomes}{note}, {row['seconds']} s"


def _block(rows: Sequence[Row]) -> str:
    """The table as docs/models.md has it, and the sentences of what is not ok."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for outcome in _outcomes(row):
            if outcome != "ok":
                reasons.setdefault(_general(outcome), []).append(row["family"])
    numbers = {reason: number for number, reason in enumerate(reasons, 1)}

    def cell(row: Row, step: str) -> str:
        outcome = row.get(step, "")
        return outcome if outcome in ("", "ok") else f"{outcome.partition(':')[0]} ({numbers[_general(outcome)]})"

    whole = sum(all(outcome == "ok" for outcome in _outcomes({**row, "experts": "ok"})) for row in rows)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        f"{len(rows)} models, {whole} of them ok in every step but the experts', with {libraries}:\n",
        f"| family | class | layers | {' | '.join(STEPS)} |",
        f"|---|---|---|{'---|' * len(STEPS)}",
    ]
    for row in rows:
        cells = [row["family"], f"`{row['class']}`", str(row["layers"]), *(cell(row, step) for step in STEPS)]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for reason, number in numbers.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def _general(outcome: str) -> str:
    """A sentence without the names and numbers of one model, so that equal reasons are one."""
    nameless = re.sub(r"\b\w+(\.\w+)*\.\d+\.[\w.\[\]]+", "…", outcome)
    return re.sub(r"\(and \d+ more\)", "(and more)", nameless)


if __name__ == "__main__":
    sys.exit(main())
