"""The methods, at equal numbers: each makes a learner trainable, and gives the optimizer's groups at a rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import peft
from safetensors import safe_open
from torch import nn

import frodctl

from .tasks import Checkpoint, Learner, Task

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """`rate` is the middle of the search; None: the rate of the task's head."""

    name: str
    prepare: Callable[[Learner, Checkpoint, float], Groups]
    rate: float | None


def group(module: nn.Module, rate: float) -> dict[str, Any]:
    return {"params": [parameter for parameter in module.parameters() if parameter.requires_grad], "lr": rate}


def groups_of(method: Method, model: Learner, task: Task, checkpoint: Checkpoint, rate: float) -> Groups:
    """The method's, and the head's, whose rate is the same for all."""
    if method.rate is None:
        model.backbone.requires_grad_(False)
        return [group(model.head, rate)]
    if task.pretrained_head:
        model.head.requires_grad_(False)
    found = [*method.prepare(model, checkpoint, rate), group(model.head, task.head_rate)]
    return [one for one in found if one["params"]]


def full(model: Learner, checkpoint: Checkpoint, rate: float) -> Groups:
    """Everything but the embeddings."""
    model.backbone.get_input_embeddings().requires_grad_(False)
    return [group(model.backbone, rate)]


def with_peft(config: Callable[[Checkpoint], peft.PeftConfig]) -> Callable[[Learner, Checkpoint, float], Groups]:
    def prepare(model: Learner, checkpoint: Checkpoint, rate: float) -> Groups:
        model.backbone = peft.get_peft_model(model.backbone, config(checkpoint))
        return [group(model.backbone, rate)]

    return prepare


def lora(checkpoint: Checkpoint, **more: Any) -> peft.PeftConfig:
    rank = checkpoint.rank
    return peft.LoraConfig(target_modules=list(checkpoint.targets), r=rank, lora_alpha=2 * rank, **more)


def shira(checkpoint: Checkpoint) -> peft.PeftConfig:
    return peft.ShiraConfig(target_modules=list(checkpoint.targets), r=checkpoint.rank, random_seed=0)


@cache
def basis_of(checkpoint: Checkpoint, share: float = 1.0) -> Path:
    """A shared-basis file for as many numbers as LoRA trains, or for a share of them."""
    basis = checkpoint.folder.with_name(f"{checkpoint.folder.name}-{share:g}.frod.safetensors")
    if not basis.exists():
        frodctl.decompose(
            checkpoint.folder, basis, target_modules=",".join(checkpoint.targets),
            budget=share * lora_share(checkpoint), allocate="uniform",
        )  # fmt: skip
    return basis


def lora_share(checkpoint: Checkpoint) -> float:
    """Of the checkpoint's numbers, as many as LoRA of its rank trains."""
    endings = tuple(f".{target}.weight" for target in checkpoint.targets)
    with safe_open(checkpoint.folder / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    trained: int = checkpoint.rank * sum(sum(shape) for name, shape in shapes.items() if name.endswith(endings))
    total: int = sum(prod(shape) for shape in shapes.values())
    return trained / total


def uniform(model: Learner, checkpoint: Checkpoint) -> Path:
    """As many random positions in every category, for the number that LoRA trains."""
    return basis_of(checkpoint)


def frod(basis: Callable[[Learner, Checkpoint], Path] = uniform) -> Callable[[Learner, Checkpoint, float], Groups]:
    """The rate is ρ, of λ' and of S alike."""

    def prepare(model: Learner, checkpoint: Checkpoint, rate: float) -> Groups:
        frodctl.attach(model.backbone, basis(model, checkpoint))
        return frodctl.parameter_groups(model.backbone, rho_lambda=rate, rho_sparse=rate)

    return prepare


FROD_RATE = 1.6e-2
METHODS = {
    method.name: method
    for method in (
        Method("full", full, 4e-4),
        Method("head alone", lambda model, checkpoint, rate: [], None),
        Method("LoRA", with_peft(lora), 8e-3),
        Method("rsLoRA", with_peft(lambda checkpoint: lora(checkpoint, use_rslora=True)), 4e-3),
        Method("SHiRA", with_peft(shira), 1e-2),
        Method("FRoD", frod(), FROD_RATE),
    )
}
