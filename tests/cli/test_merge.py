"""``frodctl merge`` as a command: what it prints, what it refuses, and what an interrupted run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import frodctl
from frodctl.checkpoint import manifest
from frodctl.cli.main import main
from tests import forked, peft_models
from tests.conftest import Run
from tests.hub_server import HubServer
from tests.jobs.test_merge import write_adapter


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small base, an adapter that PEFT trained on it, and its basis."""
    root = tmp_path_factory.mktemp("llama")
    peft_models.save_base(root / "base", "llama", torch.float32)
    peft_models.trained_adapter(root / "adapter", "llama", root / "base")
    frodctl.decompose(str(root / "base"), root / "basis.safetensors", target_modules="q_proj")
    return {name: root / name for name in ("base", "adapter")} | {"basis": root / "basis.safetensors"}


def tree(folder: Path) -> dict[str, str]:
    """Every file below the folder and its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def but_for_the_title(files: dict[str, str]) -> dict[str, str]:
    """The card's title is the folder's name, and the manifest has the card's size."""
    return {name: digest for name, digest in files.items() if name not in ("README.md", manifest.FILE)}


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a base or an adapter with other tensors."""
    shutil.copytree(source, target)
    file = next(target.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return target


# Refusals: exit code, message, nothing left behind


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a merge that must fail, and return what it says; nothing may have changed on the disk."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *arguments: Any) -> str:
        before = tree(tmp_path), sorted(tmp_path.iterdir())
        assert main(["merge", *map(str, arguments)]) == code
        assert (tree(tmp_path), sorted(tmp_path.iterdir())) == before
        error = capsys.readouterr()
        assert error.out == ""
        assert 1 <= len(error.err.strip().splitlines()) <= 3
        return error.err

    return run


def test_an_output_that_exists(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in refused(2, llama["base"], llama["adapter"], "out")
    (tmp_path / "out" / "thesis.tex").touch()
    assert "more than a checkpoint" in refused(2, llama["base"], llama["adapter"], "out", "--force")
    (tmp_path / "file").touch()
    assert "not a folder" in refused(2, llama["base"], llama["adapter"], "file", "--force")
    assert "no such folder" in refused(2, llama["base"], llama["adapter"], "a/b")
    assert "more than a checkpoint" in refused(2, llama["base"], llama["adapter"], ".", "--force")


def test_an_output_in_around_or_equal_to_what_is_read(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    shutil.copytree(llama["base"], tmp_path / "base")
    shutil.copytree(llama["adapter"], tmp_path / "adapter")
    for out in ("base", "base/out", ".", "adapter"):
        assert "which is read" in refused(2, "base", "adapter", out, "--force"), out
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    assert "which is read" in refused(2, "-", "adapter", "base/out", "--force")
    shutil.copytree(llama["base"], tmp_path / "out")
    shutil.copy(llama["basis"], tmp_path / "out" / "basis.safetensors")
    assert "which is read" in refused(2, "base", "adapter", "out", "--force", "--basis", "out/basis.safetensors")


def test_a_full_disk(llama: dict[str, Path], refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "on disk" in refused(4, llama["base"], llama["adapter"], "out")


def test_another_base(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    """The digests in an adapter, with its basis in a file or in itself."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1

    other = edited(llama["base"], tmp_path / "other", change)
    adapter = write_adapter(tmp_path / "adapter", llama["base"], llama["basis"], 0.1)
    message = refused(3, other, adapter, "out", "--basis", llama["basis"])
    assert "model.layers.1.self_attn.q_proj.weight is not the one" in message
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["frodctl"]["base"] = {}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "no digest of the base's weight" in refused(3, other, adapter, "out", "--basis", llama["basis"])
    holding = write_adapter(tmp_path / "holding", llama["base"], llama["basis"], 0.1, holding_basis=True)
    assert "is not the one that" in refused(3, other, holding, "out")


def test_tensors_that_match_nothing(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.model.layers.0.self_attn.q_proj.frod_lambda_l"
        for suffix in ("l", "s_values"):
            name = key.replace("lambda_l", f"lambda_{suffix}")
            tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)

    def foreign(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)

    def stray(tensors: dict[str, torch.Tensor]) -> None:
        tensors["something"] = torch.ones(2)

    for number, edit in enumerate((renamed, foreign, stray)):
        adapter = edited(llama["adapter"], tmp_path / f"adapter{number}", edit)
        message = refused(3, llama["base"], adapter, "out")
        assert any(name in message for name in ("layers.9", "lora_A", "something")), message


