"""``--profile``: from the start of the process to the table on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from frodctl.cli.progress import Reporter
from frodctl.cli.started import started
from frodctl.jobs import profile as job

#: What takes less is left out of the table, which would show 0.
_LEAST_SECONDS = 5e-4


def begin(wanted: bool, *, dry_run: bool = False) -> job.Unprofiled:
    """The profile of this command, from the start of its process where it has one to itself."""
    own_process = started().own_process
    return job.begin(wanted, dry_run=dry_run, began=_process_began() if wanted and own_process else None)


def show(steps: Sequence[job.Step] | None, report: Reporter) -> None:
    """The table, if there is a profile."""
    if steps is None:
        return
    total = sum(step.seconds for step in steps if not step.workers)
    seen = [step for step in steps if step.seconds >= _LEAST_SECONDS]
    report.table([*job.rows(seen), {"step": "total", "threads": "command", "seconds": total}], job.COLUMNS)
    if any(step.workers for step in steps):
        report.note("Times of workers are sums over threads beside the command's; their GEMM peak is one core's.")


def _process_began() -> float | None:
    """When the process began, on `time.perf_counter`'s clock, to 10 ms; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age if age > 0 else None
