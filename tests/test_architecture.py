"""The arrows between the packages run one way, and only the command line prints."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "frodctl"
MAY_IMPORT = {
    "cli": {"jobs", "checkpoint", "errors", "values", ""},
    "jobs": {"checkpoint", "method", "formats", "errors", "values", ""},
    "formats": {"checkpoint", "method", "errors", "values"},
    "checkpoint": {"errors", "values"},
    "method": {"errors"},
    "training": {"method", "formats", "checkpoint", "errors", "values", ""},
}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The frodctl modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "frodctl")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "frodctl":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and ((ROOT / parts[1]).exists() or (ROOT / f"{parts[1]}.py").exists()) else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    if package not in MAY_IMPORT:  # __init__, __main__, errors
        return
    allowed = MAY_IMPORT[package] | {package}
    assert {package_of(module) for module in imported(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [call.id for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    streams = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
    ]
    prints = str(path.relative_to(ROOT)) == "training/report.py"  # print_trainable_parameters, as PEFT has it
    if path.relative_to(ROOT).parts[0] != "cli" and not prints:
        assert not printing + streams


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_of_the_library_name_parameters_not_flags(path: Path) -> None:
    """In backticks, which the command line shows as flags; a card's shell command is one."""
    if path.relative_to(ROOT).parts[0] == "cli":
        return
    tree = ast.parse(path.read_text())
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = [node.value for node in texts if id(node) not in documents and re.search(r"(?<!\S)--[a-z]", node.value)]
    assert named == ([" --basis FILE"] if path.name == "saving.py" else [])


def test_no_torch_at_import_time_outside_the_numbers() -> None:
    """Plans are made without torch: only these modules import it when they are imported."""
    numbers = {
        "checkpoint/pickled.py",
        "checkpoint/stream.py",
        "jobs/inspect/adapter.py",
        "jobs/inspect/against.py",
        "jobs/inspect/basis.py",
        "jobs/inspect/matrices.py",
        "jobs/merge/projection.py",
        "jobs/merge/tensors.py",
        "jobs/merge/updates.py",
        "method/estimate.py",
        "method/joint_basis.py",
        "method/linalg.py",
        "method/spectra.py",
        "method/update.py",
        "training/attachment.py",
        "training/check.py",
        "training/groups.py",
        "training/layer.py",
        "training/peft.py",
        "training/peft_layers.py",
        "training/products.py",
        "training/reads.py",
        "training/report.py",
        "training/saving.py",
        "training/selection.py",
        "training/trainer.py",
    }
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "torch" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
    }
    assert found == numbers


def test_all_that_is_imported_is_declared() -> None:
    """What is installed with something else may go with it."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[>=\[]", line)[0] for line in project["dependencies"]}
    extras = {
        re.split(r"[>=\[]", line)[0]
        for name in ("peft", "plot", "quantized", "train")
        for line in project["optional-dependencies"][name]
    }
    found = {
        name.split(".")[0].replace("_", "-")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    found -= {name.replace("_", "-") for name in sys.stdlib_module_names} | {"frodctl"}
    assert required <= found <= required | extras
