"""One run: a method trained for one task at one rate from one seed, and what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

import frodctl

from .methods import Method, basis_of, groups_of
from .tasks import Checkpoint, Example, Learner, Task, batches, collate, learner

WARM_UP = 0.1
EVALUATION = 64  # examples at a time


@dataclass(frozen=True)
class Run:
    """What a run is told apart by, and its results."""

    part: str
    task: str
    method: str
    rate: float
    seed: int
    steps: int
    held_out: str  #: validation or test
    trained: int  #: numbers, without the head
    loss: float
    accuracy: float
    loss_at_a_third: float
    course: list[float]  #: training losses
    preparing: float  #: seconds until the first step
    training: float  #: seconds of all steps
    bytes: int  #: model, gradients, Adam's moments, and what the first step keeps for its backward pass
    merged: float | None = None  #: loss of what was trained over a quantized base, in the full-precision one


def run(
    part: str, task: Task, checkpoint: Checkpoint, method: Method, rate: float, seed: int, steps: int, held_out: str
) -> Run:
    """Train, and evaluate after a third of the steps and at the end."""
    model = learner(task, checkpoint, seed, method.quantization)
    started = time.perf_counter()
    groups = groups_of(method, model, task, checkpoint, rate)
    preparing, training = time.perf_counter() - started, 0.0
    optimizer = torch.optim.Adam(groups)
    rising = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))
    )
    examples: Sequence[Example] = getattr(task, held_out)
    course: list[float] = []
    third = (0.0, 0.0)
    kept = Kept()
    torch.manual_seed(seed)
    for step, batch in enumerate(islice(batches(task, seed), steps), 1):
        started = time.perf_counter()
        with kept if step == 1 else torch.enable_grad():
            loss, _, _ = model.train()(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        method.after_step(model, optimizer, step, steps)
        training += time.perf_counter() - started
        course.append(round(loss.item(), 4))
        if step == max(1, steps // 3):
            third = evaluate(model, task, examples)
    loss_at_end, accuracy = evaluate(model, task, examples)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    of_head = sum(p.numel() for p in model.head.parameters() if p.requires_grad)
    return Run(
        part, task.name, method.name, rate, seed, steps, held_out, trained - of_head, loss_at_end, accuracy, third[0],
        course, round(preparing, 3), round(training, 3), held + 12 * trained + kept.bytes,
        merged_loss(model, task, checkpoint, examples) if method.quantization and method.is_frod else None,
    )  # fmt: skip


def evaluate(model: Learner, task: Task, examples: Sequence[Example]) -> tuple[float, float]:
    """Loss and accuracy."""
    for module in model.eval().modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # in evaluation bitsandbytes packs its weight for good, and no gradient passes it again
    losses, right, count = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(examples), EVALUATION):
            loss, correct, of = model(**collate(task, examples[start : start + EVALUATION]))
            losses, right, count = losses + float(loss) * of, right + correct, count + of
    return losses / count, right / count


def merged_loss(model: Learner, task: Task, checkpoint: Checkpoint, examples: Sequence[Example]) -> float:
    """With what was trained in the full-precision model, as `frodctl.merge` puts it there."""
    full = learner(task, checkpoint, 0)
    full.head = model.head
    with tempfile.TemporaryDirectory() as folder:
        frodctl.save_adapter(model.backbone, folder)
        frodctl.load_adapter(full.backbone, folder, basis_of(checkpoint))
    return evaluate(full, task, examples)[0]


class Kept:
    """Counts within it the bytes that a forward pass keeps for the backward one, beside parameters."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor)

    def _see(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())
