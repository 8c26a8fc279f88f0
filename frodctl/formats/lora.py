"""PEFT's LoRA adapter, and what others who read it take of it.

``adapter_config.json`` and ``adapter_model.safetensors`` with the tensors::

    base_model.model.{module}.lora_A.weight    (r, in_features)
    base_model.model.{module}.lora_B.weight    (out_features, r)
    base_model.model.{tensor}                  trained modules, trained biases

W' = W + α/r B A, and all is in nn.Linear's orientation, whichever the base stores. α = r here. What vLLM and llama.cpp
take is in `SERVED_RANKS`, `served_rank` and `refusals`, as vLLM 0.14 and llama.cpp's convert_lora_to_gguf.py have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frodctl.checkpoint import names
from frodctl.checkpoint.records import ADAPTER_FILES

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES[:2]
#: What vLLM takes as max_lora_rank, which no adapter's rank may exceed.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def factor_keys(module: str) -> tuple[str, str]:
    """The tensors with A and B of the module at this path in the live model."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def served_rank(rank: int) -> int | None:
    """The least max_lora_rank with which vLLM serves an adapter of this rank; None where there is none."""
    return next((limit for limit in SERVED_RANKS if limit >= rank), None)


def refusals(rank: int, *, several_ranks: bool, others: Sequence[str]) -> list[str]:
    """Who will not read an adapter, or not rightly, and why.

    Parameters
    ----------
    rank : int
        The largest.
    several_ranks : bool
        Whether layers have ranks of their own.
    others : sequence of str
        Tensors that are no factors: trained modules and biases.
    """
    found = []
    if served_rank(rank) is None:
        found.append(f"vLLM serves no LoRA of rank {rank}: {SERVED_RANKS[-1]} is the most that its max_lora_rank takes")
    if several_ranks:
        found.append("vLLM and llama.cpp know of one rank for all layers; they would scale these wrongly")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        found.append(
            f"{others[0]}{more} were trained as a whole and are kept, which PEFT reads, and vLLM and llama.cpp refuse"
        )
    return found


@dataclass(frozen=True)
class Setting:
    """What an adapter's config says beside the ranks, by PEFT's names."""

    base: str  #: the model
    revision: str | None = None  #: its commit
    task: str | None = None
    auto_mapping: object = None  #: the class of a model without a task type
    fan_in_fan_out: bool = False  #: whether the layers are transformers' Conv1D
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"


def config(ranks: Mapping[str, int], setting: Setting) -> dict[str, object]:
    """The adapter's config.

    Parameters
    ----------
    ranks : mapping of str to int
        Of each module, by its path in the live model. Where they differ, r is the most frequent and PEFT's patterns
        have the rest.
    setting : Setting
    """
    usual = max(ranks.values(), key=lambda rank: (list(ranks.values()).count(rank), rank))
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "alpha_pattern": others,
        "auto_mapping": setting.auto_mapping,
        "base_model_name_or_path": setting.base,
        "bias": setting.bias,
        "fan_in_fan_out": setting.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": list(setting.modules_to_save) or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": others,
        "revision": setting.revision,
        "target_modules": sorted(ranks, key=names.natural_key),
        "task_type": setting.task,
        "use_dora": False,
        "use_rslora": False,
    }
