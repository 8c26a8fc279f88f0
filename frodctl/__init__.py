"""FRoD: joint decomposition of a model's layers, and merging of what was trained, streamed.

The jobs behind the ``frodctl`` command are plain functions here::

    frodctl.decompose(model, output, ...) -> DecomposeResult
    frodctl.merge(base, adapter, output, ...) -> MergeResult
    frodctl.inspect(*targets, ...) -> InspectResult

and so is training: `frodctl.attach` makes a live model trainable, `frodctl.save_adapter` saves what was trained,
`frodctl.load_adapter` takes it up again (more in `frodctl.training`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frodctl.formats.basis_file import BasisFile, open_basis
    from frodctl.jobs.decompose import DecomposeResult, decompose
    from frodctl.jobs.inspect import InspectResult, inspect
    from frodctl.jobs.merge import MergeResult, merge
    from frodctl.training import attach, load_adapter, parameter_groups, save_adapter, select_pattern

__version__ = "0.1.0.dev0"

__all__ = [
    "BasisFile",
    "DecomposeResult",
    "InspectResult",
    "MergeResult",
    "attach",
    "decompose",
    "inspect",
    "load_adapter",
    "merge",
    "open_basis",
    "parameter_groups",
    "save_adapter",
    "select_pattern",
]

_HOME = {
    "BasisFile": "frodctl.formats.basis_file",
    "DecomposeResult": "frodctl.jobs.decompose",
    "InspectResult": "frodctl.jobs.inspect",
    "MergeResult": "frodctl.jobs.merge",
    "attach": "frodctl.training",
    "decompose": "frodctl.jobs.decompose",
    "inspect": "frodctl.jobs.inspect",
    "load_adapter": "frodctl.training",
    "merge": "frodctl.jobs.merge",
    "open_basis": "frodctl.formats.basis_file",
    "parameter_groups": "frodctl.training",
    "save_adapter": "frodctl.training",
    "select_pattern": "frodctl.training",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
