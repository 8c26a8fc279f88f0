"""FRoD: joint decomposition of a model's layers, and merging of what was trained, streamed.

The jobs behind the ``frodctl`` command are plain functions here::

    frodctl.decompose(model, output, ...) -> DecomposeResult     (a DecomposePlan with dry_run=True)
    frodctl.merge(base, adapter, output, ...) -> MergeResult     (a MergePlan with dry_run=True)
    frodctl.merge(base, adapter, output, as_="lora", rank=64) -> LoraResult
    frodctl.extract(base, tuned, output, rank=64) -> LoraResult
    frodctl.inspect(*targets, ...) -> InspectResult

and so is training: `frodctl.attach` makes a live model trainable, `frodctl.save_adapter` saves what was trained,
`frodctl.load_adapter` takes it up again (more in `frodctl.training`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frodctl.errors import FrodctlError, InvalidInput, OutOfResources, UsageError
    from frodctl.formats.basis_file import BasisFile, open_basis
    from frodctl.jobs.decompose import DecomposeOptions, DecomposePlan, DecomposeResult, decompose
    from frodctl.jobs.extract import ExtractOptions, FrodPlan, FrodResult, extract
    from frodctl.jobs.inspect import InspectOptions, InspectResult, inspect
    from frodctl.jobs.lora.plan import LoraPlan
    from frodctl.jobs.lora.run import LoraResult
    from frodctl.jobs.merge import MergeOptions, MergePlan, MergeResult, merge
    from frodctl.jobs.progress import Progress
    from frodctl.training import (
        accumulating,
        attach,
        load_adapter,
        parameter_groups,
        print_trainable_parameters,
        reallocate,
        save_adapter,
        select_pattern,
    )

__version__ = "0.1.0"

__all__ = [
    "BasisFile",
    "DecomposeOptions",
    "DecomposePlan",
    "DecomposeResult",
    "ExtractOptions",
    "FrodPlan",
    "FrodResult",
    "FrodctlError",
    "InspectOptions",
    "InspectResult",
    "InvalidInput",
    "LoraPlan",
    "LoraResult",
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "OutOfResources",
    "Progress",
    "UsageError",
    "accumulating",
    "attach",
    "decompose",
    "extract",
    "inspect",
    "load_adapter",
    "merge",
    "open_basis",
    "parameter_groups",
    "print_trainable_parameters",
    "reallocate",
    "save_adapter",
    "select_pattern",
]

_HOMES = {
    "frodctl.errors": "FrodctlError InvalidInput OutOfResources UsageError",
    "frodctl.formats.basis_file": "BasisFile open_basis",
    "frodctl.jobs.decompose": "DecomposeOptions DecomposePlan DecomposeResult decompose",
    "frodctl.jobs.extract": "ExtractOptions FrodPlan FrodResult extract",
    "frodctl.jobs.inspect": "InspectOptions InspectResult inspect",
    "frodctl.jobs.lora.plan": "LoraPlan",
    "frodctl.jobs.lora.run": "LoraResult",
    "frodctl.jobs.merge": "MergeOptions MergePlan MergeResult merge",
    "frodctl.jobs.progress": "Progress",
    "frodctl.training": "accumulating attach load_adapter parameter_groups print_trainable_parameters reallocate "
    "save_adapter select_pattern",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """What is here for users, imported or not yet."""
    return sorted(["__version__", *__all__])