def test_shapes_that_differ(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    def wide(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)

    def short(tensors: dict[str, torch.Tensor]) -> None:
        name = "base_model.model.model.layers.0.self_attn.q_proj.frod_lambda_s_values"
        tensors[name] = tensors[name][:-1]

    def outside(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.frod_s_indices.self_attn_q_proj"][0, 0] = 32

    def norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.norm.weight"] = torch.ones(31)

    assert "columns: another base?" in refused(3, edited(llama["base"], tmp_path / "wide", wide), llama["adapter"], "o")
    for number, (edit, text) in enumerate(
        [(short, "50 sparse values for the 51 positions"), (outside, "outside the 32 x 32"), (norm, "[31]")]
    ):
        adapter = edited(llama["adapter"], tmp_path / f"adapter{number}", edit)
        assert text in refused(3, llama["base"], adapter, "out")


def test_nan_in_base_adapter_or_result(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"

    def put(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[key].view(-1)[0] = value

        return edit

    nan, large = float("nan"), 1e30
    base = edited(llama["base"], tmp_path / "base", put(f"{name}.weight", nan))
    assert f"tensor {name}.weight holds 1 values that are NaN" in refused(3, base, llama["adapter"], "out")
    key = f"base_model.model.{name}.frod_lambda_l"
    adapter = edited(llama["adapter"], tmp_path / "nan", put(key, nan))
    assert f"tensor {key} holds NaN" in refused(3, llama["base"], adapter, "out")
    adapter = edited(llama["adapter"], tmp_path / "large", put(key, large))
    message = refused(3, llama["base"], adapter, "out", "--dtype", "float16")
    assert f"{name}.weight: the merged weight holds NaN or Inf in float16" in message
    adapter = edited(llama["adapter"], tmp_path / "v", put("base_model.frod_V.self_attn_q_proj", nan))
    assert "frod_V.self_attn_q_proj holds NaN" in refused(3, llama["base"], adapter, "out")


def test_ties(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    """A head that is the embedding: targeted, or the embedding trained as a whole."""
    model = peft_models.task_model("llama", llama["base"])
    for number, changes in enumerate(({"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]})):
        live = peft.get_peft_model(model, peft_models.frod_config("llama", **changes))
        live.save_pretrained(tmp_path / f"adapter{number}")
        message = refused(3, llama["base"], tmp_path / f"adapter{number}", "out")
        assert "tie" in message
        model = peft_models.task_model("llama", llama["base"])


def test_not_an_adapter(llama: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    assert "no adapter here" in refused(3, llama["base"], llama["base"], "out")
    shutil.copytree(llama["adapter"], tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "type LORA, not FROD" in refused(3, llama["base"], "lora", "out")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "FROD", "frodctl": {"form": 3}}')
    assert "damaged frodctl object" in refused(3, llama["base"], "lora", "out")
    assert "no such" in refused(1, llama["base"], "./missing", "out")
    assert "holds an adapter" in refused(3, "lora", llama["adapter"], "out")


def test_base_and_adapter_in_each_other_s_place(llama: dict[str, Path], refused: Any) -> None:
    for base in (llama["base"], llama["base"] / "model.safetensors"):
        for adapter in (llama["adapter"], llama["adapter"] / "adapter_model.safetensors"):
            for flags in ((), ("--dry-run",)):
                message = refused(3, adapter, base, "out", *flags)
                assert f"BASE {adapter} is an adapter, and ADAPTER {base} is not: exchange them" in message
    assert "exchange" not in refused(3, llama["adapter"], llama["adapter"], "out")
    assert "exchange" not in refused(3, "-", llama["base"], "out")


def test_another_job_does_not_take_up_the_pieces(
    llama: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters with their scales exchanged: the same tensors and options, but another result."""

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lambda_s" in name:
                tensors[name] *= 2

    one, two = llama["adapter"], edited(llama["adapter"], tmp_path / "two", double)
    monkeypatch.chdir(tmp_path)

    def run(first: Path, second: Path, out: str) -> int:
        return main(["merge", str(llama["base"]), str(first), out, "--scale", "0.6", "--also", f"{second}:0.4", "-q"])

    with monkeypatch.context() as patch:  # all tensors are written, and then the run ends
        patch.setattr("frodctl.jobs.merge.run._write_the_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(one, two, "out") == 130
    assert list((tmp_path / "out.partial").glob("*/journal.jsonl"))
    assert run(two, one, "out") == 0
    assert run(two, one, "clean") == 0
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "clean")["model.safetensors"]


# As a LoRA adapter


def test_a_lora_adapter(llama: dict[str, Path], tmp_path: Path, frodctl: Run) -> None:
    """A row for each layer; the plan has the same columns."""
    command = ("merge", llama["base"], llama["adapter"], "out", "--as", "lora")
    plan = frodctl(*command, "--rank", "8", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "Would write out (" in plan.stderr
    done = frodctl(*command, "--rank", "8")
    assert done.returncode == 0, done.stderr
    assert "12 layers" in done.stderr
    assert "of ‖ΔW‖² kept" in done.stderr
    planned, found = ([line.split("\t") for line in run.stdout.splitlines()] for run in (plan, done))
    assert planned[0] == found[0] == "module m n rank parameters delta_norm kept distance".split()
    assert [line[:5] for line in planned] == [line[:5] for line in found]
    assert len(found) == 13
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "frodctl.json",
    ]  # fmt: skip
    document = json.loads(frodctl(*command, "--energy", "50%", "--force", "--json", "-q").stdout)
    assert min(row["kept"] for row in document["layers"]) >= 0.5


def test_what_a_lora_adapter_needs(llama: dict[str, Path], refused: Any) -> None:
    lora = (llama["base"], llama["adapter"], "out", "--as", "lora")
    assert "give --rank 64, or --energy 95%" in refused(2, *lora)
    assert "--rank and --energy exclude each other" in refused(2, *lora, "--rank", "4", "--energy", "90%")
    assert "it goes with --as lora" in refused(2, *lora[:3], "--rank", "4")


# What it prints


def test_a_dry_run_writes_nothing_and_says_what_would_come(
    llama: dict[str, Path], frodctl: Run, tmp_path: Path
) -> None:
    done = frodctl("merge", llama["base"], llama["adapter"], "out", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    assert plan["dry_run"] is True
    assert (plan["merged_tensors"], plan["added_tensors"], plan["replaced_tensors"]) == (12, [], [])
    frodctl("merge", llama["base"], llama["adapter"], "out")
    assert plan["output_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {row["category"] for row in plan["categories"]} == {
        "mlp_down_proj", "mlp_up_proj", "self_attn_q_proj", "self_attn_v_proj",
    }  # fmt: skip


def test_a_base_of_another_name_is_warned_about(llama: dict[str, Path], frodctl: Run, tmp_path: Path) -> None:
    shutil.copytree(llama["base"], tmp_path / "other")
    assert "Warning: the adapter was trained on" in frodctl("merge", "other", llama["adapter"], "out").stderr
    quiet = frodctl("merge", llama["base"], llama["adapter"], "out2", "-q")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout.startswith("adapter\tcategory\tlayers")


def test_force_replaces_and_leaves_no_trace(llama: dict[str, Path], frodctl: Run, tmp_path: Path) -> None:
    assert frodctl("merge", llama["base"], llama["adapter"], "out").returncode == 0
    first = tree(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink(missing_ok=True)
    assert frodctl("merge", "-", llama["adapter"], "out", "--force", "--no-verify").returncode == 0
    assert tree(tmp_path) == {f"out/{name}": digest for name, digest in first.items()}
    (tmp_path / "out" / "old").touch()
    done = frodctl("merge", "-", llama["adapter"], "out", "--force")
    assert (done.returncode, "old" in done.stderr) == (2, True)
    assert (tmp_path / "out" / "old").exists()


def test_base_and_adapter_from_the_hub(llama: dict[str, Path], frodctl: Run, tmp_path: Path) -> None:
    """Both downloaded; the dry run fetches no weights; the commit is in the card; no token anywhere."""
    local = frodctl("merge", llama["base"], llama["adapter"], "local")
    assert local.returncode == 0
    with HubServer({"org/base": llama["base"], "org/adapter": llama["adapter"]}) as hub:
        env = hub.env(tmp_path / "home", HF_TOKEN="hf_secret", HF_HUB_OFFLINE="0")
        dry = frodctl("merge", "org/base", "org/adapter", "out", "--dry-run", "--json", env=env)
        assert dry.returncode == 0, dry.stderr
        weights = [r for r in hub.requests if r.method == "GET" and ".safetensors" in r.path]
        assert weights
        assert all(request.range for request in weights)
        done = frodctl("merge", "org/base@main", "org/adapter", "out", env=env)
    assert done.returncode == 0, done.stderr
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "local")
    assert but_for_the_title(ours) == but_for_the_title(theirs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/base" in card
    assert "hf_secret" not in card + done.stderr + done.stdout
    offline = frodctl("merge", "org/base", "org/adapter", "out2", "--offline", env=env)
    assert offline.returncode == 0, offline.stderr


# Killed runs


@pytest.fixture(scope="module")
def larger(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """MiniLM and an adapter with random changes: about a second of work."""
    root = tmp_path_factory.mktemp("minilm")
    config = peft.FrodConfig(target_modules="all-linear", progressbar=False, sparse_rate=0.01)
    model = peft.get_peft_model(AutoModel.from_pretrained(minilm), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(root / "adapter")
    return minilm, root / "adapter"


@pytest.mark.long  # tests/trust kills at every operation on files
def test_killed_at_every_moment_and_rerun(llama: dict[str, Path], tmp_path: Path) -> None:
    """At every report and before every change of a file: what has the final name is whole, and a rerun makes it."""
    arguments = (str(llama["base"]), str(llama["adapter"]))
    frodctl.merge(*arguments, tmp_path / "whole", max_shard_size="60KB")
    expected = tree(tmp_path / "whole")
    resumed = []
    for moment in count(1):
        words = ["merge", *arguments, "out", "--max-shard-size", "60KB"]
        done = forked.frodctl(words, tmp_path, moment=(moment, ""))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if not (tmp_path / "out").exists():
            resumed.append(frodctl.merge(*arguments, tmp_path / "out", max_shard_size="60KB").resumed_tensors)
            assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
        assert but_for_the_title(tree(tmp_path / "out")) == but_for_the_title(expected), moment
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    tensors = sum(len(load_file(shard)) for shard in (tmp_path / "whole").glob("*.safetensors"))
    assert {0, tensors} < set(resumed)
    assert moment > len(resumed) + 2  # those after publishing


@pytest.mark.long
def test_killed_at_random_moments_and_rerun(larger: tuple[Path, Path], tmp_path: Path) -> None:
    """Which no report and no file marks."""
    words = ["merge", *map(str, larger), "out", "--max-shard-size", "30MB"]
    command = [sys.executable, "-m", "frodctl", *words]
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    duration = time.monotonic() - started
    expected = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    moments = random.Random(0)
    for number in range(100):
        with suppress(subprocess.TimeoutExpired):  # which kills
            subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=duration * moments.uniform(0.3, 0.95))
        if (tmp_path / "out").exists():
            assert tree(tmp_path / "out") == expected, number
            shutil.rmtree(tmp_path / "out")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert tree(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_keeps_what_is_finished(
    number: signal.Signals, code: int, llama: dict[str, Path], tmp_path: Path
) -> None:
    """In the middle of merging, and as the last files are written."""
    arguments = (str(llama["base"]), str(llama["adapter"]))
    frodctl.merge(*arguments, tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    for moment, least in (((8, "merging"), 1), ((1, "README.md"), 12)):
        done = forked.frodctl(["merge", *arguments, "out"], tmp_path, moment=moment, number=number)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.endswith("Interrupted; the same command resumes.\n")
        assert not (tmp_path / "out").exists()
        assert frodctl.merge(*arguments, tmp_path / "out").resumed_tensors >= least
        assert but_for_the_title(tree(tmp_path / "out")) == but_for_the_title(expected)
        shutil.rmtree(tmp_path / "out")


def test_a_rerun_under_another_path_is_refused(llama: dict[str, Path], refused: Any) -> None:
    assert "no such folder" in refused(2, llama["base"], llama["adapter"], "again/../whole")  # again/ is no folder
