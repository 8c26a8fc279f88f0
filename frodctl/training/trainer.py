"""What a model's surroundings (transformers, its Trainer, DistributedDataParallel) need to know of the adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from frodctl.training.attached import added_prefixes
from frodctl.training.kept import check_nothing_waits
from frodctl.training.layer import Basis, Pattern, Update
from frodctl.training.rates import RHO, unit_rates
from frodctl.training.saving import save_adapter, save_trained_state, trained_state, writes

#: The name under which transformers' Trainer looks for weights as it resumes.
TRAINER_FILE = "model.safetensors"
_QUANTIZED_WITH_ADAPTER = "_hf_peft_config_loaded"
_LOADING = "_frod_loading"
_FAR = 10 * RHO


def prepare(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` save the adapter, ``load_state_dict`` take an adapter's state for a whole one, the
    Trainer take a quantized model for trainable, and the first step of an optimizer be looked at.
    """
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)
    if getattr(model, "is_quantized", False):
        setattr(model, _QUANTIZED_WITH_ADAPTER, True)
    hook = model.register_load_state_dict_post_hook(_expect_no_base)
    setattr(model, _LOADING, hook)
    _FIRST_STEPS.watch(model)


def restore(model: nn.Module) -> None:
    """Undo `prepare`."""
    model.__dict__[_LOADING].remove()
    for name in ("save_pretrained", _QUANTIZED_WITH_ADAPTER, "_ddp_params_and_buffers_to_ignore", _LOADING):
        model.__dict__.pop(name, None)
    _FIRST_STEPS.forget(model)


def _expect_no_base(model: nn.Module, keys: Any) -> None:
    """Where a state has nothing of the base, as in the Trainer's checkpoints, do not call the base missing."""
    added = added_prefixes(model)
    base = {name for name, _ in model.named_parameters() if not name.startswith(added)}
    if base <= set(keys.missing_keys):
        keys.missing_keys[:] = [name for name in keys.missing_keys if name.startswith(added)]


class _FirstSteps:
    """Looks at every optimizer before a step, and closely before its first one, for what would go wrong silently."""

    def __init__(self) -> None:
        self._models: WeakSet[nn.Module] = WeakSet()
        self._seen: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._hooked = False

    def watch(self, model: nn.Module) -> None:
        self._models.add(model)
        if not self._hooked:  # for good: a hook must not go as torch calls it, and a model may go at any time
            register_optimizer_step_pre_hook(self._before)
            self._hooked = True

    def forget(self, model: nn.Module) -> None:
        self._models.discard(model)

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        check_nothing_waits(optimizer)
        if self._models and optimizer not in self._seen:
            self._seen.add(optimizer)
            for model in list(self._models):
                updates = {path: module for path, module in model.named_modules() if isinstance(module, Update)}
                _check_rates(optimizer, updates)
                _check_gradients(optimizer, updates)


_FIRST_STEPS = _FirstSteps()


def _check_rates(optimizer: torch.optim.Optimizer, updates: dict[str, Update]) -> None:
    scales = {id(update.delta) for update in updates.values()}
    sparse = {id(update.values) for update in updates.values() if update.values.numel()}
    for group in optimizer.param_groups:
        taken = {id(parameter) for parameter in group["params"]}
        if taken & scales and taken & sparse:
            rate = float(group.get("initial_lr", group["lr"]))  # before a schedule's warm-up
            step = max(_relative_step(update, rate) for update in updates.values() if id(update.values) in taken)
            far = f"; its first step, by {step:.2g} of a weight's norm, is far too long" if step > _FAR else ""
            warnings.warn(
                f"one learning rate ({rate:g}) for λ' and S, whose sizes differ{far}: train with "
                "torch.optim.AdamW(frodctl.parameter_groups(model, steps=STEPS)), which transformers' Trainer takes as "
                "optimizers=(optimizer, None)",
                UserWarning,
                stacklevel=2,
            )
            return


def _relative_step(update: Update, rate: float) -> float:
    """How far one rate of Adam's takes the layer at first, by λ' or by S, beside its weight's norm."""
    return max((rate / unit for unit in unit_rates(update) if unit), default=0.0)


def _check_gradients(optimizer: torch.optim.Optimizer, updates: dict[str, Update]) -> None:
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {path: u.delta for path, u in updates.items() if id(u.delta) in taken and u.delta.requires_grad}
    trained = {path: delta for path, delta in trained.items() if delta.numel()}  # none where FSDP has it elsewhere
    without = [path.rpartition(".adapters.")[0] for path, delta in trained.items() if delta.grad is None]
    if without and len(without) < len(trained):
        others = f" and {len(without) - 1} more" if len(without) > 1 else ""
        warnings.warn(
            f"{without[0]}{others}: no gradient in the first step: the loss does not depend on what is trained there "
            "(of experts: no token came to them)",
            UserWarning,
            stacklevel=2,
        )


def leave_buffers_to_each_process(model: nn.Module) -> None:
    """Have DistributedDataParallel not send V, D and the patterns around: every process has them."""
    constant = (Basis, Pattern, Update)
    names = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, constant)
        for name, _ in module.named_buffers(recurse=False)
    ]
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


class SavePretrained:
    """``model.save_pretrained`` while adapters are attached.

    It saves the active adapter (`frodctl.save_adapter`), and beside it, in ``model.safetensors``, the trained numbers
    exactly as they are: that file alone transformers' Trainer reads as it resumes, by ``load_state_dict``. It cannot be
    spared: the adapter has λ' = λ + δ, from which nearly every δ comes back otherwise in its last bits, and training
    would go on differently. The base model's weights are in neither.
    Where parameters are sharded and no gathered ``state_dict`` is given, all processes must call it, as `save_adapter`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **_: object,
    ) -> None:
        state = trained_state(self.model) if state_dict is None else state_dict
        if is_main_process and (state_dict is not None or writes(self.model)):
            save_adapter(self.model, save_directory, state_dict=state)
            save_trained_state(self.model, Path(save_directory) / TRAINER_FILE, state)
