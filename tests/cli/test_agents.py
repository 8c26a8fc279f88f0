"""What an agent is shown, where huggingface_hub's own detection sees one, and by ``--format agent``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import EXAMPLE, Run, on_a_terminal

#: As the Hub serves it; huggingface_hub keeps it in its home.
REGISTRY = {"standardEnvVars": ["AI_AGENT"], "harnesses": {"some-agent": {"envVars": {"SOME_AGENT": "*"}}}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which huggingface_hub has its list of agents."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".agent_harnesses.json").write_text(json.dumps(REGISTRY))
    return tmp_path / "home"


@pytest.mark.parametrize("variable", ["AI_AGENT", "SOME_AGENT"])
def test_a_detected_agent_is_served_on_a_terminal(home: Path, tmp_path: Path, variable: str) -> None:
    """Separated values, no escape sequence, no bar; a person is shown a table."""
    if variable == "SOME_AGENT":
        pytest.importorskip("huggingface_hub.utils._detect_agent")
    decompose = ("decompose", EXAMPLE, "-o", "b.safetensors", "--force")
    agent = on_a_terminal(*decompose, cwd=tmp_path, HF_HOME=str(home), **{variable: "1"})
    assert "\x1b" not in agent
    assert "category\tlayers" in agent
    assert "% done)" in agent
    assert "category\t" not in on_a_terminal(*decompose, cwd=tmp_path, HF_HOME=str(home))
    asked = on_a_terminal(*decompose, "--format", "human", cwd=tmp_path, HF_HOME=str(home), **{variable: "1"})
    assert "category\t" not in asked


def test_by_hand(frodctl: Run) -> None:
    tsv, json_ = (frodctl("inspect", EXAMPLE, *more) for more in (("--format", "agent"), ("--json",)))
    assert tsv.stdout == frodctl("inspect", EXAMPLE, "--format", "tsv").stdout
    compact = frodctl("inspect", EXAMPLE, "--format", "agent", "--json").stdout
    assert compact.count("\n") == 1
    assert json.loads(compact) == json.loads(json_.stdout)


@pytest.mark.parametrize("arguments", [("inspect", "--nonsense"), ("inspect",), ("nonsense",)])
def test_wrong_usage_is_one_line(frodctl: Run, arguments: tuple[str, ...]) -> None:
    detected = frodctl(*arguments, env={"AI_AGENT": "mine"})
    by_hand = frodctl(*arguments, "--format=agent") if "inspect" in arguments else detected
    for done in (detected, by_hand):
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
    assert frodctl(*arguments).stderr.startswith("Usage: ")


def test_no_list_is_fetched_for_it(frodctl: Run, tmp_path: Path) -> None:
    """The Hub may be asked, and is not."""
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert frodctl("inspect", EXAMPLE, "--json", env=env).stdout.count("\n") > 1
    assert not os.path.lexists(tmp_path / "home")
