"""One process of two that train one model whose parameters are sharded: see test_sharded.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import frodctl
from tests import peft_models
from tests.training.conftest import labelled


def train(model: Any) -> list[float]:
    """The losses of three steps."""
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model, rho_lambda=3e-2, rho_sparse=3e-2, lr=1e-2))
    losses = []
    for step in range(3):
        loss = model(**labelled("bert", step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    rank, folder, base, basis = int(sys.argv[1]), *map(Path, sys.argv[2:])
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = frodctl.attach(peft_models.task_model("bert", base), basis, modules_to_save=["classifier"]).eval()
    for block in model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in trained if len(parameter) > 1)
    losses = train(model)
    frodctl.save_adapter(model, folder / "gathered")
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder / "pretrained", is_main_process=rank == 0)
    if rank == 0:
        frodctl.save_adapter(model, folder / "given", state_dict=state)
        (folder / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
