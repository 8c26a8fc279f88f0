"""The output formats, in process."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frodctl.cli.output import Column, Output, human_bytes, human_count
from tests.conftest import on_a_terminal

CELL = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
COLUMNS = (Column("a", "a"), Column("b"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(rows=[{"a": None, "b": "\r0"}])
@given(rows=st.lists(st.fixed_dictionaries({"a": CELL, "b": CELL}), max_size=4))
def test_any_values_in_any_format(rows: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    def emitted(format_: str) -> str:
        Output(format_, False).emit({"rows": rows}, rows, COLUMNS)
        return capsys.readouterr().out

    def strict(text: str) -> object:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert len(strict(emitted("json"))["rows"]) == len(rows)  # type: ignore[index]
    lines = emitted("jsonl").split("\n")[:-1]
    assert [set(json.loads(line)) for line in lines] == [{"a", "b"}] * len(rows)
    tsv = emitted("tsv").split("\n")
    assert tsv[0] == "a\tb"
    assert len(tsv) == len(rows) + 2
    assert all(line.count("\t") == 1 for line in tsv[:-1])
    parsed = list(csv.DictReader(io.StringIO(emitted("csv"), newline="")))
    assert len(parsed) == len(rows)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (18.1e6, "18.1 MB"), (5e9, "5.00 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (1234, "1.23 k"), (1.45e6, "1.45 M"), (3e11, "300 G"), (2e12, "2 T")]
)
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_it_is_a_table_and_a_bar(no_color: bool, example: Path, tmp_path: Path) -> None:
    """A real pseudo-terminal on stdout and stderr."""
    env = {"NO_COLOR": "1"} if no_color else {}
    text = on_a_terminal("decompose", example, "--target-modules", "all-linear", cwd=tmp_path, **env)
    assert "category" in text
    assert "\t" not in text
    assert "left:" in text
    assert ("\x1b[3" in text) != no_color
