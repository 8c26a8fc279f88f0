"""Several backward passes for one step: their gradients are those of one large batch, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import frodctl
from frodctl import training
from frodctl.errors import UsageError
from frodctl.training.layer import FrodLinear
from tests.training.conftest import Cases, labelled

PARTS = 4
FORMS = ("auto", "input", "weight", "weight+U")


def parts(family: str = "llama") -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one batch, of one size, so that the mean loss is the mean of theirs."""
    return [labelled(family, seed) for seed in range(PARTS)]


def whole(family: str = "llama") -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts(family)]) for name in parts(family)[0]}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None and p.numel()}


def of_one_batch(model: Any, family: str = "llama", scale: float = 1.0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (scale * model(**whole(family)).loss).backward()
    found = grads(model)
    model.zero_grad()
    return found


def accumulate(model: Any, family: str = "llama", scale: float = 1.0) -> None:
    *others, last = parts(family)
    with frodctl.accumulating(model):
        for part in others:
            (scale * model(**part).loss / PARTS).backward()
    (scale * model(**last).loss / PARTS).backward()


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    error = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    assert error.sqrt() <= tolerance * sum(g.double().square().sum() for g in expected.values()).sqrt()


@pytest.fixture(params=["input", "weight", "weight+U"])
def model(request: pytest.FixtureRequest, cases: Cases) -> Any:
    """In float64, so that what is compared is not rounding."""
    return cases("llama").trained(form=request.param).double().train()


def test_one_batch(model: Any) -> None:
    expected = of_one_batch(model)
    accumulate(model)
    check(grads(model), expected)
    accumulate(model)  # once more: it adds up, as gradients do
    check(grads(model), {name: 2 * gradient for name, gradient in expected.items()})


def test_without_the_word_every_pass_is_right(model: Any) -> None:
    expected = of_one_batch(model)
    for part in parts():
        (model(**part).loss / PARTS).backward()
    check(grads(model), expected)


def test_around_the_backward_passes_alone(model: Any) -> None:
    expected = of_one_batch(model)
    losses = [model(**part).loss / PARTS for part in parts()]
    with frodctl.accumulating(model):
        for loss in losses[:-1]:
            loss.backward()
    losses[-1].backward()
    check(grads(model), expected)


def test_clipping(model: Any) -> None:
    expected = of_one_batch(model)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    accumulate(model)
    found = nn.utils.clip_grad_norm_(trained(model).values(), float(norm) / 3)
    assert torch.allclose(found, norm)
    check(grads(model), {name: gradient / 3 for name, gradient in expected.items()}, 1e-4)  # torch adds 1e-6 to norms


def test_a_scaled_loss(cases: Cases) -> None:
    """GradScaler reads the gradients to unscale them; what is infinite makes it skip a step."""
    model = cases("llama").trained(form="weight").double().train()
    expected = of_one_batch(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    accumulate(model, scale=2.0**10)
    scaler.unscale_(optimizer)
    check(grads(model), expected)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    accumulate(model, scale=float("inf"))
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    scaler.step(optimizer)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, cases: Cases) -> None:
    for form in FORMS:
        model = cases("llama").trained(form=form).double().train()
        expected = of_one_batch(model)
        if reentrant:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        accumulate(model)
        check(grads(model), expected)


def test_an_evaluation_in_between(model: Any) -> None:
    expected = of_one_batch(model)
    *others, last = parts()
    for part in others:
        with frodctl.accumulating(model):
            (model(**part).loss / PARTS).backward()
        model.eval()
        with torch.no_grad():
            model(**part)
        with training.disabled(model), torch.inference_mode():
            model(**part)
        model.train()
    (model(**last).loss / PARTS).backward()
    check(grads(model), expected)


class Stop(Exception):
    """What a user's loop may meet."""


def test_an_exception_leaves_nothing_behind(model: Any) -> None:
    expected = of_one_batch(model)

    def stopped() -> None:
        with frodctl.accumulating(model):
            model(**parts()[0]).loss.backward()
            raise Stop

    with pytest.raises(Stop):
        stopped()
    model.zero_grad()
    accumulate(model)
    check(grads(model), expected)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_are_thrown_away(set_to_none: bool, model: Any) -> None:
    expected = of_one_batch(model)
    with frodctl.accumulating(model):
        for part in parts()[:2]:
            model(**part).loss.backward()
    torch.optim.SGD(trained(model).values(), lr=0.1).zero_grad(set_to_none)
    accumulate(model)
    check(grads(model), expected)


def test_a_step_without_the_last_pass(cases: Cases) -> None:
    model = cases("llama").trained(form="weight").train()
    optimizer = torch.optim.AdamW(frodctl.parameter_groups(model))
    with frodctl.accumulating(model):
        model(**parts()[0]).loss.backward()
    with pytest.raises(UsageError, match=r"outside of frodctl\.accumulating"):
        optimizer.step()
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0).step()  # whom it does not concern
    optimizer.zero_grad()
    model(**parts()[0]).loss.backward()
    optimizer.step()


