"""Jobs that several processes share, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore
from transformers import AutoModel

import frodctl
from frodctl.checkpoint import manifest
from frodctl.errors import UsageError
from frodctl.jobs import ranks
from frodctl.jobs.decompose import DecomposeOptions, plan_decompose
from frodctl.jobs.ranks import Launch, RankLost
from frodctl.method.ranks import divided, shares
from tests import forked
from tests.conftest import llama_layers, save_checkpoint, snapshot
from tests.jobs.test_decompose import check_identities

KILLED = -signal.SIGKILL


def torchrun(
    count: int, *words: object, cwd: Path, moments: dict[int, forked.Moment] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run the command in so many ranks, without torchrun's own two seconds; each may kill itself at a moment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RESTART_COUNT": "0"}
    common |= {"OMP_NUM_THREADS": "1"}
    environments = [{**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    return forked.together([str(word) for word in words], cwd, environments, moments or {})


def succeed(runs: Sequence[subprocess.CompletedProcess[str]]) -> None:
    """All ended well, and the first alone has said something."""
    assert [run.returncode for run in runs] == [0] * len(runs), [run.stderr for run in runs]
    assert all(not run.stdout and not run.stderr for run in runs[1:])


def same_up_to_rounding(first: Path, second: Path, *, relative: float = 1e-6) -> None:
    """τ, which do not depend on how V is turned where directions are equal."""
    ours, theirs = frodctl.open_basis(first), frodctl.open_basis(second)
    modules: dict[str, list[str]] = {}
    for record in ours.metadata.modules:
        modules.setdefault(record.category, []).append(record.name)
    assert ours.metadata.modules == theirs.metadata.modules
    for category in modules:
        tau = [basis.tensor(f"tau.{category}") for basis in (ours, theirs)]
        np.testing.assert_allclose(*tau, rtol=0, atol=relative * tau[0].max())


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_example_by_several_ranks(count: int, example: Path, tmp_path: Path) -> None:
    frodctl.decompose(example, tmp_path / "one.safetensors", target_modules="all-linear")
    command = ("decompose", example, "--target-modules", "all-linear", "-o", "several.safetensors")
    runs = torchrun(count, *command, cwd=tmp_path)
    succeed(runs)
    assert "Wrote several.safetensors" in runs[0].stderr
    assert len(runs[0].stdout.splitlines()) == 8
    check_identities(example, tmp_path / "several.safetensors")
    same_up_to_rounding(tmp_path / "one.safetensors", tmp_path / "several.safetensors")


def degenerate() -> dict[str, torch.Tensor]:
    """One category whose layers differ in scale by so much that R comes from QR; a singular one; one that is tall."""
    layers = llama_layers(6)
    for i in range(6):
        layers[f"model.layers.{i}.self_attn.q_proj.weight"] *= 10.0 ** (-2 * i)
        layers[f"model.layers.{i}.self_attn.q_proj.weight"][:, 5] = 0
        layers[f"model.layers.{i}.self_attn.k_proj.weight"][:, 3] = 0
    return layers


def test_layers_of_one_category_divided_whatever_the_weights(tmp_path: Path) -> None:
    """Each category alone, so that its layers are divided: by QR, by eigenvectors, wide and tall."""
    base = save_checkpoint(tmp_path / "base", degenerate())
    for role in ("q_proj", "k_proj", "up_proj", "down_proj"):
        one, two = tmp_path / f"{role}-one.safetensors", tmp_path / f"{role}-two.safetensors"
        frodctl.decompose(base, one, target_modules=role)
        succeed(torchrun(2, "decompose", base, "--target-modules", role, "-o", two, cwd=tmp_path))
        check_identities(base, two)
        same_up_to_rounding(one, two)


def test_a_killed_rank_ends_the_job_and_a_rerun_resumes(example: Path, tmp_path: Path) -> None:
    command = ("decompose", example, "--target-modules", "all-linear", "-o", "basis.safetensors")
    runs = torchrun(2, *command, cwd=tmp_path, moments={0: (1, "writing")})
    assert runs[0].returncode == KILLED
    assert runs[1].returncode == 1
    assert "another rank has ended" in runs[1].stderr or not runs[1].stderr
    assert [path.name for path in tmp_path.iterdir()] == ["basis.safetensors.partial"]
    runs = torchrun(2, *command, cwd=tmp_path)
    succeed(runs)
    assert runs[0].stdout.count("\ttrue\t") == 7
    assert [path.name for path in tmp_path.iterdir()] == ["basis.safetensors"]


def test_the_rank_that_fails_says_why_and_no_other(tmp_path: Path) -> None:
    layers = llama_layers(4)
    layers["model.layers.3.mlp.down_proj.weight"][1, 2] = torch.nan
    base = save_checkpoint(tmp_path / "base", layers)
    runs = torchrun(2, "decompose", base, "--target-modules", "down_proj", "-o", "out.safetensors", cwd=tmp_path)
    assert 3 in {run.returncode for run in runs}
    assert 0 not in {run.returncode for run in runs}
    said = "".join(run.stderr for run in runs)
    assert said.count("Error:") == 1
    assert "model.layers.3.mlp.down_proj.weight" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_usage_errors_are_said_once_and_other_commands_refuse(example: Path, tmp_path: Path) -> None:
    runs = torchrun(2, "inspect", example, cwd=tmp_path)
    assert [run.returncode for run in runs] == [2, 2]
    assert "".join(run.stderr for run in runs).count("inspect runs in one process") == 1


def test_a_plan_says_what_each_rank_does_and_takes(example: Path, tmp_path: Path) -> None:
    plan = plan_decompose(
        example, None, DecomposeOptions.of(target_modules="all-linear"), dry_run=True, ranks=3
    ).as_dict()
    assert plan["ranks"] == 3
    assert {rank for row in plan["categories"] for rank in row["ranks"]} == {0, 1, 2}
    assert plan["peak_memory_bytes"] == max(row["memory_bytes"] for row in plan["categories"])


def finished(division: Any, tasks: Any, count: int) -> float:
    """When the last rank is done, each task being begun when all of its ranks are free, the longest first."""
    ends = [0.0] * count
    for i in sorted(range(len(tasks)), key=lambda i: -tasks[i](len(division[i]))):
        end = max(ends[rank] for rank in division[i]) + tasks[i](len(division[i]))
        for rank in division[i]:
            ends[rank] = end
    return max(ends)


def test_whole_tasks_where_they_come_out_even_and_divided_where_one_is_long() -> None:
    equal = [lambda ranks: 1.0 / ranks + 0.2 * (ranks > 1)] * 4
    assert sorted(divided(equal, 4)) == [(0,), (1,), (2,), (3,)]
    long = [lambda ranks: 10.0 / ranks + 1, *[lambda ranks: 1.0] * 4]
    division = divided(long, 3)
    assert len(division[0]) > 1
    assert finished(division, long, 3) < 8
    assert divided(long, 1) == ((0,),) * 5
    fixed = [lambda ranks: max(1.0, 4.0 / ranks)] * 2
    assert all(len(members) <= 4 for members in divided(fixed, 16))


def test_shares_are_even() -> None:
    for items, count in [(7, 3), (3, 3), (30, 4), (1, 1)]:
        parts = shares(items, count)
        assert [i for part in parts for i in part] == [*range(items)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


A_RANK = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "x"}, "RANK=x in the environment is no whole number from 0 to 1 (WORLD_SIZE=2)"),
        ({"RANK": "2"}, "RANK=2 in the environment is no whole number from 0 to 1 (WORLD_SIZE=2)"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": None}, "RANK is missing"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no whole number of 1 or more;"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is missing"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": None}, "MASTER_PORT is missing"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 in the environment is no whole number from 1 to 65535"),
        ({"MASTER_PORT": "٣"}, "MASTER_PORT=٣"),
    ],
)
def test_variables_that_torchrun_would_not_set(changed: dict[str, str | None], said: str) -> None:
    environ = {name: text for name, text in {**A_RANK, **changed}.items() if text is not None}
    with pytest.raises(UsageError) as caught:
        Launch(environ)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("without RANK and WORLD_SIZE in the environment this is one process")


def test_one_process_needs_none_of_them() -> None:
    for environ in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "x"}):
        assert Launch(environ).count == 1


def test_they_are_a_usage_error_of_the_command() -> None:
    command = [sys.executable, "-m", "frodctl", "--help"]
    done = subprocess.run(command, env=os.environ | {"RANK": "x"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: WORLD_SIZE is missing")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_ranks_that_do_not_meet(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is another program's: the first rank cannot open a store there, the second gets no answer."""
    monkeypatch.setattr(ranks, "_START", timedelta(seconds=0.5))
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        environ = {**A_RANK, "RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": port}
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        launch = Launch(environ)
        with pytest.raises(RankLost, match=f"do not meet at 127.0.0.1:{port} "):
            _ = launch.world
        assert launch.first_to_fail()


