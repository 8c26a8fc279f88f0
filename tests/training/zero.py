"""One process of two that train by DeepSpeed: see test_sharded.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch

import frodctl
from frodctl.errors import UsageError
from tests.training.conftest import labelled
from tests.training.sharded import attached


def zero(stage: int, folder: Path, base: Path, basis: Path, rank: int) -> None:
    """Train with half of each batch, the optimizer's state (2) or all parameters (3) spread over the processes."""
    model = attached("bert", base, basis)
    groups = frodctl.parameter_groups(model, rho_lambda=3e-2, rho_sparse=3e-2, lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default it is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adam(groups, eps=1e-5), config=config)
    for step in range(3):
        batch = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in labelled("bert", step).items()}
        engine.backward(engine(**batch).loss)
        engine.step()
    if stage == 3:
        with pytest.raises(UsageError, match="GatheredParameters"):
            frodctl.save_adapter(model, folder / "parts")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        if rank == 0:
            frodctl.save_adapter(model, folder / f"zero-{stage}")


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for stage in (2, 3):
        zero(stage, *map(Path, sys.argv[1:]), rank=int(os.environ["RANK"]))
