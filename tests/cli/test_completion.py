"""What shells are offered, as they ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("frodctl inspect ", {"file,"}),
        ("frodctl inspect ./or", {"file,./or"}),
        ("frodctl inspect org/b", {"plain,org/base", "plain,org/basis.safetensors"}),
        ("frodctl merge org/base or", {"plain,org", "plain,org/base"}),
        ("frodctl merge org/base a --basis ./", {"file,./"}),
        ("frodctl decompose m --target-modules a", {"plain,all-linear"}),
        ("frodctl decompose m --device c", {"plain,cpu", "plain,cuda"}),
        ("frodctl inspect m --format js", {"plain,json", "plain,jsonl"}),
        ("frodctl e", {"plain,extract", "plain,env"}),
    ],
)
def test_what_is_offered(frodctl: Run, tmp_path: Path, words: str, offered: set[str]) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "basis.safetensors").touch()
    (tmp_path / "hub" / "models--org--base").mkdir(parents=True)
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = frodctl(env={"_FRODCTL_COMPLETE": "bash_complete", **env})
    assert set(done.stdout.splitlines()) == offered
