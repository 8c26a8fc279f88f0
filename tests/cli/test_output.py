"""The output formats, in process."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.torch import save_file

import frodctl
from frodctl.cli.main import main
from frodctl.cli.output import Output, human_bytes, human_count, printable
from frodctl.cli.progress import Reporter
from frodctl.jobs.columns import Column
from frodctl.jobs.progress import Progress
from tests.conftest import on_a_terminal
from tests.jobs.test_merge import write_adapter

CELL = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
COLUMNS = (Column("a", "a"), Column("b"))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def captured(terminal: bool) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is written to stdout and to stderr, which are a terminal or none."""
    out, err = (_Terminal(), _Terminal()) if terminal else (io.StringIO(), io.StringIO())
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err


@example(rows=[{"a": None, "b": "\r0"}])
@given(rows=st.lists(st.fixed_dictionaries({"a": CELL, "b": CELL}), max_size=4))
def test_any_values_in_any_format(rows: list[dict[str, object]]) -> None:
    def emitted(format_: str) -> str:
        with captured(False) as (out, _):
            Output(format_, False).emit({"rows": rows}, rows, COLUMNS)
        return out.getvalue()

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


# Names from strangers' files

#: Clears the screen, in two ways; sets the window's title; forges lines; reverses directions; hides letters.
HOSTILE = (
    "a\x1b[2J", "b\x9b2J", "c\x1b]0;title\x07", "d\nError: forged", "e\rError: forged", "f\tg", "h\x0bi\x0cj\x85k",
    "l\u2028Error: forged\u2029m", "n\u202etxt.exe", "o\u2066p\u2069", "q\u200bq", "qq", "r\x00s", "t\x7fu", "\ufeffv",
)  # fmt: skip
ANY_NAME = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_is_printable_is_one_line_and_tells_texts_apart(one: str, other: str) -> None:
    assert printable(one).isprintable()
    assert printable(one) == one or not one.isprintable()
    if one != other and "\\" not in one + other:
        assert printable(one) != printable(other)


@given(names=st.lists(ANY_NAME, min_size=1, max_size=4), terminal=st.booleans())
def test_names_are_exact_for_programs_and_harmless_on_a_terminal(names: list[str], terminal: bool) -> None:
    rows = [{"a": name, "b": 1} for name in names]

    def emitted(format_: str) -> str:
        with captured(terminal) as (out, _):
            Output(format_, False).emit({"rows": rows}, rows, COLUMNS)
        return out.getvalue()

    document, lines = emitted("json"), emitted("jsonl").splitlines()
    assert json.loads(document) == {"rows": rows}
    assert [json.loads(line) for line in lines] == rows
    assert document.replace("\n", "").isprintable()
    tsv, separated = emitted("tsv"), emitted("csv")
    if terminal:
        for text in (tsv, separated):
            assert text.replace("\t", "").replace("\n", "").isprintable()
            assert text.count("\n") == len(rows) + 1
    else:
        assert [row["a"] for row in csv.DictReader(io.StringIO(separated, newline=""))] == names
        cells = [line.split("\t")[0] for line in tsv.split("\n")[1:-1]]
        assert cells == [re.sub("[\t\n\r]", " ", name) for name in names]
    table = re.sub(r"\x1b\[[0-9;]*m", "", emitted("human"))  # the table's own bold heading
    assert table.replace("\n", "").isprintable()