def test_ranks_of_which_one_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_START", timedelta(seconds=0.5))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {**A_RANK, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(RankLost, match="not all of the 2 ranks of torchrun came"):
        _ = Launch(environ).world


CORPUS = Path(__file__).parents[1] / "corpus" / "553d683"
MERGE = ("--basis", CORPUS / "basis.safetensors", "--max-shard-size", "1MB")


def weights(folder: Path) -> dict[str, bytes]:
    """A merged checkpoint's files, but those that hold the folder's name, or such a file's size."""
    return {name: data for name, data in snapshot(folder).items() if name not in {"README.md", manifest.FILE}}


def test_merged_bytes_are_one_processs_and_a_killed_merge_is_taken_up(example: Path, tmp_path: Path) -> None:
    merging = ("merge", example, CORPUS / "lean", "merged", *MERGE)
    runs = torchrun(2, *merging, cwd=tmp_path, moments={1: (3, "merging")})
    assert runs[1].returncode == KILLED
    assert runs[0].returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged.partial"]
    runs = torchrun(2, *merging, "--json", cwd=tmp_path)
    succeed(runs)
    result = json.loads(runs[0].stdout)
    assert result["resumed_tensors"] > 0
    assert result["ranks"] == 2
    alone = forked.frodctl(("merge", example, CORPUS / "lean", "alone", *MERGE), tmp_path, one_thread())
    assert alone.returncode == 0, alone.stderr
    assert weights(tmp_path / "merged") == weights(tmp_path / "alone")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_lora_adapter_is_not_for_several_ranks(example: Path, tmp_path: Path) -> None:
    runs = torchrun(2, "merge", example, CORPUS / "lean", "out", "--as", "lora", "--rank", "4", cwd=tmp_path)
    assert [run.returncode for run in runs] == [2, 2]
    assert "".join(run.stderr for run in runs).count("--as lora runs in one process") == 1


