"""Measure commands as whole processes, in turns: wall-clock seconds and peak resident memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_mb: float


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run the command to its end; its exit code must be 0.

    The peak is the kernel's high-water mark, read while the process lives: what the system reports of it afterwards
    would count this process's own memory, too.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _high_water_mark(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read().decode()[-2000:]}")
    return Run(seconds, peak)


def _high_water_mark(pid: int) -> float:
    """Peak resident memory of a living process so far, in MB of 2**20 bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def in_turns(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[Run]]:
    """Run all commands once to warm up, then ``repeats`` times in turns, so that drift hits them alike."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            measured = run(command)
            if turn:
                results[name].append(measured)
    return results


def printed_in_turns(
    program: str, cases: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Run a Python program with each case's arguments, in a process of its own and in turns.

    Its last line is the pair of numbers that it measured of itself, in JSON.
    """
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, arguments in cases.items():
            command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            first, second = json.loads(done.stdout.splitlines()[-1])
            results[name].append((first, second))
    return results


def print_table(results: Mapping[str, Sequence[Run]], ours: str) -> None:
    """Medians of each command, and the median over the turns of its time divided by that of ``ours``."""
    print(f"| command | wall-clock, median (min–max) | peak memory | time / {ours} |")
    print("|---|---|---|---|")
    for name, runs in results.items():
        seconds = [r.seconds for r in runs]
        ratios = [r.seconds / own.seconds for r, own in zip(runs, results[ours], strict=True)]
        print(
            f"| {name} | {statistics.median(seconds):.1f} s ({min(seconds):.1f}–{max(seconds):.1f}) "
            f"| {statistics.median(r.peak_mb for r in runs):.0f} MB | {statistics.median(ratios):.1f}× |"
        )
