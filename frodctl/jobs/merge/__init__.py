"""``frodctl.merge``: trained perturbations folded back into dense weights, or into a LoRA adapter."""

from frodctl.jobs.lora.plan import LoraPlan
from frodctl.jobs.merge.api import merge
from frodctl.jobs.merge.lora import MergeLoraPlan, plan_lora, run_lora
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import MergePlan, plan_merge
from frodctl.jobs.merge.run import MergeResult, run_merge

__all__ = [
    "LoraPlan",
    "MergeLoraPlan",
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "merge",
    "plan_lora",
    "plan_merge",
    "run_lora",
    "run_merge",
]
