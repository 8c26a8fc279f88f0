"""Where a model of transformers holds a checkpoint's tensors: compared with what transformers itself puts there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from frodctl.adapted import conversion
from frodctl.adapted.conversion import LiveNames, Place
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Location
from frodctl.errors import InvalidInput
from tests.training import renamed

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
    "intermediate_size": 48, "pad_token_id": 0,
}  # fmt: skip


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def held(place: Place, live: dict[str, Tensor]) -> Tensor:
    """What a parameter has of a tensor."""
    found = live[place.parameter]
    found = found if place.expert is None else found[place.expert]
    found = found.mT if place.transposed else found
    return found if place.rows is None else found[slice(*place.rows)]


def stored(name: str, place: Place, tensors: dict[str, Tensor]) -> Tensor:
    """The same in the checkpoint."""
    module, _, index = name.partition("[")
    found = tensors[name] if not index else tensors.get(module, tensors.get(f"{module}.weight"))[int(index[:-1])]
    return found if place.taken is None else found[torch.from_numpy(place.taken)]


def agrees(model: Any, tensors: dict[str, Tensor]) -> dict[str, tuple[Place, ...]]:
    """See that all that is found is there, and that it is all of the model."""
    live = model.state_dict()
    found, refused = conversion.places(model, shapes(tensors), shapes(live))
    assert not refused
    count = 0
    for name, places in found.items():
        for place in places:
            assert torch.equal(held(place, live), stored(name, place, tensors)), (name, place)
            count += held(place, live).numel()
    tied = {"lm_head.weight"} - {place.parameter for places in found.values() for place in places}
    assert count == sum(tensor.numel() for name, tensor in live.items() if name not in tied)
    return found


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "nemotron_h", "qwen2_vl", "qwen3_moe", "phi3"])
def test_every_tensor_is_where_it_is_found(family: str, tmp_path: Path) -> None:
    with renamed.phi3_in_parts():
        tensors = load_file(renamed.save_base(family, tmp_path) / "model.safetensors")
        found = agrees(renamed.live(family, tmp_path), tensors)
    if family == "qwen3_moe":  # gate above up in each expert's matrix
        assert found["model.layers.1.mlp.experts.2.up_proj.weight"] == (
            Place("model.layers.1.mlp.experts.gate_up_proj", (16, 32), 2),
        )


def test_stacked_in_the_file_too(tmp_path: Path) -> None:
    """And there the other way round, as Qwen3-VL's first checkpoints are."""
    text = {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for turned in (False, True):
        if turned:
            name = "model.language_model.layers.0.mlp.experts.down_proj"
            tensors[name] = tensors[name].mT.contiguous()
            save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
        live = model.state_dict()
        found, refused = conversion.places(model, shapes(tensors), shapes(live))
        assert not refused
        for expert in range(3):
            name = f"model.language_model.layers.0.mlp.experts.down_proj[{expert}]"
            (place,) = found[name]
            assert place.transposed == turned
            assert torch.equal(held(place, live), stored(name, place, tensors))


@contextmanager
def registered(*converters: WeightConverter) -> Iterator[None]:
    """Within it Llama's checkpoints are converted so."""
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", list(converters))
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


GATE_UP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "operations", [[Chunk(dim=0)], [Interleave(dim=0), Chunk(dim=0)]], ids=lambda ops: str(ops).strip("[]")
)
def test_rows_that_alternate(operations: list[ConversionOps], tmp_path: Path) -> None:
    with registered(WeightConverter("mlp.both.weight", GATE_UP, operations)):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        found = agrees(transformers.LlamaForCausalLM.from_pretrained(tmp_path), tensors)
    assert len(found["model.layers.0.mlp.both.weight"]) == 2


@pytest.mark.parametrize("operation", [PermuteForRope(), Transpose(0, 1)], ids=repr)
def test_a_matrix_in_another_order(operation: ConversionOps, tmp_path: Path) -> None:
    with registered(WeightConverter("self_attn.wq.weight", "self_attn.q_proj.weight", [operation])):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        agrees(transformers.LlamaForCausalLM.from_pretrained(tmp_path), tensors)


def test_what_does_not_move_rows_is_refused_by_name(tmp_path: Path) -> None:
    by_columns = WeightConverter(["mlp.one.weight", "mlp.two.weight"], "mlp.down_proj.weight", [Concatenate(dim=1)])
    with registered(by_columns):
        config = transformers.LlamaConfig(**SIZES)
        model = transformers.LlamaForCausalLM(config)
        stored = {f"model.layers.0.mlp.{name}.weight": (32, 24) for name in ("one", "two")}
        found, refused = conversion.places(model, stored, shapes(model.state_dict()))
    assert not found
    assert refused == dict.fromkeys(
        stored,
        "transformers makes model.layers.0.mlp.down_proj.weight from it by Concatenate(dim=1), which frodctl does not "
        "express",
    )


class TestNamesOfALiveModel:
    def names(self, folder: Path, **changes: object) -> LiveNames:
        renamed.save_base("vit", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return LiveNames(open_checkpoint(Location(str(folder))))

    def test_found(self, tmp_path: Path) -> None:
        live = ["vit.layers.1.attention.o_proj.weight", "vit.layers.1.mlp.fc2.bias", "nowhere.weight"]
        assert self.names(tmp_path).stored(live) == {
            live[0]: "vit.encoder.layer.1.attention.output.dense.weight",
            live[1]: "vit.encoder.layer.1.output.dense.bias",
        }

    @pytest.mark.parametrize("changes", [{"architectures": ["Mine"]}, {"model_type": "mine"}, {"architectures": None}])
    def test_of_a_model_that_transformers_does_not_have(self, changes: dict[str, object], tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match=r"no model of type .* and class .*; code that comes"):
            self.names(tmp_path, **changes).stored(["vit.layers.1.attention.o_proj.weight"])

    def test_of_a_config_that_transformers_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(
            InvalidInput, match=r"transformers cannot make ViTForImageClassification of its config\.json"
        ):
            self.names(tmp_path, hidden_size="wide").stored(["vit.layers.1.attention.o_proj.weight"])

    def test_of_a_config_with_infinities(self, tmp_path: Path) -> None:
        renamed.save_base("nemotron_h", tmp_path)
        assert "Infinity" in (tmp_path / "config.json").read_text()
        names = LiveNames(open_checkpoint(Location(str(tmp_path))))
        name = "layers.1.mixer.q_proj.weight"
        assert names.stored([f"model.{name}"]) == {f"model.{name}": f"backbone.{name}"}

    def test_without_transformers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = self.names(tmp_path)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(InvalidInput, match=r"pip install 'frodctl\[transformers\]'"):
            names.stored(["vit.layers.1.attention.o_proj.weight"])
