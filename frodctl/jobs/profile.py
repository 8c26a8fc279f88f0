"""The profile of a job, as it is asked for and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from frodctl import values
from frodctl.checkpoint.inputs import Json
from frodctl.errors import UsageError
from frodctl.jobs.columns import Column
from frodctl.method.profile import UNPROFILED, Profile, Step, Unprofiled

if TYPE_CHECKING:
    from typing import Self

__all__ = ["COLUMNS", "UNPROFILED", "Profiled", "Step", "Unprofiled", "begin", "rows"]

COLUMNS = (
    Column("step", "step", "text"),
    Column("dtype", "dtype", "text"),
    Column("threads", "in", "text"),
    Column("calls", "calls"),
    Column("seconds", "s", "thousandths"),
    Column("gflops_per_second", "GFLOP/s", "figure"),
    Column("gemm_share", "of GEMM", "share"),
    Column("gigabytes_per_second", "GB/s", "figure"),
)


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A job's result, which may say where the time went."""

    profile: tuple[Step, ...] | None = field(default=None, repr=False)  #: None where that was not asked for

    def with_profile(self, profile: Unprofiled) -> Self:
        """The result with what was measured."""
        return replace(self, profile=profile.finish())

    def profile_dict(self) -> dict[str, Json]:
        """What JSON has of it: nothing where there is none."""
        return {} if self.profile is None else {"profile": rows(self.profile)}


def begin(wanted: bool, *, dry_run: bool = False, began: float | None = None) -> Unprofiled:
    """A profile, if one is wanted; ``began`` as for `Profile`."""
    if not values.flag(wanted, "profile"):
        return UNPROFILED
    if dry_run:
        raise UsageError("`profile` is of work that is done, and `dry_run=True` does none; it estimates the time")
    return Profile(began)


def rows(steps: Sequence[Step]) -> list[dict[str, Json]]:
    """The steps as lines of a table."""
    return [
        {
            "step": step.name,
            "dtype": step.dtype or None,
            "threads": "workers" if step.workers else "command",
            "calls": step.calls,
            "seconds": step.seconds,
            "flops": step.flops or None,
            "gflops_per_second": step.flops / step.seconds / 1e9 if step.flops else None,
            "gemm_share": step.gemm_share,
            "bytes": step.nbytes or None,
            "gigabytes_per_second": step.nbytes / step.seconds / 1e9 if step.nbytes else None,
        }
        for step in steps
    ]
