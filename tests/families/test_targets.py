"""``default`` and ``all-linear`` of a checkpoint against PEFT's of the live model, family by family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import FrodConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from frodctl.checkpoint import names
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Location
from frodctl.checkpoint.targets import DEFAULT_TARGETS, Target, select
from tests.families.recipes import FAMILIES, Family
from tests.families.trial import saved_model

EVERY_DAY = ("llama", "gpt2", "bert", "clip", "mixtral", "blip-2")
#: Blocks by number, out_features and in_features: equal for the same layer under whatever name.
Layers = Counter[tuple[tuple[str, ...], int, int]]


def by_name(families: Sequence[Family]) -> Any:
    return pytest.mark.parametrize(
        "family",
        [pytest.param(f, id=f.name, marks=[] if f.name in EVERY_DAY else pytest.mark.long) for f in families],
    )


def live_layers(model: nn.Module, paths: set[str]) -> Layers:
    found: Layers = Counter()
    for path in paths:
        module: Any = model.get_submodule(path)
        n, m = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
        found[numbers(path), m, n] += 1
    return found


def stored_layers(targets: Iterable[Target]) -> Layers:
    return Counter((numbers(target.module), target.m, target.n) for target in targets)


def numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())


#: What PEFT takes because it is a `Linear`: what chooses experts, which frodctl leaves alone.
ROUTER = re.compile(r".*\.(router|router\.layer|shared_expert_gate)")
#: Why PEFT's other layers are left out; the second for a layer before all blocks that is called as tables are.
OUTSIDE = ("outside the repeated blocks", "an embedding")
#: Live layers that are one weight in the checkpoint, where frodctl takes that.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
IN_ONE_WEIGHT = {
    "dinov2, SwiGLU": {"mlp.weights_in": GATE_UP},
    "molmo2_text": {"self_attn.att_proj": QKV, "mlp.ff_proj": GATE_UP},
    "nomic_bert": {"attn.Wqkv": QKV},
    "gte": {"attention.qkv_proj": QKV, "mlp.up_gate_proj": GATE_UP},
}
#: Live layers whose tensor in the checkpoint is not called a weight.
NO_WEIGHT = {"inkling2_text": ("sconv.weight_proj",)}


@by_name(FAMILIES)
def test_all_linear_is_pefts_in_the_blocks_and_the_rest_of_pefts_is_left_out_with_a_reason(
    family: Family, tmp_path: Path
) -> None:
    model = saved_model(family, tmp_path)
    config: Any = FrodConfig(target_modules="all-linear")
    pefts = set(_maybe_include_all_linear_layers(config, model).target_modules)
    selection = select(open_checkpoint(Location(str(tmp_path))), "all-linear")
    ours = [target for target in selection.targets if not re.fullmatch(family.experts, target.module)]
    inside = {path for path in pefts if names.in_block(path) and not ROUTER.fullmatch(path)}
    inside -= ending(inside, *NO_WEIGHT.get(family.name, ()))
    for whole, parts in IN_ONE_WEIGHT.get(family.name, {}).items():
        split, joined = ending(inside, *parts), ending({target.module for target in ours}, whole)
        assert len(split) == len(parts) * len(joined) > 0
        inside -= split
        ours = [target for target in ours if target.module not in joined]
    assert stored_layers(ours) == live_layers(model, inside)
    outside = {path for path in pefts if not names.in_block(path)}
    left = [item for item in selection.left_out if item.reason in OUTSIDE]
    assert live_layers(model, outside) <= Counter((numbers(item.name), *item.shape) for item in left)


def ending(paths: set[str], *endings: str) -> set[str]:
    return {path for path in paths if path.endswith(endings)}


WITH_DEFAULTS = [family for family in FAMILIES if family.name in DEFAULT_TARGETS]
#: Where PEFT finds nothing, as its names are those of the checkpoint: what the live model calls these layers.
RENAMED = {"vit": "q_proj,v_proj"}
#: Types that transformers has no class for: their code comes with their checkpoints.
WITHOUT_A_CLASS = {"btlm", "chatglm", "RefinedWeb", "RefinedWebModel", "rwkv7"}


def test_every_type_in_pefts_table_is_tried() -> None:
    assert {family.name for family in WITH_DEFAULTS} | WITHOUT_A_CLASS == set(DEFAULT_TARGETS)


@by_name(WITH_DEFAULTS)
def test_the_default_is_pefts(family: Family, tmp_path: Path) -> None:
    model: Any = saved_model(family, tmp_path)
    assert model.config.model_type == family.name
    request = DEFAULT_TARGETS[family.name]
    config = FrodConfig(target_modules=request if "*" in request else request.split(","))
    linear = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    pefts = {path for path in linear if check_target_module_exists(config, path)}
    ours = select(open_checkpoint(Location(str(tmp_path))), "default").targets
    if family.name in RENAMED:
        assert not pefts
        renamed = RENAMED[family.name].split(",")
        pefts = {path for path in linear if path.rsplit(".", 1)[-1] in renamed}
    assert stored_layers(ours) == live_layers(model, pefts)
