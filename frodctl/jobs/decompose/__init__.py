"""Decompose: a checkpoint becomes a shared-basis file."""

from frodctl.jobs.decompose.api import decompose
from frodctl.jobs.decompose.options import ALLOCATIONS, DecomposeOptions
from frodctl.jobs.decompose.plan import DecomposePlan, plan_decompose
from frodctl.jobs.decompose.run import DecomposeResult, run_decompose

__all__ = [
    "ALLOCATIONS",
    "DecomposeOptions",
    "DecomposePlan",
    "DecomposeResult",
    "decompose",
    "plan_decompose",
    "run_decompose",
]
