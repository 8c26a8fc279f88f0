"""Measure commands as whole processes, in turns: wall-clock seconds, processor seconds and peak resident memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: No process of a benchmark takes longer than this many seconds.
TIMEOUT = 2400

#: Starts a command from a process of its own, which is small: what the system reports of a child's peak counts what its
#: parent held when it started the child. (A wait with a time limit would look for the end at intervals.)
_LAUNCHER = f"""
import json, resource, subprocess, sys, threading, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
limit = threading.Timer({TIMEOUT}, process.kill)
limit.start()
code = process.wait()
seconds = time.perf_counter() - began
limit.cancel()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


class Failed(Exception):
    """A command of a benchmark ended with an error."""


@dataclass(frozen=True)
class Run:
    """One finished process; memory in MB of 2**20 bytes."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Row:
    """A command's runs and those of the one that it is compared with, turn by turn; or why one of its runs failed."""

    command: str
    runs: list[Run]
    compared: list[Run]
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Median of the wall-clock seconds."""
        return _median([run.seconds for run in self.runs])

    @property
    def peak_mb(self) -> float | None:
        """Median of the peak memory."""
        return _median([run.peak_mb for run in self.runs])

    @property
    def ratio(self) -> float | None:
        """Median over the turns of the time divided by the other command's."""
        return _median([a.seconds / b.seconds for a, b in zip(self.runs, self.compared, strict=False)])


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run the command to its end, in this environment or one's own; its exit code must be 0."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, check=False, env=env)
    code, *measured = json.loads(done.stdout) if done.returncode == 0 else (done.returncode,)
    if code != 0:
        raise Failed(f"exit code {code}\n{done.stderr[-2000:]}".strip())
    return Run(*measured)


def in_turns(commands: Mapping[str, Sequence[str]], repeats: int, *, warm_up: bool = True) -> list[Row]:
    """Run all commands ``repeats`` times in turns, so that drift hits them alike; the first is the yardstick.

    ``warm_up``: a turn before them is not counted. A command that fails is not run again, the others are.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    errors: dict[str, str] = {}
    for turn in range(-warm_up, repeats):
        for name in [name for name in commands if name not in errors]:
            try:
                measured = run(commands[name])
            except Failed as failure:
                errors[name], runs[name] = str(failure), []
                continue
            if turn >= 0:
                runs[name].append(measured)
    compared = runs[next(iter(commands))]
    return [Row(name, runs[name], compared, errors.get(name, "")) for name in commands]


def printed(program: str, arguments: Sequence[str] = (), python: str = sys.executable) -> Any:
    """What a Python program prints in its last line, in JSON; it runs in a process of its own."""
    command = [python, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode:
        raise Failed(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def printed_in_turns(
    program: str, cases: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Run a Python program with each case's arguments, in turns; it prints the pair of numbers that it measured."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, arguments in cases.items():
            first, second = printed(program, arguments)
            results[name].append((first, second))
    return results


def table(rows: Sequence[Row]) -> str:
    """Medians of each command, in Markdown."""
    lines = [
        f"| command | wall-clock, median (min–max) | peak memory | time / {rows[0].command} |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.command} | {_time(row)} | {_number(row.peak_mb, 0, ' MB')} | {_number(row.ratio, 1, '×')} |"
        )
    return "\n".join(lines)


def _time(row: Row) -> str:
    if row.seconds is None:
        return f"failed: {row.error.splitlines()[-1]}".replace("|", "\\|")
    digits = 1 if row.seconds >= 1 else 2
    seconds = [run.seconds for run in row.runs]
    return f"{row.seconds:.{digits}f} s ({min(seconds):.{digits}f}–{max(seconds):.{digits}f})"


def _number(value: float | None, digits: int, unit: str) -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
