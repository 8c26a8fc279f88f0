"""``frodctl.merge``: trained perturbations folded back into dense weights."""

from frodctl.jobs.merge.api import merge
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import MergePlan, plan_merge
from frodctl.jobs.merge.run import MergeResult, run_merge

__all__ = ["MergeOptions", "MergePlan", "MergeResult", "merge", "plan_merge", "run_merge"]
