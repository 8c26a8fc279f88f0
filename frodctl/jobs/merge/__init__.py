"""``frodctl.merge``: trained perturbations folded back into dense weights."""

from frodctl.jobs.merge.plan import MergeOptions, MergePlan, plan_merge
from frodctl.jobs.merge.run import MergeResult, merge, run_merge

__all__ = ["MergeOptions", "MergePlan", "MergeResult", "merge", "plan_merge", "run_merge"]
