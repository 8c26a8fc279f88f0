"""``frodctl.extract``: a fine-tuned checkpoint, compressed to an adapter."""

from frodctl.jobs.extract.api import extract
from frodctl.jobs.extract.frod import FrodPlan, FrodResult, plan_frod, run_frod
from frodctl.jobs.extract.lora import ExtractLoraPlan, plan_lora, run_lora
from frodctl.jobs.extract.options import POSITIONS, RESULTS, ExtractOptions

__all__ = [
    "POSITIONS",
    "RESULTS",
    "ExtractLoraPlan",
    "ExtractOptions",
    "FrodPlan",
    "FrodResult",
    "extract",
    "plan_frod",
    "plan_lora",
    "run_frod",
    "run_lora",
]
