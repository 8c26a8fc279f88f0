"""One process of two that train models whose parameters are sharded, or whose batches are: see test_sharded.py."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM

import frodctl
from tests import peft_models
from tests.training.conftest import labelled


def attached(kind: str, base: Path, basis: Path) -> Any:
    """The model of a kind, bert or mixture, with an adapter."""
    if kind == "mixture":
        return frodctl.attach(Qwen3MoeForCausalLM.from_pretrained(base, dtype="auto"), basis).eval()
    return frodctl.attach(peft_models.task_model("bert", base), basis, modules_to_save=["classifier"]).eval()


def train(model: Any, kind: str, rows: slice = slice(None)) -> list[float]:
    """The losses of three steps, with these rows of the batches."""
    groups = frodctl.parameter_groups(model, rho_lambda=3e-2, rho_sparse=3e-2, lr=1e-2)
    optimizer = torch.optim.Adam(groups, eps=1e-5)  # so that the rounding of tiny gradients counts for little
    parallel = DistributedDataParallel(model) if rows != slice(None) else model
    losses = []
    for step in range(3):
        batch = {name: tensor[rows] for name, tensor in labelled(kind, step).items()}
        loss = parallel(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(kind: str, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with every parameter spread over the processes, and save in each of the ways."""
    model = attached(kind, base, basis)
    for block in model.bert.encoder.layer if kind == "bert" else model.model.layers:
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
    train(model, kind, slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        frodctl.save_adapter(model, folder / "replicated")


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for kind, base, basis in zip(sys.argv[3::3], map(Path, sys.argv[4::3]), map(Path, sys.argv[5::3]), strict=True):
        for way in (sharded, replicated):
            way(kind, folder / kind, base, basis, rank)
            torch.distributed.barrier()
    gc.collect()  # what DistributedDataParallel holds of the group must go before it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