def test_a_layer_that_the_last_pass_does_not_come_by(cases: Cases) -> None:
    """As an expert to which the last micro-batch gives no token."""
    model = cases("llama").trained(form="weight").double().train()
    experts = [layer for path, layer in model.named_modules() if path.endswith("mlp.up_proj")]
    x = torch.randn(3, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(part: int, count: int) -> torch.Tensor:
        return sum((expert(x[part]).square().mean() for expert in experts[:count]), torch.zeros(()))

    for part, count in enumerate((3, 2, 1)):
        loss(part, count).backward()
    expected = grads(model)
    model.zero_grad()
    with frodctl.accumulating(model):
        loss(0, 3).backward()
        loss(1, 2).backward()
    loss(2, 1).backward()
    check(grads(model), expected)


def test_nothing_to_accumulate() -> None:
    for model in (nn.Linear(2, 2), None, "x"):
        with pytest.raises(UsageError, match=r"attach first|`model`"), frodctl.accumulating(model):  # type: ignore[arg-type]
            pass


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel(cases: Cases, tmp_path: Path) -> None:
    """With `no_sync`; each pass that synchronizes finds every gradient, each other one needs none."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for form, view in zip(FORMS, (True, False, True, False), strict=True):
            model = cases("bert").trained(form=form).double().eval()
            expected = of_one_batch(model, "bert")
            parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
            *others, last = parts("bert")
            for _ in range(2):
                model.zero_grad()
                with parallel.no_sync(), frodctl.accumulating(parallel):
                    for part in others:
                        (parallel(**part).loss / PARTS).backward()
                (parallel(**last).loss / PARTS).backward()
                check(grads(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_accelerate(cases: Cases) -> None:
    """Which says itself what a step's last micro-batch is."""
    GradientState._reset_state()  # which is one for the process, and may know a data loader of another test
    model = cases("llama").trained(form="weight").double().train()
    expected = of_one_batch(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    prepared, stepping = accelerator.prepare(model, optimizer)
    try:
        for _ in range(2):
            for number, part in enumerate(parts()):
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**part).loss)
                    assert accelerator.sync_gradients == (number == PARTS - 1)
                    waiting = [m.update().waiting._total for m in model.modules() if isinstance(m, FrodLinear)]
                    assert all((total is None) == accelerator.sync_gradients for total in waiting)
                    if accelerator.sync_gradients:
                        check(grads(model), expected)
                        accelerator.clip_grad_norm_(trained(model).values(), 1e-3)
                    stepping.step()
                    stepping.zero_grad()
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4 * PARTS * 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(24) * (index + 3)) % 64
        return {"input_ids": ids, "labels": ids}


def test_transformers_trainer(cases: Cases, tmp_path: Path) -> None:
    """Micro-batches are one batch, clipping is active, and W' is formed and ∂L/∂W' projected once a step."""
    numbers, flops = [], []
    for micro in (1, PARTS):
        model = cases("llama").attached(form="weight")
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, gradient_accumulation_steps=micro, max_grad_norm=1e-3, save_strategy="no",
            per_device_train_batch_size=4 * PARTS // micro, report_to=[], use_cpu=True, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        optimizer = torch.optim.SGD(frodctl.parameter_groups(model, rho_lambda=50, rho_sparse=50))
        trainer = Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        flops.append(counter.get_total_flops())
        numbers.append({name: parameter.detach().clone() for name, parameter in trained(model).items()})
    assert sum(float(parameter.abs().sum()) for parameter in numbers[0].values()) > 0
    check(numbers[1], numbers[0], 1e-4)
    assert flops[1] == flops[0]


def measured(run: Callable[[], object]) -> int:
    """Operations of the dense products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("form", "keeps_U"), [("weight", False), ("weight+U", True)])
def test_operations_are_those_that_are_counted(form: str, keeps_U: bool, cases: Cases) -> None:
    """W' is formed once a step, ∂L/∂W' projected once in `accumulating` and else in each pass."""
    from frodctl.method.step_cost import Shape, weight_flops

    model = cases("llama").trained(form=form).train()
    tokens = 40
    for role in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        layer = model.model.layers[0].get_submodule(role)
        update = layer.update()
        m, n = layer.base_layer.weight.shape
        x = torch.randn(tokens, n, requires_grad=True)

        def run(passes: int, waiting: bool, layer: Any = layer, update: Any = update, x: Any = x) -> None:
            with torch.no_grad():
                update.delta.add_(1e-3)
            for number in range(passes):
                with ExitStack() as stack:
                    if waiting and number < passes - 1:
                        stack.enter_context(frodctl.accumulating(model))
                    layer(x).sum().backward()

        run(1, False)  # W D is there from now on
        shape = Shape(m, n, 0)
        for passes, waiting in ((1, False), (3, False), (3, True)):
            expected = weight_flops(shape, passes * tokens, keeps_U=keeps_U, passes=1 if waiting else passes)
            expected += 2 * n**3  # torch counts Q Vᵀ as if Q were dense
            assert measured(lambda passes=passes, waiting=waiting: run(passes, waiting)) == expected, role
