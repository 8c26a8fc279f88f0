"""What a model's surroundings (transformers, its Trainer, DistributedDataParallel) need to know of the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frodctl.training.layer import Basis, Pattern, Update

#: The name under which transformers' Trainer looks for weights as it resumes.
TRAINER_FILE = "model.safetensors"
_QUANTIZED_WITH_ADAPTER = "_hf_peft_config_loaded"


def prepare(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` save the adapter, and the Trainer take a quantized model for trainable."""
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)
    if getattr(model, "is_quantized", False):
        setattr(model, _QUANTIZED_WITH_ADAPTER, True)


def restore(model: nn.Module) -> None:
    """Undo `prepare`."""
    for name in ("save_pretrained", _QUANTIZED_WITH_ADAPTER, "_ddp_params_and_buffers_to_ignore"):
        model.__dict__.pop(name, None)


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
    exactly as they are: that file transformers' Trainer reads as it resumes. The base model's weights are in neither.
    Where parameters are sharded and no gathered ``state_dict`` is given, all processes must call it, as `save_adapter`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        from frodctl.training.saving import save_adapter, save_trained_state, trained_state, writes

        state = trained_state(self.model) if state_dict is None else state_dict
        if is_main_process and (state_dict is not None or writes(self.model)):
            save_adapter(self.model, save_directory, state_dict=state)
            save_trained_state(self.model, Path(save_directory) / TRAINER_FILE, state)
