"""One process of two that train models whose parameters are sharded, or whose batches are: see test_sharded.py."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Qwen3MoeForCausalLM

import frodctl
from frodctl.errors import UsageError
from tests import peft_models
from tests.training.conftest import labelled


def attached(kind: str, base: Path, basis: Path) -> Any:
    """The model of a kind, bert or mixture, with an adapter."""
    if kind == "mixture":
        return frodctl.attach(Qwen3MoeForCausalLM.from_pretrained(base, dtype="auto"), basis).eval()
    return frodctl.attach(peft_models.task_model("bert", base), basis, modules_to_save=["classifier"]).eval()


def train(model: Any, kind: str, rows: slice = slice(None), wrapped: Any = None) -> list[float]:
    """The losses of three steps, with these rows of the batches; ``wrapped`` is what the model is called through."""
    groups = frodctl.parameter_groups(model, rho_lambda=3e-2, rho_sparse=3e-2, lr=1e-2)
    optimizer = torch.optim.Adam(groups, eps=1e-5)  # so that the rounding of tiny gradients counts for little
    losses = []
    for step in range(3):
        batch = {name: tensor[rows] for name, tensor in labelled(kind, step).items()}
        loss = (wrapped or model)(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def blocks(model: Any, kind: str) -> Any:
    """The model's layers."""
    return model.bert.encoder.layer if kind == "bert" else model.model.layers


def sharded(kind: str, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with every parameter spread over the processes, and save in each of the ways."""
    model = attached(kind, base, basis)
    for block in blocks(model, kind):
        fully_shard(block)
    fully_shard(model)
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in trained if len(parameter) > 1)
    losses = train(model, kind)
    frodctl.save_adapter(model, folder / "gathered")
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder / "pretrained", is_main_process=rank == 0)
    if rank == 0:
        frodctl.save_adapter(model, folder / "given", state_dict=state)
        (folder / "losses.json").write_text(json.dumps(losses))


def replicated(kind: str, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with half of each batch."""
    model = attached(kind, base, basis)
    train(model, kind, slice(2 * rank, 2 * rank + 2), DistributedDataParallel(model))
    if rank == 0:
        frodctl.save_adapter(model, folder / "replicated")


def flattened(kind: str, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with every block's parameters spread over the processes as one, by FSDP's first version."""
    model = attached(kind, base, basis)
    policy = ModuleWrapPolicy({type(blocks(model, kind)[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    if kind == "mixture":
        with pytest.raises(UsageError, match=r"experts.*fully_shard, not by FSDP's first version"):
            train(model, kind, wrapped=wrapped)
        return
    losses = train(model, kind, wrapped=wrapped)
    with pytest.raises(UsageError, match="summon_full_params"):
        frodctl.save_adapter(model, folder / "flat")
    with FullyShardedDataParallel.summon_full_params(wrapped):
        if rank == 0:
            frodctl.save_adapter(model, folder / "summoned")
            (folder / "flattened.json").write_text(json.dumps(losses))


def accelerated(kind: str, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with half of each batch, by accelerate."""
    accelerator = Accelerator(cpu=True)
    rows: Any = [{k: v[i] for k, v in labelled(kind, step).items()} for step in range(3) for i in range(4)]
    model = attached(kind, base, basis)
    groups = frodctl.parameter_groups(model, rho_lambda=3e-2, rho_sparse=3e-2, lr=1e-2)
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    for batch in batches:
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        frodctl.save_adapter(accelerator.unwrap_model(wrapped), folder / "accelerated")


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    for kind, base, basis in zip(sys.argv[2::3], map(Path, sys.argv[3::3]), map(Path, sys.argv[4::3]), strict=True):
        for way in (sharded, replicated, flattened, accelerated):
            way(kind, folder / kind, base, basis, rank)
            torch.distributed.barrier()
    gc.collect()  # what DistributedDataParallel holds of the group must go before it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