def trained_minilm(minilm: Path, folder: Path) -> tuple[Path, Path]:
    """A basis of MiniLM's, and an adapter as if it had been trained."""
    basis, adapter = folder / "basis.safetensors", folder / "adapter"
    frodctl.decompose(minilm, basis, target_modules="all-linear")
    model: Any = frodctl.attach(AutoModel.from_pretrained(minilm), basis)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-3)
    frodctl.save_adapter(model, adapter)
    return basis, adapter


@pytest.mark.long
def test_minilm_by_several_ranks(minilm: Path, tmp_path: Path) -> None:
    basis, adapter = trained_minilm(minilm, tmp_path)
    merging = ("merge", minilm, adapter, "--basis", basis, "--max-shard-size", "20MB")
    for count in (1, 2, 4):
        output = f"{count}.safetensors"
        succeed(torchrun(count, "decompose", minilm, "--target-modules", "all-linear", "-o", output, cwd=tmp_path))
        check_identities(minilm, tmp_path / output)
        same_up_to_rounding(basis, tmp_path / output)
        succeed(torchrun(count, *merging[:3], f"merged-{count}", *merging[3:], cwd=tmp_path))
        assert weights(tmp_path / f"merged-{count}") == weights(tmp_path / "merged-1")


def by_torchrun(count: int, *words: object, cwd: Path, killed: tuple[object, ...] = ()) -> Any:
    """The command as torchrun starts it; ``killed`` are the rank, number and word of where one kills itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"]
    program = ("tests.rank", *killed) if killed else ("frodctl",)
    command = [str(word) for word in (*launch, *program, *words)]
    environ = {**one_thread(), "PYTHONPATH": str(Path(__file__).parents[2])}
    limit = 30 if killed else 120  # the others end soon
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=limit, check=False)


@pytest.mark.long
@pytest.mark.parametrize(("rank", "number"), [(0, 1), (3, 5)])
def test_a_rank_of_torchruns_is_killed_and_a_rerun_resumes(
    rank: int, number: int, minilm: Path, tmp_path: Path
) -> None:
    """As the first writes the category that is divided, or the last its second or third; torchrun ends the others."""
    decomposing = ("decompose", minilm, "--target-modules", "all-linear", "-o", "basis.safetensors", "--json")
    done = by_torchrun(4, *decomposing, cwd=tmp_path, killed=(rank, number, ".safetensors.tmp"))
    assert done.returncode != 0
    assert not (tmp_path / "basis.safetensors").exists()
    done = by_torchrun(4, *decomposing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(row["resumed"] for row in json.loads(done.stdout)["categories"])
    check_identities(minilm, tmp_path / "basis.safetensors")

    (tmp_path / "trained").mkdir()
    basis, adapter = trained_minilm(minilm, tmp_path / "trained")
    merging = ("merge", minilm, adapter, "merged", "--basis", basis, "--max-shard-size", "20MB", "--json")
    done = by_torchrun(4, *merging, cwd=tmp_path, killed=(rank, 3, "merging"))
    assert done.returncode != 0
    assert not (tmp_path / "merged").exists()
    done = by_torchrun(4, *merging, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_tensors"] > 0
    alone = forked.frodctl(("merge", minilm, adapter, "alone", *merging[4:]), tmp_path, one_thread())
    assert alone.returncode == 0, alone.stderr
    assert weights(tmp_path / "merged") == weights(tmp_path / "alone")
