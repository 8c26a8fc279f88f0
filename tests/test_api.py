"""The Python API shows itself, and takes what the command line takes."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import frodctl
from frodctl.cli.main import main
from frodctl.errors import FrodctlError, UsageError
from tests.conftest import EXAMPLE

CORPUS = Path(__file__).parent / "corpus" / "553d683"
BASIS, ADAPTER = CORPUS / "basis.safetensors", CORPUS / "lean"
JOBS: dict[str, Callable[..., Any]] = {
    "decompose": frodctl.decompose,
    "merge": frodctl.merge,
    "extract": frodctl.extract,
    "inspect": frodctl.inspect,
}
OPTIONS = {
    "decompose": frodctl.DecomposeOptions,
    "merge": frodctl.MergeOptions,
    "extract": frodctl.ExtractOptions,
    "inspect": frodctl.InspectOptions,
}

SNIPPET = """
import frodctl

plan = frodctl.decompose("model", budget="2%", layers=range(4), target_modules=["q_proj"], dry_run=True)
plan.flops, plan.categories[0].n
merged = frodctl.merge("base", "adapter", "out", max_shard_size="5GB", also=["o:0.3"], basis=frodctl.open_basis("b"))
merged.seconds, merged.plan.flops
frodctl.merge("base", "adapter", "out", as_="lora", rank=64).overall.kept
frodctl.merge("base", "adapter", "out", as_="lora", energy="95%", dry_run=True).layers
frodctl.extract("base", "tuned", "out", rank=64).ranks
frodctl.extract("base", "tuned", "out", as_="frod", basis="b", budget="2%", dry_run=True).sparsity
frodctl.inspect("model", spectrum=True, include="*q_proj*", top=3).targets[0].rows
frodctl.decompose("model", sparsty=0.1)  # wrong
frodctl.decompose("model", layers=1.5)  # wrong
frodctl.decompose("model", dry_run=True).seconds  # wrong
frodctl.merge("base", "adapter", "out", scale=None)  # wrong
frodctl.merge("base", "adapter")  # wrong
frodctl.merge("base", "adapter", "out", as_="lora", rank=64).plan.shards  # wrong
frodctl.extract("base", "tuned", "out", rnk=64)  # wrong
frodctl.inspect("model", spectrm=True)  # wrong
frodctl.inspect("model", top=[1])  # wrong
"""


def test_mypy_knows_the_parameters(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-site-packages", "--follow-imports=silent"]
    command += ["--ignore-missing-imports", "--config-file=", f"--cache-dir={tmp_path}", "snippet.py"]
    environment = {"MYPYPATH": str(Path(frodctl.__file__).parent.parent), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    wrong = {number for number, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout + done.stderr


def test_names_are_listed_and_found() -> None:
    assert set(frodctl.__all__) <= set(dir(frodctl))
    for name in frodctl.__all__:
        assert getattr(frodctl, name) is not None
    with pytest.raises(AttributeError):
        frodctl.recompose  # noqa: B018


@pytest.mark.parametrize("name", JOBS)
def test_every_parameter_is_written_out_and_documented(name: str) -> None:
    signature = inspect.signature(JOBS[name])
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    documentation = inspect.getdoc(JOBS[name]) or ""
    listed = documentation.split("Parameters\n-")[1].split("Returns\n-")[0]
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.name in listed


@pytest.mark.parametrize("name", JOBS)
def test_python_and_the_command_line_have_the_same_parameters(name: str) -> None:
    from click import Argument, Option

    from frodctl.cli.main import cli

    command = cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    flags = {str(param.name): param for param in command.params}
    of_the_screen = {"format_", "json_", "quiet", "debug"} | (
        {"plot", "check", "min_survival", "force"} if name == "inspect" else set()
    )
    parameters = inspect.signature(JOBS[name]).parameters
    assert set(flags) - of_the_screen == set(parameters) - {"progress"}
    for parameter, flag in flags.items():
        if isinstance(flag, Option) and parameter in parameters and not flag.multiple and not flag.is_flag:
            given = {parameter: flag.default} if isinstance(flag.default, str) else {}
            assert OPTIONS[name].of(**given) == OPTIONS[name].of(), parameter
        else:
            assert isinstance(flag, (Argument, Option))


def test_a_dry_run_returns_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(b"mine")
    plan = frodctl.decompose(EXAMPLE, precious, dry_run=True)
    assert isinstance(plan, frodctl.DecomposePlan)
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    merging = frodctl.merge(EXAMPLE, ADAPTER, folder, basis=BASIS, dry_run=True)
    assert isinstance(merging, frodctl.MergePlan)
    assert precious.read_bytes() == b"mine"
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == [
        Path("folder"), Path("folder/.git"), Path("folder/thesis.txt"), Path("precious.safetensors")
    ]  # fmt: skip


ALIKE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("decompose", {"target_modules": ["q_proj"]}, ["--target-modules", "q_proj"]),
    ("decompose", {"target_modules": ("q_proj", "v_proj")}, ["--target-modules", "q_proj,v_proj"]),
    ("decompose", {"layers": [0, 1]}, ["--layers", "0-1"]),
    ("decompose", {"layers": range(2)}, ["--layers", "0,1"]),
    ("decompose", {"layers": 3}, ["--layers", "3"]),
    ("decompose", {"budget": "2%"}, ["--budget", "0.02"]),
    ("decompose", {"budget": 0.02}, ["--budget", "2%"]),
    ("decompose", {"sparsity": "1%"}, ["--sparsity", "0.01"]),
    ("decompose", {"sparsity": "0.01"}, ["--sparsity", "1%"]),
    ("decompose", {"cache_size": "128MB"}, ["--cache-size", "128000000"]),
    ("decompose", {"seed": "1", "alpha": "1e-2"}, ["--seed", "1", "--alpha", "0.01"]),
    ("decompose", {"exclude_modules": ["v_proj"]}, ["--exclude-modules", "v_proj"]),
    ("decompose", {"share_input": True}, ["--share-input"]),
    ("merge", {"max_shard_size": "1MB"}, ["--max-shard-size", "1000000"]),
    ("merge", {"scale": "0.5"}, ["--scale", "50%"]),
    ("merge", {"also": [f"{ADAPTER}:0.3"]}, ["--also", f"{ADAPTER}:30%"]),
    ("merge", {"also": [(ADAPTER, 0.3)]}, ["--also", f"{ADAPTER}:0.3"]),
    ("merge", {"as_": "lora", "rank": "8"}, ["--as", "lora", "--rank", "8"]),
    (
        "merge",
        {"as_": "lora", "energy": 0.9, "max_rank": "16"},
        ["--as", "lora", "--energy", "90%", "--max-rank", "16"],
    ),
    ("extract", {"rank": 8, "target_modules": ["q_proj"]}, ["--rank", "8", "--target-modules", "q_proj"]),
    (
        "extract",
        {"as_": "frod", "basis": BASIS, "budget": 0.02},
        ["--as", "frod", "--basis", str(BASIS), "--budget", "2%"],
    ),
    ("inspect", {"include": "*q_proj*"}, ["--include", "*q_proj*"]),
    ("inspect", {"include": ["*q_proj*", "*v_proj*"]}, ["--include", "*q_proj*", "--include", "*v_proj*"]),
    ("inspect", {"top": "3"}, ["--top", "3"]),
]


@pytest.mark.parametrize(("name", "options", "flags"), ALIKE, ids=lambda value: str(value)[:40])
def test_python_takes_what_the_command_line_takes(
    name: str, options: dict[str, Any], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    output = tmp_path / "out.safetensors" if name == "decompose" else tmp_path / "out"
    arguments = {
        "decompose": [EXAMPLE, "-o", output, "--dry-run"],
        "merge": [EXAMPLE, ADAPTER, output, "--basis", BASIS, "--dry-run"],
        "extract": [EXAMPLE, EXAMPLE, output, "--dry-run"],
        "inspect": [EXAMPLE],
    }[name]
    assert main([name, *map(str, arguments), *flags, "--json", "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    printed.pop("dry_run", None)
    basis = frodctl.open_basis(BASIS)
    found = {
        "decompose": lambda: frodctl.decompose(EXAMPLE, output, dry_run=True, **options),
        "merge": lambda: frodctl.merge(EXAMPLE, ADAPTER, output, basis=basis, dry_run=True, **options),
        "extract": lambda: frodctl.extract(EXAMPLE, EXAMPLE, output, dry_run=True, **options),
        "inspect": lambda: frodctl.inspect(EXAMPLE, **options),
    }[name]().as_dict()
    for document in (printed, found):
        document.pop("seconds_estimate", None)  # measured anew
    assert json.loads(json.dumps(found)) == printed


def test_inspect_takes_lists_of_targets() -> None:
    assert [t.target for t in frodctl.inspect([EXAMPLE, BASIS]).targets] == [str(EXAMPLE), str(BASIS)]
    for nothing in ((), ([],)):
        with pytest.raises(UsageError, match="`targets`"):
            frodctl.inspect(*nothing)


WRONG: list[Any] = [
    None, True, 0, -1, 1.5, math.nan, math.inf, "", "x", "\ud800", "a\0b", "nan", b"x", 1j, [], [None], {}, {"a": 1},
    object(),
]  # fmt: skip


def _calls(tmp_path: Path) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Each parameter of each job: the call with everything else right."""
    right: dict[str, dict[str, Any]] = {
        "decompose": {"model": EXAMPLE, "output": tmp_path / "o.safetensors", "dry_run": True},
        "merge": {
            "base": EXAMPLE, "adapter": ADAPTER, "output": tmp_path / "o", "basis": BASIS, "dry_run": True,
        },
        "extract": {"base": EXAMPLE, "tuned": EXAMPLE, "output": tmp_path / "o", "rank": 4, "dry_run": True},
        "inspect": {"targets": EXAMPLE},
    }  # fmt: skip
    for name, job in JOBS.items():
        for parameter in inspect.signature(job).parameters:
            if parameter == "progress":
                continue

            def call(value: Any, job: Callable[..., Any] = job, name: str = name, parameter: str = parameter) -> Any:
                given = right[name] | {parameter: value}
                return job(given.pop("targets"), **given) if "targets" in given else job(**given)

            yield name, call, parameter


