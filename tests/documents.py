"""What the documents show, run: their console blocks as shell sessions, their Python blocks as Python sessions.

    python -m tests.documents [--write] [DOCUMENT...]

says where README.md and docs/*.md are not true, or with ``--write`` writes what the commands print into them. A
document starts where the README ended: the files that its commands made are there. A block after an HTML comment
``<!-- not run: REASON -->`` is left alone. After ``<!-- after training -->`` figures may differ by more, and after
``<!-- generated -->`` the last command prints any text: training in bfloat16 takes another course on another processor.
In a Python block ``print(...)  # 1.5`` says what is printed last.

`frodctl` alone runs in this process, on what it takes for a terminal 100 columns wide. So does ``python FILE``, while
pipelines and other programs run in bash; of all these stdout alone is shown. Numbers may differ by a little from
machine to machine, times at will.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from frodctl.cli.main import main as frodctl

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
TERMINAL = {
    "COLUMNS": "100",
    "LINES": "40",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "HF_HUB_OFFLINE": "1",
    "AI_AGENT": "",
    "AGENT": "",
    "LC_ALL": "C.UTF-8",
}

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_REMARK = re.compile(r"<!-- (?P<kind>not run|after training|generated)(: [^>]+)? -->\s*\Z")
_COMMAND = re.compile(r"^\$ (?P<command>.*\n(?:> .*\n)*)(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
_PRINTED = re.compile(r"^\s*print\(.*\)  # (?P<expected>.+)$", re.MULTILINE)
_OF_A_SHELL = set("|<>;&$`*")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BAR = re.compile(r"^.*\(\d+% done\)\n", re.MULTILINE)  # a bar on a terminal, which leaves nothing
_TOKEN = re.compile(r"(?P<number>\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)|(?P<line>─+)|(?P<profile>[▁-█]+)|(?P<space>\s+)")
#: What a machine decides: a number before the unit of a time or of a rate, or after these words.
_UNIT = r"(?: [kMG]?B| (?:m|tokens/)?s\b)?"
_MEASURED = re.compile(rf"(?P<before>(?:Peak memory about |peak memory )?)\d[\d.,]*(?P<after>{_UNIT})")
DIGITS = 0.02  # by which figures with a decimal point may differ
TRAINED = 0.25  # after training
LONG_INTEGER, ROUNDED = 100, 0.004  # integers from here on may be rounded figures
ROUNDING, FACTOR = 1e-5, 5  # below it figures are errors of rounding, which differ by this much


@dataclass(frozen=True)
class Block:
    """A fenced block that is run: its language, its text, where it is in its document, and what is remarked of it."""

    language: str
    body: str
    start: int
    line: int
    remark: str


@dataclass(frozen=True)
class Untrue:
    """Something that a document shows and that is not so."""

    where: str
    what: str
    shown: str
    found: str
    writable: bool = True  #: not where a command failed that did not before

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n--- shown\n{self.shown}\n--- found\n{self.found}"


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a document that are run."""
    for match in _FENCE.finditer(text):
        remark = _REMARK.search(text, 0, match.start())
        kind = remark["kind"] if remark else ""
        if match["language"] in ("console", "python") and kind != "not run":
            line = text.count("\n", 0, match.start()) + 1
            yield Block(match["language"], match["body"], match.start("body"), line, kind)


def run(document: Path, folder: Path, *, write: bool = False) -> list[Untrue]:
    """Run a document's blocks in a folder; what is not as shown, which ``write`` puts right."""
    text, found, shift = document.read_text(), [], 0
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), patch.dict(os.environ, TERMINAL):
        for block in list(blocks(text)):
            where = f"{document.relative_to(ROOT)}:{block.line}"
            if block.language == "python":
                found += _python(block.body, namespace, where)
                continue
            for command in _COMMAND.finditer(block.body):
                untrue = _console(command["command"], command["output"], where, block.remark)
                found += untrue
                if write and untrue and untrue[0].writable:
                    start, end = (block.start + shift + at for at in command.span("output"))
                    text = text[:start] + untrue[0].found + text[end:]
                    shift += len(untrue[0].found) - len(command["output"])
    if write:
        document.write_text(text)
    return found


