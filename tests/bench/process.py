"""Measure commands as whole processes, in turns: wall-clock seconds and peak resident memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_mb: float


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run the command to its end; its exit code must be 0."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss / 1024)


def in_turns(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[Run]]:
    """Run all commands once to warm up, then ``repeats`` times in turns, so that drift hits them alike."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            measured = run(command)
            if turn:
                results[name].append(measured)
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
