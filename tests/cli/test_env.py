"""``frodctl env`` in processes of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import frodctl

TOKEN = "hf_loopbackSecretToken"
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; from frodctl.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def run(*arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), **env, "PYTHONPATH": str(Path(frodctl.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "env", *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["environment", "file"])
def test_what_is_there_and_no_secret(tmp_path: Path, where: str) -> None:
    """Versions are those that are installed; of a token and of a password in an address nothing is shown."""
    secrets = {"HF_ENDPOINT": "https://me:hf_password@hub.example/hub", "SOME_KEY": "hf_other", "AWS_SECRET_KEY": "s3"}
    if where == "file":
        (tmp_path / "token").write_text(TOKEN)
    secrets["HF_TOKEN"] = TOKEN if where == "environment" else ""
    done = run("--json", home=tmp_path, **secrets)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not [secret for secret in (TOKEN, "hf_password", "hf_other", "SOME_KEY") if secret in done.stdout]
    found = json.loads(done.stdout)
    assert found["frodctl"] == frodctl.__version__
    assert {name: found[name] for name in ("numpy", "torch")} == {
        name: importlib.metadata.version(name) for name in ("numpy", "torch")
    }
    assert found["hub_token"] == "given"
    assert found["hub_endpoint"] == "https://hub.example/hub"
    assert found["hub_cache"] == str(tmp_path / "hub")


def test_in_lines(tmp_path: Path) -> None:
    done = run(home=tmp_path, HF_TOKEN="", OMP_NUM_THREADS="1")
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert (rows["name"], rows["OMP_NUM_THREADS"], rows["hub_token"]) == ("value", "1", "none")
    assert rows["numpy_blas"].endswith(", 1 threads")


def test_devices_are_torchs(tmp_path: Path) -> None:
    """Only for them torch is needed."""
    assert run("--devices", home=tmp_path).returncode == 1
    done = subprocess.run(
        [sys.executable, "-m", "frodctl", "env", "--devices", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["torch_threads"] >= 1
