"""How much memory a container may still take."""

from __future__ import annotations

from pathlib import Path

import pytest

from frodctl.jobs import resources


@pytest.mark.parametrize(("limit", "available"), [("1000", 600), ("max", None), ("300", 0)])
def test_the_page_cache_counts_as_available(limit: str, available: int | None, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\nactive_file 200\n")
    assert resources._cgroup(tmp_path) == available


def test_without_such_a_container_nothing_is_known(tmp_path: Path) -> None:
    assert resources._cgroup(tmp_path) is None
