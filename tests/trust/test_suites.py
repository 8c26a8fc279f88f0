"""The short form of the promises' tests; `python -m tests.trust` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.suites import SUITES


@pytest.mark.parametrize("name", SUITES)
def test_promises(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    for case in suite.cases(tmp_path)[:: suite.every]:
        case()