def scratch(folder: Path) -> Path:
    """A folder with what the README's commands start from."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def same(shown: str, found: str, digits: float = DIGITS) -> bool:
    """Whether two outputs tell the same, but for layout, times and the last digits."""
    ours, theirs = _tokens(shown), _tokens(found)
    return len(ours) == len(theirs) and all(_alike(a, b, digits) for a, b in zip(ours, theirs, strict=True))


def _console(command: str, shown: str, where: str, remark: str) -> list[Untrue]:
    text = re.sub(r"^> ", "", command, flags=re.MULTILINE).strip()
    words = shlex.split(text, comments=True)
    alone = not _OF_A_SHELL & set(re.sub(r"'[^']*'", "", text))
    if alone and words[0] == "frodctl":
        code, found = _in_process(words[1:])
        failed = code != 0 and "Error: " not in shown
    elif alone and words[0] == "python":
        code, found = 0, _script(words[1:])
        failed = False
    else:
        code, found = in_shell(text)
        failed = code != 0
    what = f"$ {text}" + (f" (exit code {code})" if failed else "")
    alike = bool(found.strip()) if remark == "generated" else same(shown, found, TRAINED if remark else DIGITS)
    return [] if alike and not failed else [Untrue(where, what, shown, found, not (failed and shown))]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Beside(io.StringIO):
    """stderr: what is written goes where stdout goes, but no bars are drawn."""

    def __init__(self, stdout: io.StringIO) -> None:
        super().__init__()
        self.stdout = stdout

    def write(self, text: str) -> int:
        return self.stdout.write(text)


def _in_process(arguments: Sequence[str]) -> tuple[int, str]:
    stdout = _Terminal()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(_Beside(stdout)):
        code = frodctl(arguments)
    return code, _BAR.sub("", _ESCAPE.sub("", stdout.getvalue()))


def _script(arguments: list[str]) -> str:
    """What a Python program prints; an exception of its is one here."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), patch.object(sys, "argv", arguments):
        runpy.run_path(arguments[0], run_name="__main__")
    return stdout.getvalue()


def in_shell(command: str) -> tuple[int, str]:
    """The exit code and what bash prints, with `frodctl` and `python` those of this checkout and environment."""
    with tempfile.TemporaryDirectory() as programs:
        for name, arguments in {"frodctl": "-m frodctl ", "python": ""}.items():
            program = Path(programs, name)
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
            program.chmod(0o755)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _python(code: str, namespace: dict[str, Any], where: str) -> list[Untrue]:
    shown = "".join(f"{match['expected']}\n" for match in _PRINTED.finditer(code))
    stdout = io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout):
            exec(compile(code, where, "exec", dont_inherit=True), namespace)
    except Exception as error:
        return [Untrue(where, code, "no error", repr(error))]
    found = "".join(stdout.getvalue().splitlines(keepends=True)[-len(shown.splitlines()) :]) if shown else ""
    return [] if same(shown, found) else [Untrue(where, code, shown, found)]


def _tokens(text: str) -> list[tuple[str, str]]:
    """Numbers, sparklines and the words between them; spaces and rules of any length are one."""
    text = _MEASURED.sub(lambda m: f"{m['before']}#" if m["before"] or m["after"].endswith("s") else m[0], text)
    found, at = [], 0
    for line in text.splitlines():
        at = 0
        for match in _TOKEN.finditer(line.rstrip()):
            found.append(("text", line[at : match.start()]))
            kind = match.lastgroup or ""
            found.append((kind, match[0] if kind in ("number", "profile") else " "))
            at = match.end()
        found.append(("text", line[at:].rstrip() + "\n"))
    return found


def _alike(ours: tuple[str, str], theirs: tuple[str, str], digits: float) -> bool:
    if ours == theirs:
        return True
    (kind, shown), (other, found) = ours, theirs
    if kind != other or kind not in ("number", "profile"):
        return False
    if kind == "profile":
        return len(shown) == len(found) and all(abs(ord(a) - ord(b)) <= 1 for a, b in zip(shown, found, strict=True))
    a, b = (float(text.replace(",", "")) for text in (shown, found))
    if shown.isdigit() and found.isdigit():
        return a >= LONG_INTEGER and abs(a - b) <= ROUNDED * a
    if 0 < max(a, b) < ROUNDING:
        return max(a, b) <= FACTOR * min(a, b)
    places = max(len(text.partition("e")[0].partition(".")[2]) for text in (shown, found))
    last = 0 if "e" in shown + found else 1.001 * 10.0**-places
    return abs(a - b) <= max(digits * abs(a), last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, help="default: README.md and all of docs")
    parser.add_argument("--write", action="store_true", help="write what was found into the documents")
    arguments = parser.parse_args()
    chosen = [path.resolve() for path in arguments.documents] or [README, *DOCUMENTS]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        story = Path(folder, "README")
        story.mkdir()
        found += run(README, scratch(story), write=arguments.write and README in chosen)
        for document in chosen:
            if document != README:
                shutil.copytree(story, Path(folder, document.stem))
                found += run(document, Path(folder, document.stem), write=arguments.write)
    for untrue in found:
        sys.stdout.write(f"{untrue}\n")
    return 1 if found and not arguments.write else 0


if __name__ == "__main__":
    sys.exit(main())
