"""What every command shares: exit codes, interrupts, full disks, and flags in the words of the library."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import frodctl
from frodctl.cli.main import cli, main
from frodctl.cli.options import as_flags
from tests.conftest import EXAMPLE

CORPUS = Path(__file__).parent.parent / "corpus" / "553d683"


def test_messages_of_the_library_name_flags() -> None:
    merge = cli.get_command(click.Context(cli), "merge")
    inspect = cli.get_command(click.Context(cli), "inspect")
    decompose = cli.get_command(click.Context(cli), "decompose")
    text = "o: exists; `force=True` replaces it, `base` and `max_shard_size=5GB` and `resume=False` with `output`"
    assert as_flags(text, merge) == (
        "o: exists; --force replaces it, BASE and --max-shard-size 5GB and --no-resume with OUT"
    )
    assert as_flags("give `base`", inspect) == "give --base"
    assert as_flags("name another `output`; `model`", decompose) == "name another --output; MODEL"
    assert as_flags("`targets`: names none", inspect) == "TARGET...: names none"
    for left in ("`q_proj, v_proj`", "a ` and `", "`Not-a parameter`", "``", "`rm -rf`"):
        assert as_flags(left, merge) == left


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["decompose", "m"], "Interrupted; the same command resumes.\n"),
        (["merge", "a", "b", "c"], "Interrupted; the same command resumes.\n"),
        (["extract", "a", "b", "c", "--rank", "4"], "Interrupted; the same command resumes.\n"),
        (["extract", "a", "b", "c", "--as", "frod"], "Interrupted.\n"),
        (["merge", "a", "b", "c", "--dry-run"], "Interrupted.\n"),
        (["decompose", "m", "--no-resume"], "Interrupted.\n"),
        (["inspect", "m"], "Interrupted.\n"),
    ],
)
def test_an_interrupt_says_what_becomes_of_the_work(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "invoke", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_on_a_full_disk_speaks_of_stdout_alone(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "frodctl", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (4, "Error: stdout: No space left on device\n")


def test_errors_of_the_system_name_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(Path("a") / "b"))

    monkeypatch.setattr(cli, "invoke", full)
    assert main(["inspect", "x"]) == 1
    assert capsys.readouterr().err == f"Error: a/b: {os.strerror(errno.EIO)}\n"


def piped_to_nobody(arguments: list[str], cwd: Path) -> int:
    """The exit code of a command whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "frodctl", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=cwd, check=False)
    os.close(writer)
    assert done.stderr == ""
    return done.returncode


def test_a_closed_pipe_costs_neither_picture_nor_answer(tmp_path: Path) -> None:
    basis = CORPUS / "basis.safetensors"
    frodctl.merge(EXAMPLE, CORPUS / "lean", tmp_path / "merged", basis=basis)
    against = ["inspect", str(tmp_path / "merged"), "--against", str(EXAMPLE), "-q"]
    assert piped_to_nobody(against, tmp_path) == 0
    assert piped_to_nobody([*against, "--check"], tmp_path) == 5
    assert piped_to_nobody([*against, "--check", "--json"], tmp_path) == 5
    drawn = ["inspect", str(EXAMPLE), "--spectrum", "--include", "*0.self_attn.q_proj*", "--plot", "p.svg", "-q"]
    assert piped_to_nobody(drawn, tmp_path) == 0
    assert (tmp_path / "p.svg").stat().st_size


def test_a_full_log_stops_no_work(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "frodctl", "decompose", str(EXAMPLE), "-o", "b.safetensors"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, cwd=tmp_path, check=False)
    assert result.returncode == 0
    frodctl.open_basis(tmp_path / "b.safetensors").verify()