def test_every_parameter_given_every_wrong_value(tmp_path: Path) -> None:
    """Either it is read, or refused by an error of ours; a value that no form has, by the parameter's name."""
    never = [object(), b"x", 1j, {"a": 1}]
    for name, call, parameter in _calls(tmp_path):
        for value in [*WRONG, *never]:
            refused = _refusal(call, value)
            assert "\n" not in str(refused), (name, parameter, value)
            assert refused is None or isinstance(refused, FrodctlError), (name, parameter, value, refused)
            if any(value is item for item in never):
                assert isinstance(refused, UsageError), (name, parameter, value)
                assert f"`{parameter}`" in str(refused), (name, parameter, value)
    assert list(tmp_path.iterdir()) == []


def _refusal(call: Callable[[Any], Any], value: Any) -> Exception | None:
    try:
        call(value)
    except Exception as error:
        return error
    return None


def test_every_flag_given_every_wrong_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from click import Option

    from frodctl.cli.main import cli

    monkeypatch.chdir(tmp_path)
    arguments = {
        "decompose": [EXAMPLE, "--dry-run"],
        "merge": [EXAMPLE, ADAPTER, "out", "--basis", BASIS, "--dry-run"],
        "extract": [EXAMPLE, EXAMPLE, "out", "--rank", "4", "--dry-run"],
        "inspect": [EXAMPLE],
    }
    for name, given in arguments.items():
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        for option in command.params:
            if not isinstance(option, Option) or option.is_flag:
                continue
            for word in ["", " ", "x", "-1", "1e999", "nan", "\ud800", "1%%", "٣", "a\nb"]:
                code = main([name, *map(str, given), option.opts[0], word])
                message = capsys.readouterr().err
                assert code in (0, 1, 2, 3), (name, option.opts, word, message)
                assert "unexpected" not in message, (name, option.opts, word, message)
                assert "Traceback" not in message
                if code:
                    assert "`" not in message, message
    assert list(tmp_path.iterdir()) == []
