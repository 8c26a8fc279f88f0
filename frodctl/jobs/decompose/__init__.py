"""Decompose: a checkpoint becomes a shared-basis file."""

from frodctl.jobs.decompose.plan import ALLOCATIONS, DecomposeOptions, DecomposePlan, plan_decompose
from frodctl.jobs.decompose.run import DecomposeResult, decompose, run_decompose

__all__ = [
    "ALLOCATIONS",
    "DecomposeOptions",
    "DecomposePlan",
    "DecomposeResult",
    "decompose",
    "plan_decompose",
    "run_decompose",
]
