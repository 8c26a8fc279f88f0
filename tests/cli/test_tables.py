"""Every table of every command, on terminals of every width."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

import frodctl
from frodctl.cli.main import main
from tests.cli.test_output import captured
from tests.jobs.test_merge import write_adapter

COMMANDS = {
    "decompose --dry-run": "decompose BASE --target-modules all-linear --dry-run",
    "decompose": "decompose BASE --target-modules self_attn.q_proj,down_proj -o OUT.safetensors",
    "merge": "merge BASE ADAPTER OUT --basis BASIS",
    "checkpoint": "inspect BASE",
    "checkpoint, tensors": "inspect BASE --include *",
    "checkpoint, spectrum": "inspect BASE --spectrum --include *.[01].*",
    "checkpoint, estimate": "inspect BASE --estimate --include *.[01].*",
    "basis": "inspect BASIS",
    "basis, spectrum": "inspect BASIS --spectrum",
    "basis and base": "inspect BASIS --base BASE",
    "adapter": "inspect ADAPTER",
    "adapter, spectrum": "inspect ADAPTER --spectrum --basis BASIS",
    "adapter and base": "inspect ADAPTER --base BASE --basis BASIS",
    "comparison": "inspect MERGED --against BASE",
    "comparison, spectrum": "inspect MERGED --against BASE --spectrum --include *.[01].*",
}


@pytest.fixture(scope="module")
def files(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tables")
    frodctl.decompose(example, root / "basis.safetensors", target_modules=["q_proj", "down_proj"])
    write_adapter(root / "adapter", example, root / "basis.safetensors", 0.1)
    frodctl.merge(example, root / "adapter", root / "merged", basis=root / "basis.safetensors")
    paths = {"BASE": example, "BASIS": root / "basis.safetensors", "ADAPTER": root / "adapter"}
    return {name: str(path) for name, path in (paths | {"MERGED": root / "merged"}).items()}


def tables(text: str) -> list[list[str]]:
    """The tables in what is printed, as lines below a heading and a rule: all of one width."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch("─+", line)]
    ends = [following - 1 for following in rules[1:]] + [len(lines)]
    return [
        [line for line in lines[rule - 1 : end] if cell_len(line) == cell_len(lines[rule])]
        for rule, end in zip(rules, ends, strict=True)
    ]


def figures(table: list[str]) -> list[list[str]]:
    """The words of each row after the name: a name has none, and further lines of it are set in."""
    return [line.split()[1:] for line in table[2:] if not line.startswith(" ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_table_fits_and_keeps_figures(command: str, files: dict[str, str], tmp_path: Path) -> None:
    shown: dict[int, list[list[str]]] = {}
    for width in (40, 60, 80, 100, 120, 300):
        os.environ["COLUMNS"] = str(width)
        output = str(tmp_path / f"out{width}")
        places = files | {"OUT": output, "OUT.safetensors": f"{output}.safetensors"}
        arguments = [places.get(word, word) for word in COMMANDS[command].split()]
        with captured(False) as (out, _):
            assert main([*arguments, "--format", "human", "-q"]) == 0
        shown[width] = tables(out.getvalue())
        assert shown[width], out.getvalue()
        for table in shown[width]:
            assert max(map(cell_len, table)) <= width
    for width, found in shown.items():
        assert len(found) == len(shown[300])
        for narrow, wide in zip(found, shown[300], strict=True):
            rows, whole = figures(narrow), figures(wide)
            assert len(rows) == len(whole)
            for row, complete in zip(rows, whole, strict=True):
                assert len(row) >= min(2, len(complete)), (command, width)
                if "decompose" not in command:  # where the time differs from run to run
                    assert is_part(row, complete), (command, width)


@pytest.mark.parametrize("command", ["decompose", "merge", "adapter and base"])
def test_what_a_terminal_has_no_room_for_is_said(command: str, files: dict[str, str], tmp_path: Path) -> None:
    places = files | {"OUT": str(tmp_path / "out"), "OUT.safetensors": str(tmp_path / "out.safetensors")}
    arguments = [places.get(word, word) for word in COMMANDS[command].split()]
    notes = {}
    for width in (60, 300):
        os.environ["COLUMNS"] = str(width)
        with captured(False) as (_, err):
            assert main([*arguments, "--format", "human", *(["--force"] if "OUT" in COMMANDS[command] else [])]) == 0
        notes[width] = [line for line in err.getvalue().splitlines() if line.startswith("No room for: ")]
    assert [len(found) for found in notes.values()] == [1, 0]


def is_part(row: list[str], complete: list[str]) -> bool:
    """Whether the words of one stand in the other, whole and in order."""
    rest = iter(complete)
    return all(word in rest for word in row)
