"""The methods, at equal numbers: each makes a learner trainable, and gives the optimizer's groups at a rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

import frodctl
from frodctl.training.layer import Update

from .tasks import Checkpoint, Learner, Task, batches

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """`rate` is the middle of the search; None: the rate of the task's head. `after_step` is given the steps done, and
    those of the run.
    """

    name: str
    prepare: Callable[[Learner, Checkpoint, float], Groups]
    rate: float | None
    quantization: str | None = None  #: of the backbone: nf4, int8
    after_step: Callable[[Learner, Optimizer, int, int], None] = lambda model, optimizer, step, steps: None

    @property
    def is_frod(self) -> bool:
        return self.name.startswith("FRoD")


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
def basis_of(checkpoint: Checkpoint, sparsity: float | None = None) -> Path:
    """A shared-basis file for S at a share of all positions, or for as many numbers as LoRA trains."""
    called = "lora" if sparsity is None else f"{sparsity:g}"
    basis = checkpoint.folder.with_name(f"{checkpoint.folder.name}-{called}.frod.safetensors")
    if not basis.exists():
        many: dict[str, Any] = {"budget": lora_share(checkpoint), "allocate": "uniform"}
        frodctl.decompose(
            checkpoint.folder, basis, target_modules=",".join(checkpoint.targets),
            **(many if sparsity is None else {"sparsity": sparsity}),
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


def at(sparsity: float | None) -> Callable[[Learner, Checkpoint], Path]:
    """Random positions, the same share of them in every category."""
    return lambda model, checkpoint: basis_of(checkpoint, sparsity)


as_many_as_lora = at(None)


def frod(
    basis: Callable[[Learner, Checkpoint], Path] = as_many_as_lora, fix: Callable[[Update], None] = lambda update: None
) -> Callable[[Learner, Checkpoint, float], Groups]:
    """The rate is ρ, of λ' and of S alike; `fix` keeps numbers of an update where they are."""

    def prepare(model: Learner, checkpoint: Checkpoint, rate: float) -> Groups:
        frodctl.attach(model.backbone, basis(model, checkpoint))
        for module in model.backbone.modules():
            if isinstance(module, Update):
                fix(module)
        return frodctl.parameter_groups(model.backbone, rho_lambda=rate, rho_sparse=rate)

    return prepare


def no_scales(update: Update) -> None:
    """S alone is trained."""
    update.delta.requires_grad_(False)


def no_values(update: Update) -> None:
    """λ' alone is trained."""
    update.values.requires_grad_(False)


def touched_scales(update: Update) -> None:
    """Of λ' only what S has a row or a column of is trained."""
    mask = torch.zeros_like(update.delta)
    mask[update.pattern.indices().unique()] = 1
    update.delta.register_hook(lambda gradient: gradient * mask)


def moving(times: int, share: float) -> Callable[[Learner, Optimizer, int, int], None]:
    """So many times in a run a share of S's positions moves, but not in its last quarter."""

    def after_step(model: Learner, optimizer: Optimizer, step: int, steps: int) -> None:
        if step % max(1, steps // times) == 0 and step <= 0.75 * steps:
            some = islice(batches(model.task, step), MOVED_BY)
            frodctl.reallocate(model.backbone, some, optimizer, share=share, loss=lambda _, batch: model(**batch)[0])

    return after_step


MOVED_BY = 2  # batches
LORA_RATE, FROD_RATE = 8e-3, 1.6e-2
METHODS = {
    method.name: method
    for method in (
        Method("full", full, 4e-4),
        Method("head alone", lambda model, checkpoint, rate: [], None),
        Method("LoRA", with_peft(lora), LORA_RATE),
        Method("rsLoRA", with_peft(lambda checkpoint: lora(checkpoint, use_rslora=True)), 4e-3),
        Method("SHiRA", with_peft(shira), 1e-2),
        Method("FRoD", frod(), FROD_RATE),
    )
}
