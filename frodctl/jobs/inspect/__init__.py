"""``frodctl.inspect``: what is in a checkpoint, a basis or an adapter, and how two checkpoints differ."""

from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.inspect.api import inspect
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row
from frodctl.jobs.inspect.run import InspectResult, TargetResult, reports

__all__ = [
    "SCHEMA_VERSION",
    "InspectOptions",
    "InspectResult",
    "Report",
    "Row",
    "TargetResult",
    "inspect",
    "reports",
]
