"""The arrows between the packages run one way, and only the command line prints."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "frodctl"
MAY_IMPORT = {
    "cli": {"jobs", "checkpoint", "errors", "values", ""},
    "jobs": {"adapted", "checkpoint", "method", "formats", "arrays", "errors", "values", "pipeline", ""},
    "adapted": {"formats", "checkpoint", "method", "arrays", "errors", "values"},
    "formats": {"checkpoint", "method", "arrays", "errors", "values"},
    "checkpoint": {"arrays", "errors", "values", "pipeline"},
    "method": {"arrays", "errors"},
    "training": {"adapted", "method", "formats", "checkpoint", "arrays", "errors", "values", ""},
}
FILES = sorted(ROOT.rglob("*.py"))


#: What may load torch as it is imported: training, a GPU's arithmetic, and what reads pickles.
WITH_TORCH = ("training/", "method/kernels/device.py", "checkpoint/pickled.py")


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(tree: ast.AST, *, in_functions: bool) -> Iterator[ast.stmt]:
    """All statements, but those under ``if TYPE_CHECKING``, which only name types and are never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.stmt):
            yield node
        if in_functions or not isinstance(node, ast.FunctionDef):
            yield from statements(node, in_functions=in_functions)


@cache
def imports(path: Path, *, in_functions: bool = True) -> tuple[str, ...]:
    """The names that a file imports."""
    return tuple(_imports(path, in_functions))


def _imports(path: Path, in_functions: bool) -> Iterator[str]:
    for node in statements(tree_of(path), in_functions=in_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> Iterator[str]:
    """The frodctl modules that a file imports, anywhere in it."""
    return (name for name in imports(path) if name.split(".")[0] == "frodctl")


def file_of(name: str) -> Path | None:
    """The file of the module that is imported by a name, or from which the name is."""
    place = ROOT.parent.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py", place.parent.with_suffix(".py"))
    return next((path for path in (*candidates, place.parent / "__init__.py") if path in FILES), None)


def runs(path: Path) -> set[Path]:
    """The files that importing this one runs, itself among them: those of the packages around them too."""
    found, waiting = set[Path](), [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        waiting += [parent / "__init__.py" for parent in current.parents if parent.is_relative_to(ROOT)]
        waiting += [file for name in imports(current, in_functions=False) if (file := file_of(name))]
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and ((ROOT / parts[1]).exists() or (ROOT / f"{parts[1]}.py").exists()) else ""


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    if package not in MAY_IMPORT:  # __init__, __main__, errors
        return
    allowed = MAY_IMPORT[package] | {package}
    assert {package_of(module) for module in imported(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=place)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    printing = [call.id for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    streams = [
        node.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
    ]
    prints = place(path) == "training/report.py"  # print_trainable_parameters, as PEFT has it
    if path.relative_to(ROOT).parts[0] != "cli" and not prints:
        assert not printing + streams


def test_one_file_has_threads_work() -> None:
    """Locks and what is one thread's own may be anywhere."""
    starting = ("concurrent", "multiprocessing", "queue", "threading.Thread", "threading.Timer")
    found = [path.relative_to(ROOT) for path in FILES if any(name.startswith(starting) for name in imports(path))]
    attributes = [
        path.relative_to(ROOT)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in starting
    ]
    assert {*map(str, found + attributes)} == {"pipeline.py"}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_messages_of_the_library_name_parameters_not_flags(path: Path) -> None:
    """In backticks, which the command line shows as flags; a card's shell command is one."""
    if path.relative_to(ROOT).parts[0] == "cli":
        return
    tree = tree_of(path)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = [node.value for node in texts if id(node) not in documents and re.search(r"(?<!\S)--[a-z]", node.value)]
    assert named == ([" --basis FILE"] if path.name in ("saving.py", "frod.py") else [])


def test_no_two_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count; a package's own imports do not make its files depend on each other."""
    graph = {path: {file for name in imports(path) if (file := file_of(name))} - {path} for path in FILES}
    graph[ROOT / "__init__.py"] = set()  # gathers what is public, on demand
    free: set[Path] = set()
    while layer := {path for path, needs in graph.items() if path not in free and needs <= free}:
        free |= layer
    assert sorted(place(path) for path in set(graph) - free) == []


@pytest.mark.parametrize("path", [path for path in FILES if not place(path).startswith(WITH_TORCH)], ids=place)
def test_no_torch_on_a_cpu(path: Path) -> None:
    """Neither here nor in what importing this imports; see also `tests.test_torch_free`."""
    loading = [
        place(file)
        for file in runs(path)
        if any(name.split(".")[0] == "torch" for name in imports(file, in_functions=False))
    ]
    assert loading == []


def annotations(path: Path) -> Iterator[str]:
    """The types that a file names, and what its aliases of types stand for."""
    for node in ast.walk(tree_of(path)):
        found = [getattr(node, field, None) for field in ("annotation", "returns")]
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
            found.append(node.value)
        yield from (ast.unparse(annotation) for annotation in found if annotation is not None)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_only_what_loads_torch_is_typed_for_it_alone(path: Path) -> None:
    """Elsewhere what holds numbers is an `Array`, whichever library's it is; PEFT's routine takes tensors."""
    if not place(path).startswith((*WITH_TORCH, "arrays.py", "adapted/projection.py")):
        assert not [text for text in annotations(path) if re.search(r"\bTensor\b", text)]


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
        for node in ast.walk(tree_of(path))
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


#: What makes, changes or removes a file.
CHANGES = re.compile(
    r"os\.(write|pwrite|fsync|ftruncate|truncate|rename|replace|renames|unlink|remove|mkdir|makedirs|rmdir|link|symlink)"
    r"|shutil\.(copy\w*|move|rmtree)|tempfile\.(?!TemporaryDirectory)\w+"
    r"|(?!files\.).*\.(write_text|write_bytes|touch|symlink_to|hardlink_to|tofile)"
)
OPENS = re.compile(r"(.*\.)?open\(.*(['\"][rbt+]*[wxa+][bt+]*['\"]|O_(WRONLY|RDWR|CREAT)).*\)", re.DOTALL)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_one_file_changes_files(path: Path) -> None:
    """So that a test can have every step fail (`tests.trust`); stdout is no file of ours."""
    if place(path) in ("checkpoint/files.py", "cli/output.py", "cli/main.py"):
        return
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if CHANGES.fullmatch(ast.unparse(call.func))]
    assert not [call for call in calls if OPENS.fullmatch(ast.unparse(call))]
