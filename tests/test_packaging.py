"""Wheel and sdist: what is in them, and that what the wheel installs runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

import frodctl
from tests.conftest import EXAMPLE

ROOT = Path(__file__).parent.parent
CACHES = (".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info")
BUILD = """
import sys
from setuptools import build_meta

folder = sys.argv[1]
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""
TOP = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, made by the backend itself: no network, nothing left in the working tree."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", ".venv", *CACHES))
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def sources(folder: str) -> set[str]:
    """The files of a folder of the project, by their paths in it."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        about = f"frodctl-{frodctl.__version__}.dist-info"
        metadata = wheel.read(f"{about}/METADATA").decode()
        entries = wheel.read(f"{about}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(about)} == sources("frodctl")
    assert "frodctl/py.typed" in names
    assert f"{about}/licenses/LICENSE" in names
    assert "frodctl = frodctl.cli.main:main" in entries
    assert "hf-frod = frodctl.cli.main:main" in entries
    assert f"\nVersion: {frodctl.__version__}\n" in metadata
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.MULTILINE))
    assert extras == {"dev", "peft", "plot", "quantized", "test", "train", "transformers"}
    assert (ROOT / "README.md").read_text() in metadata  # what an index shows


def test_the_sdist_holds_what_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = sources("frodctl") | sources("tests") | sources("examples") | sources("docs") | sources(".ci") | {*TOP}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", ".venv"))]


def test_the_wheel_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PIP_CONFIG_FILE": os.devnull}

    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", tmp_path / "site", built[0])
    where = run("-c", "import frodctl; print(frodctl.__file__)").strip()
    assert where == str(tmp_path / "site" / "frodctl" / "__init__.py")
    assert frodctl.__version__ in run("-m", "frodctl", "--version")
    assert "embed_tokens" in run("-m", "frodctl", "inspect", EXAMPLE)


def test_it_is_an_extension_of_hf(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Installed as `hf extensions install` does it, but for GitHub: by pip into the extension's own folder."""
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    assert not (ROOT / "hf-frod").exists()  # it would be run in place of what is installed
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-frod"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder / "site")
    subprocess.run([sys.executable, *map(str, pip), str(built[0])], check=True, timeout=300)
    extensions.ExtensionManifest(
        owner="someone",
        repo="hf-frod",
        repo_id="someone/hf-frod",
        short_name="frod",
        executable_path=str(folder / "site" / "bin" / "hf-frod"),
        type="python",
        installed_at=datetime.now(UTC),
    ).save(folder)
    quiet = {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(folder / "site"), **quiet}

    def hf(*arguments: str) -> str:
        code = "from huggingface_hub.cli.hf import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert frodctl.__version__ in hf("frod", "--version")
    assert "Usage: hf frod inspect" in hf("frod", "inspect", "--help")


def test_versions_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", frodctl.__version__)
    assert f"\nversion: {frodctl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## Unreleased\n" in changes
    assert frodctl.__version__ in changes
