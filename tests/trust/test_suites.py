"""The short form of the promises' tests; `python -m tests.trust` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.suites import SUITES


@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite.every])
def test_promises(name: str, tmp_path: Path) -> None:
    cases = SUITES[name].cases(tmp_path)
    for number in SUITES[name].short(len(cases)):
        cases[number]()