@pytest.mark.parametrize("terminal", [False, True])
@given(name=ANY_NAME)
def test_names_in_notes_and_bars(name: str, terminal: bool) -> None:
    with captured(terminal) as (_, err), Reporter(False) as report:
        report.note(f"Left out: {name}")
        report(Progress(name))
        for done in range(2):
            report(Progress(name, done, 2))
            report.note(f"Wrote {name}")
    text = re.sub(r"\x1b\[(\d+(;\d+)*m|2K|1A|\?25[lh])|\r", "", err.getvalue()) if terminal else err.getvalue()
    assert text.replace("\n", "").isprintable()
    assert not any(line.startswith("Error") for line in text.split("\n"))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_errors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As arguments, as the names of files and as those of tensors."""
    broken = tmp_path / "broken.safetensors"
    save_file({f"layers.0.{name}.weight": torch.full((4, 4), float("nan"))}, broken)
    (tmp_path / f"{name.replace(chr(0), '')}.safetensors").write_bytes(b"no")
    for arguments in (
        ["inspect", f"./{name.replace(chr(0), '')}"],
        ["inspect", str(tmp_path / f"{name.replace(chr(0), '')}.safetensors")],
        ["inspect", str(broken), "--spectrum", "-q"],
        ["inspect", str(broken), f"--{name}"],
        ["inspect", str(broken), "--sort", name],
        ["decompose", str(broken), "--layers", name],
        ["decompose", str(broken), "--budget", name],
        ["decompose", str(broken), "--target-modules", name],
        ["decompose", str(broken), "--target-modules", "all-linear", "--debug"],
    ):
        assert main(arguments) in (1, 2, 3), arguments
        text = capsys.readouterr().err
        assert text.replace("\n", "").isprintable()
        assert sum(line.startswith("Error: ") for line in text.split("\n")) == 1
        assert "Error: forged" not in text.split("\n")


@pytest.mark.parametrize("format_", ["human", "tsv", "csv", "json", "jsonl"])
def test_names_in_whole_commands(format_: str, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{name}.weight": torch.randn(4, 4) for i in range(2) for name in HOSTILE}
    save_file(tensors | {f"{name}.bias": torch.ones(2, 2) for name in HOSTILE}, tmp_path / "m.safetensors")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for arguments in (["inspect"], ["inspect", "--spectrum"], ["decompose", "--dry-run", "--target-modules", ".*"]):
        with captured(terminal=True) as (out, err):
            assert main([arguments[0], str(tmp_path / "m.safetensors"), *arguments[1:], "--format", format_]) == 0
        text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) + err.getvalue()
        assert re.sub(r"[\t\n]", "", text).isprintable()
        assert "Error: forged" not in text.split("\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_an_adapters_config(name: str, example: Path, tmp_path: Path) -> None:
    frodctl.decompose(example, tmp_path / "basis.safetensors", layers="0,1")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / name.replace("\x00", ""), tmp_path / "basis.safetensors")
    merge = ["merge", str(example), str(adapter), str(tmp_path / "out"), "--basis", str(tmp_path / "basis.safetensors")]
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for arguments in (["inspect", str(adapter)], [*merge, "--dry-run"]):
        with captured(True) as (out, err):
            assert main(arguments) == 0
        text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) + err.getvalue()
        assert printable(name.replace("\x00", "")) in text
        assert text.replace("\n", "").isprintable()
        assert "Error: forged" not in text.split("\n")


# Tables on terminals of any width

FIGURES = st.one_of(st.integers(0, 99999), st.floats(allow_nan=False, allow_infinity=False)).map(lambda x: f"{x:.3g}")
PARTS = st.lists(st.text("abc_層é", min_size=1, max_size=14), min_size=1, max_size=6)
NAMED = st.builds(lambda parts, separator: separator.join(parts), PARTS, st.sampled_from("._/"))


@given(
    st.lists(st.tuples(NAMED, st.lists(FIGURES, min_size=8, max_size=8)), min_size=1, max_size=5), st.integers(40, 130)
)
def test_tables_fit_numbers_stay_whole_and_names_are_told_apart(table: list[tuple[str, list[str]]], width: int) -> None:
    columns = (Column("0", "name", "text"), *(Column(str(i), "abcdefghij"[:i]) for i in range(1, 9)))
    rows = [{str(i): value for i, value in enumerate([name, *figures])} for name, figures in table]
    os.environ["COLUMNS"] = str(width)
    with captured(False) as (out, _):
        notes: list[str] = []
        Output("human", False, notes.append).table(rows, columns)
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    hidden = notes[0].removeprefix("No room for: ").partition(" (")[0].split(", ") if notes else []
    shown = [column for column in columns[1:] if column.title not in hidden]
    assert len(shown) >= 2
    figures_width = sum(2 + max(len(column.title), *(len(row[column.key]) for row in rows)) for column in shown)
    found: list[tuple[str, list[str]]] = []
    for line in lines[2:]:
        name, figures = line[:-figures_width].rstrip(), line[-figures_width:].split()
        if figures:
            found.append((name, figures))
        else:
            assert name.startswith("  ")
            found[-1] = found[-1][0] + name[2:], found[-1][1]
    assert found == [(row["0"], [row[column.key] for column in shown]) for row in rows]
    if max(4, *(cell_len(name) for name, _ in table)) + figures_width <= width and not hidden:
        assert len(lines) == len(rows) + 2


@pytest.mark.parametrize("width", [1, 5, 12, 20, 39])
def test_tables_on_terminals_too_narrow_for_them(width: int) -> None:
    os.environ["COLUMNS"] = str(width)
    with captured(False) as (out, _):
        Output("human", False).table([{"a": "model.layers.0.weight", "b": 12345}], COLUMNS)
    assert max(map(len, out.getvalue().splitlines())) <= max(width, 1)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, ["model.layers.0.post_attention_layernorm.weight"]),
        (40, ["model.layers.0.post_attention_layernorm.", "  weight"]),
        (32, ["model.layers.0.", "  post_attention_layernorm.", "  weight"]),
        (20, ["model.layers.0.post_", "  attention_", "  layernorm.weight"]),
        (9, ["model.", " layers.", " 0.post_a", " ttention", " _layerno", " rm.", " weight"]),
    ],
)
def test_where_names_are_broken(width: int, shown: list[str]) -> None:
    os.environ["COLUMNS"] = str(width)
    with captured(False) as (out, _):
        Output("human", False).table(
            [{"a": "model.layers.0.post_attention_layernorm.weight"}], [Column("a", "a", "text")]
        )
    assert [line.rstrip() for line in out.getvalue().splitlines()[2:]] == shown
