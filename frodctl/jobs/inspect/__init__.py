"""``frodctl.inspect``: what is in a checkpoint, a basis or an adapter, and how two checkpoints differ."""

from frodctl.jobs.inspect.report import InspectOptions, Report, Row
from frodctl.jobs.inspect.run import InspectResult, inspect, reports

__all__ = ["InspectOptions", "InspectResult", "Report", "Row", "inspect", "reports"]
