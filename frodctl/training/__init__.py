"""Training at full rank with few numbers: layers that are attached to a live model, saved, merged and taken off.

`frodctl.training.peft` is the bridge to PEFT's own FRoD model.
"""

from frodctl.training.accumulation import accumulating
from frodctl.training.attachment import attach, detach, disabled, merge_, set_adapter, set_scale, trainable_parameters
from frodctl.training.groups import parameter_groups
from frodctl.training.loading import load_adapter
from frodctl.training.plan import StepCost, step_costs
from frodctl.training.reallocation import reallocate
from frodctl.training.report import print_step_cost, print_trainable_parameters
from frodctl.training.saving import save_adapter
from frodctl.training.selection import select_pattern

__all__ = [
    "StepCost",
    "accumulating",
    "attach",
    "detach",
    "disabled",
    "load_adapter",
    "merge_",
    "parameter_groups",
    "print_step_cost",
    "print_trainable_parameters",
    "reallocate",
    "save_adapter",
    "select_pattern",
    "set_adapter",
    "set_scale",
    "step_costs",
    "trainable_parameters",
]
