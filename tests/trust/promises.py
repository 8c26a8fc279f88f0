"""The table of docs/promises.md: the promises, what holds them, and how often it was tried."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.trust.suites import SUITES

DOCUMENT = Path(__file__).parents[2] / "docs" / "promises.md"
_BEGIN, _END = "<!-- counts: begin -->", "<!-- counts: end -->"


def table(state: Mapping[str, Any]) -> str:
    """The suites with their counts."""
    lines = ["| suite | in CI | long form | failed | seconds |", "|---|--:|--:|--:|--:|"]
    for name, record in state.items():
        size = SUITES[name].size
        counts = [len(SUITES[name].short(record["done"])) * size, record["done"] * size]
        figures = [*counts, len(record["failed"]), round(record["seconds"])]
        lines.append(f"| {name} | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return "\n".join(lines)


def write(state: Mapping[str, Any]) -> None:
    """Write the counts of a run into the document."""
    text = DOCUMENT.read_text()
    found = re.sub(f"(?s)(?<={_BEGIN}\n).*(?={_END})", lambda _: f"{table(state)}\n", text)
    DOCUMENT.write_text(found)
