"""What is decomposed, against live transformers models: no layer dropped, none taken for what it is not."""

from __future__ import annotations

import functools
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.constants import TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn
from transformers.pytorch_utils import Conv1D

from frodctl.checkpoint import names
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, Location, TensorInfo
from frodctl.checkpoint.targets import DEFAULT_TARGETS, Selection, Target, select
from frodctl.errors import UsageError

H, FFN = 32, 48
SMALL: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2}
MOE = {**GQA, "num_experts_per_tok": 2}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_positions": 32, "n_embd": H, "n_layer": 2, "n_head": 4}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": H, "d_kv": 8, "d_ff": FFN, "num_layers": 2, "num_heads": 4}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": H, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": FFN, "decoder_ffn_dim": 64,
}  # fmt: skip
TEXT = {**SMALL, "max_position_embeddings": 16}
IMAGE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "llama, one layer": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, "num_hidden_layers": 1})),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, head_dim=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GQA, head_dim=8)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "bert, cross-attention": lambda: hf.BertLMHeadModel(
        hf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    ),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL)),
    "deberta-v2": lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**DEBERTA)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**SEQ2SEQ, **SPECIAL, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
    ),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=24)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, cross-attention": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
    "gpt2 without head": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT2)),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**GPT2)),
    "image to text": lambda: hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**{**IMAGE, "hidden_size": H}), hf.GPT2Config(**GPT2, add_cross_attention=True)
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=H, n_layer=2, n_head=4)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=64, hidden_size=H, state_size=4, num_hidden_layers=2)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE, num_local_experts=3)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**MOE, num_experts=3, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**MOE, num_experts=3, moe_intermediate_size=24, head_dim=8)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**MOE, num_local_experts=3, head_dim=8)),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**GQA, head_dim=8, num_local_experts=3, interleave_moe_layer_step=1)
    ),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**MOE, num_local_experts=3)),
}  # fmt: skip

ROUTERS = ("gate", "router", "shared_expert_gate", "layer")
#: Per block, what the experts are beside the live model's Linear modules: (out_features, in_features), how often.
EXPERTS: dict[str, dict[tuple[int, int], int]] = {
    "mixtral": {(FFN, H): 6, (H, FFN): 3},
    "qwen2_moe": {(24, H): 6, (H, 24): 3},
    "qwen3_moe": {(24, H): 6, (H, 24): 3},
    "gpt_oss": {(2 * FFN, H): 3, (H, FFN): 3},
    "llama4": {(2 * FFN, H): 3, (H, FFN): 3},
    "granitemoe": {(2 * FFN, H): 3, (H, FFN): 3},
}


@functools.cache
def saved(name: str, root: Path) -> tuple[nn.Module, Checkpoint]:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    model.save_pretrained(root / name)
    return model, open_checkpoint(Location(str(root / name)))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Checkpoint]]:
    return functools.partial(saved, root=tmp_path_factory.mktemp("zoo"))


def numbers(path: str) -> tuple[str, ...]:
    """Which block a module is in: names may differ between the live model and its checkpoint, these do not."""
    return tuple(part for part in path.split(".") if part.isdigit())


def live_linears(model: nn.Module) -> Counter[Any]:
    """Every linear layer inside the blocks: (block, out_features, in_features, stored transposed)."""
    found: Counter[Any] = Counter()
    for path, module in model.named_modules():
        if not any(part.isdigit() for part in path.split(".")[:-1]) or path.rsplit(".", 1)[-1] in ROUTERS:
            continue
        if isinstance(module, nn.Linear):
            found[numbers(path), module.out_features, module.in_features, False] += 1
        elif isinstance(module, Conv1D):
            found[numbers(path), module.weight.shape[1], module.weight.shape[0], True] += 1
    return found


Zoo = Callable[[str], tuple[nn.Module, Checkpoint]]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in EXPERTS])
def test_all_linear_finds_the_linear_layers_of_the_live_model(zoo: Zoo, name: str) -> None:
    model, checkpoint = zoo(name)
    targets = select(checkpoint, "all-linear").targets
    assert Counter((numbers(t.module), t.m, t.n, t.transposed) for t in targets) == live_linears(model)


@pytest.mark.parametrize("name", EXPERTS)
def test_all_linear_finds_each_expert_and_the_layers_beside_them(zoo: Zoo, name: str) -> None:
    model, checkpoint = zoo(name)
    expected: Counter[Any] = Counter()
    for (block, m, n, _), count in live_linears(model).items():
        expected[block[0], m, n] += count
    for (m, n), count in EXPERTS[name].items():
        for block in ("0", "1"):
            expected[block, m, n] += count
    targets = select(checkpoint, "all-linear").targets
    assert Counter((numbers(t.module)[0], t.m, t.n) for t in targets) == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_in_or_left_out_with_a_reason_and_none_twice(zoo: Zoo, name: str) -> None:
    _, checkpoint = zoo(name)
    refuse_quantized(checkpoint)
    for request in ("all-linear", ".*"):
        selection = select(checkpoint, request)
        inside, outside = {t.tensor.name for t in selection.targets}, {item.name for item in selection.left_out}
        assert not inside & outside
        assert inside | outside == {t.name for t in checkpoint.tensors.values() if len(t.shape) > 1}
        assert len({t.module for t in selection.targets}) == len(selection.targets)
        assert all(item.reason for item in selection.left_out)


@pytest.mark.parametrize("name", MODELS)
def test_categories_hold_one_width_and_one_tower(zoo: Zoo, name: str) -> None:
    targets = select(zoo(name)[1], "all-linear").targets
    labels, _ = names.categories({t.module: t.n for t in targets})
    for label in set(labels.values()):
        members = [t for t in targets if labels[t.module] == label]
        assert len({t.n for t in members}) == 1
        assert len({t.transposed for t in members}) == 1
        for tower in ("encoder", "decoder", "vision_model", "crossattention"):
            assert len({tower in t.module.split(".") for t in members}) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_models_size_is_that_of_the_live_model(zoo: Zoo, name: str) -> None:
    model, checkpoint = zoo(name)
    live = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    assert live <= checkpoint.parameters() <= live + buffers


REASONS = {
    ("llama", "model.embed_tokens.weight"): "an embedding",
    ("llama", "lm_head.weight"): "outside the repeated blocks",
    ("bert", "bert.embeddings.word_embeddings.weight"): "an embedding",
    ("bert", "cls.predictions.transform.dense.weight"): "outside the repeated blocks",
    ("t5", "shared.weight"): "an embedding",
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"): "an embedding",
    ("clip", "visual_projection.weight"): "outside the repeated blocks",
    ("clip", "vision_model.embeddings.patch_embedding.weight"): "not a matrix",
    ("gpt2", "transformer.wpe.weight"): "an embedding",
    ("mamba", "backbone.layers.0.mixer.A_log"): "not the weight of a linear layer",
    ("mamba", "backbone.layers.0.mixer.conv1d.weight"): "not a matrix",
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"): "a router",
    ("qwen3_moe", "model.layers.1.mlp.gate.weight"): "a router",
    ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"): "a router",
    ("gpt_oss", "model.layers.0.mlp.router.weight"): "a router",
    ("swin", "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"): "not the weight of a ",
}


@pytest.mark.parametrize(("name", "tensor"), REASONS)
def test_the_reason_for_leaving_a_matrix_out(zoo: Zoo, name: str, tensor: str) -> None:
    reasons = {item.name: item.reason for item in select(zoo(name)[1], "all-linear").left_out}
    assert reasons[tensor].startswith(REASONS[name, tensor])


def test_conv1d_is_transposed_in_gpt2_and_not_in_gpt_bigcode(zoo: Zoo) -> None:
    for name, transposed in (("gpt2", True), ("gpt_bigcode", False)):
        targets = [t for t in select(zoo(name)[1], "default").targets if t.module.endswith("c_attn")]
        assert len(targets) == 2
        assert all((t.transposed, t.n) == (transposed, H) for t in targets)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "granitemoe"])
@torch.no_grad()
def test_rows_of_an_experts_matrix_are_outputs_of_the_live_block(name: str, tmp_path: Path) -> None:
    """Where experts are square only the forward pass tells: keep output 5 of each, and the block has no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOE, "intermediate_size", H)
        patch.setitem(GQA, "intermediate_size", H)
        model: Any = MODELS[name]()
    model.save_pretrained(tmp_path)
    live = dict(model.named_parameters())
    for key, parameter in live.items():
        if "bias" in key or "shared_expert" in key:
            parameter.zero_()
    targets = select(open_checkpoint(Location(str(tmp_path))), r".*(down_proj|output_linear)", layers="0").targets
    targets = tuple(target for target in targets if target.index is not None)
    assert len(targets) == 3
    for target in targets:
        fused = live.get(target.tensor.name, live.get("model.layers.0.block_sparse_moe.experts.down_proj"))
        stored = fused[target.index]
        weight = stored.T if target.transposed else stored
        weight[torch.arange(H) != 5] = 0
    block = model.model.layers[0]
    block = next(getattr(block, part) for part in ("mlp", "feed_forward", "block_sparse_moe") if hasattr(block, part))
    output = block(torch.randn(1, 6, H))
    output = output[0] if isinstance(output, tuple) else output
    assert output.reshape(6, H).abs().sum(0).nonzero().flatten().tolist() == [5]


def experts(model_type: str, **shapes: tuple[int, ...]) -> Checkpoint:
    tensors = {
        name: TensorInfo(name, "F32", shape, "x", 0)
        for name, shape in ((f"model.layers.0.mlp.experts.{last}", shape) for last, shape in shapes.items())
    }
    return Checkpoint("x", None, None, {"model_type": model_type, "hidden_size": H}, tensors)


@pytest.mark.parametrize(
    ("gate_up", "down", "transposed"),
    [
        ((2 * FFN, H), (H, FFN), False),
        ((H, 2 * FFN), (FFN, H), True),
        ((2 * H, H), (H, H), False),  # FFN = hidden size: the other tensor tells
        ((H, 2 * H), (H, H), True),
        ((H, H), (H, H // 2), False),  # 2·FFN = hidden size
        ((H, H), (H // 2, H), True),
    ],
)
def test_the_experts_orientation_follows_from_the_hidden_size(
    gate_up: tuple[int, int], down: tuple[int, int], transposed: bool
) -> None:
    checkpoint = experts("qwen3_vl_moe_text", gate_up_proj=(4, *gate_up), down_proj=(4, *down))
    targets = select(checkpoint, "all-linear").targets
    assert len(targets) == 8
    assert {t.transposed for t in targets} == {transposed}
    assert [t.index for t in targets] == [0, 1, 2, 3] * 2
    assert targets[5].module == "model.layers.0.mlp.experts.gate_up_proj[1]"


def test_experts_of_unknown_orientation_are_left_out_with_a_reason() -> None:
    checkpoint = experts("new", up_proj=(4, 20, 24), w1=(4, FFN, H))
    selection = select(checkpoint, "all-linear")
    assert len(selection.targets) == 4
    assert [(item.name.rsplit(".", 1)[-1], item.reason) for item in selection.left_out] == [
        ("up_proj", "experts of unknown orientation")
    ]


def checkpoint_of(*paths: str, config: dict[str, Any] | None = None, dtype: str = "F32") -> Checkpoint:
    tensors = {path: TensorInfo(path, dtype, (8, 8), "x", i) for i, path in enumerate(paths)}
    return Checkpoint("x", None, None, config or {}, tensors)


LLAMA = checkpoint_of(
    *(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "qkv"),
    "lm_head.weight",
    config={"model_type": "llama"},
)


def modules(selection: Selection) -> list[str]:
    return [target.module.removeprefix("model.layers.").replace(".self_attn.", ".") for target in selection.targets]


def test_a_head_in_a_numbered_block_is_no_layer() -> None:
    """DeepSeek-V3, GLM-4.5: the block for multi-token prediction brings an embedding and a head of its own."""
    checkpoint = checkpoint_of(
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)),
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.shared_head.head.weight",
    )
    assert {t.module for t in select(checkpoint, "all-linear").targets} == {
        *(f"model.layers.{i}.mlp.up_proj" for i in range(3)),
        "model.layers.2.eh_proj",
    }


def test_what_maps_embeddings_is_a_layer_and_no_embedding() -> None:
    """ALBERT's stands before the blocks, where it is taken if it is asked for."""
    mapping = "albert.encoder.embedding_hidden_mapping_in"
    checkpoint = checkpoint_of("albert.embeddings.word_embeddings.weight", f"{mapping}.weight", "h.0.q.weight")
    assert [target.module for target in select(checkpoint, "embedding_hidden_mapping_in").targets] == [mapping]
    reasons = {item.name: item.reason for item in select(checkpoint, "all-linear").left_out}
    assert reasons == {
        "albert.embeddings.word_embeddings.weight": "an embedding",
        f"{mapping}.weight": "outside the repeated blocks",
    }


def test_targets_come_in_natural_order() -> None:
    assert modules(select(LLAMA, "q_proj")) == [f"{i}.q_proj" for i in range(12)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0", {0}), ("0-2", {0, 1, 2}), ("10-11", {10, 11}), ("0,2,8-9", {0, 2, 8, 9}), (" 1 , 3 ", {1, 3})],
)
def test_layers(layers: str, expected: set[int]) -> None:
    selection = select(LLAMA, "q_proj", layers=layers)
    assert {target.layer for target in selection.targets} == expected
    assert {item.reason for item in selection.left_out if "q_proj" in item.name} == {"in another block"}


@pytest.mark.parametrize("layers", ["x", "1-", "-1", "1,,2", "1.5", "5-3", "3-0,99", "9" * 5000, "٣"])
def test_layers_that_make_no_sense_are_a_usage_error(layers: str) -> None:
    with pytest.raises(UsageError, match="`layers`"):
        select(LLAMA, "q_proj", layers=layers)


@pytest.mark.parametrize(
    ("layers", "missing"),
    [("12", "12"), ("9-12", "12"), ("0-99", "12-99"), ("0,99", "99"), ("0-999999999999", "12-999999999999"),
     ("20-21,3,30", "20-21, 30")],
)  # fmt: skip
def test_blocks_that_do_not_exist_are_named(layers: str, missing: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as caught:
            select(LLAMA, "q_proj", layers=layers)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert str(caught.value) == f"`layers` {layers}: there is no block {missing}; the model has blocks 0-11"


@given(
    blocks=st.sets(st.integers(0, 30), min_size=1),
    wanted=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_any_blocks_are_there_and_taken_or_refused_by_number(blocks: set[int], wanted: list[tuple[int, int]]) -> None:
    checkpoint = checkpoint_of(*(f"layers.{block}.q_proj.weight" for block in blocks))
    text = ",".join(f"{first}-{first + more}" for first, more in wanted)
    asked = {number for first, more in wanted for number in range(first, first + more + 1)}
    if asked <= blocks:
        assert {target.layer for target in select(checkpoint, "q_proj", layers=text).targets} == asked
        return
    with pytest.raises(UsageError) as caught:
        select(checkpoint, "q_proj", layers=text)
    missing, there = str(caught.value).split("there is no block ")[1].split("; the model has blocks ")
    for said, meant in ((missing, asked - blocks), (there, blocks)):
        spans = [part.split("-") for part in said.split(", ") if part != "…"]
        numbers = {number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)}
        assert numbers == meant or ("…" in said and numbers < meant)


def test_blocks_are_those_of_the_whole_model() -> None:
    """A block without a linear layer, and one that has other layers, are there; a list of layers is no block."""
    checkpoint = checkpoint_of("h.0.q.weight", "h.1.conv1d.bias", "h.2.k.weight", "classifier.9.weight")
    assert [target.module for target in select(checkpoint, "q", layers="0-2").targets] == ["h.0.q"]
    with pytest.raises(UsageError, match=r"no block 9; the model has blocks 0-2"):
        select(checkpoint, "q", layers="9")
    with pytest.raises(UsageError, match=r"`layers` 1-2: `target_modules` q is not in there, but in blocks 0$"):
        select(checkpoint, "q", layers="1-2")
    with pytest.raises(UsageError, match="the model has no numbered blocks"):
        select(checkpoint_of("classifier.9.weight"), "9", layers="0")


@pytest.mark.parametrize("request_", ["q_proj,v_proj", "q_proj, v_proj", r".*\.(q|v)_proj", r".*_proj(?<!k_proj)"])
def test_names_and_regular_expressions(request_: str) -> None:
    assert {m.split(".")[1] for m in modules(select(LLAMA, request_))} == {"q_proj", "v_proj"}


def test_a_name_may_be_the_end_of_a_path_and_a_regex_is_for_all_of_it() -> None:
    assert modules(select(LLAMA, "3.self_attn.q_proj")) == ["3.q_proj"]
    assert modules(select(LLAMA, r"model\.layers\.1\.self_attn\.q_.*")) == ["1.q_proj"]
    with pytest.raises(UsageError):
        select(LLAMA, "proj")  # no part of a name
    with pytest.raises(UsageError):
        select(LLAMA, r"q_proj|nothing")


def test_excluded_modules() -> None:
    selection = select(LLAMA, "all-linear", exclude_modules="k_proj,v_proj")
    assert modules(selection) == [f"{i}.q_proj" for i in range(12)]
    assert Counter(item.reason for item in selection.left_out)["excluded"] == 24
    assert modules(select(LLAMA, "q_proj", exclude_modules=r".*\.(?!3\.)\d+\.self_attn.*")) == ["3.q_proj"]
    assert len(select(LLAMA, "all-linear", exclude_modules="lm_head").targets) == 36
    with pytest.raises(UsageError, match="`exclude_modules` q_proj: leaves nothing of `target_modules` q_proj"):
        select(LLAMA, "q_proj", exclude_modules="q_proj")


@pytest.mark.parametrize("request_", ["qproj", "q_proj,qproj", r".*\.qproj", "default"])
def test_what_matches_nothing_lists_the_names_there_are(request_: str) -> None:
    checkpoint = LLAMA if request_ != "default" else checkpoint_of("h.0.attn.foo.weight", config={"model_type": "bert"})
    with pytest.raises(
        UsageError, match="k_proj, lm_head, q_proj, v_proj" if request_ != "default" else "foo"
    ) as caught:
        select(checkpoint, request_)
    assert caught.value.exit_code == 2
    assert "`target_modules`" in str(caught.value)
    assert request_ != "default" or "default (query,value): matches nothing" in str(caught.value)


@pytest.mark.parametrize("parameter", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("q_proj,v_prj", "nothing is called v_prj (did you mean v_proj?)"),
        ("qproj", "nothing is called qproj (did you mean q_proj?)"),
        ("q_prj, v_proj ,k_poj", "nothing is called q_prj, k_poj (did you mean q_proj, k_proj?)"),
        ("self_attn.q_prj", "(did you mean self_attn.q_proj?)"),
        ("wholly_different", "nothing is called wholly_different; linear layers here"),
        ("self_attn", "nothing is called self_attn"),
        ("q_proj|v_proj", "a regular expression must match the whole path, as '.*\\.(q_proj|v_proj)' does"),
        ("[qv]_pro", "must match the whole path, as '.*([qv]_pro).*' does"),
        ("(?i)Q_PROJ", "must match the whole path; linear layers here"),
        ("nothing|at_all", "must match the whole path; linear layers here"),
        ("q_proj v_proj", "matches nothing; names are separated by commas: q_proj,v_proj; linear layers here"),
        ("q_proj, k_proj  self_attn.v_proj", "separated by commas: q_proj,k_proj,self_attn.v_proj; linear"),
        ("q_proj v.*", "must match the whole path; linear layers here"),
    ],
)
def test_what_is_nearly_right_is_put_right(parameter: str, request_: str, said: str) -> None:
    chosen = {"target_modules": "all-linear", parameter: request_}
    with pytest.raises(UsageError) as caught:
        select(LLAMA, **chosen)
    assert str(caught.value).startswith(f"`{parameter}` {request_}: ")
    assert said in str(caught.value)
    for suggested in re.findall(r"did you mean (.*)\?\)|as '(.*)' does|by commas: (\S*);", str(caught.value)):
        assert select(LLAMA, "".join(suggested)).targets


@pytest.mark.parametrize("request_", ["(", "*", "[a", "a{99999999999}"])
def test_what_is_no_regular_expression_is_a_usage_error(request_: str) -> None:
    with pytest.raises(UsageError, match="regular expression"):
        select(LLAMA, request_)
    with pytest.raises(UsageError, match="regular expression"):
        select(LLAMA, "q_proj", exclude_modules=request_)


def test_the_defaults_are_pefts() -> None:
    peft = {key: value if isinstance(value, str) else ",".join(value) for key, value in PEFT_DEFAULTS.items()}
    assert peft == DEFAULT_TARGETS


def test_default_for_a_known_type() -> None:
    assert {m.split(".")[1] for m in modules(select(LLAMA))} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "new"}, "'new'"),
        ({}, "no config"),
        ({"model_type": []}, ""),
        ({"architecture": "vit_base_patch16_224"}, "config.json names no model_type"),  # timm's
    ],
)
def test_default_for_an_unknown_type_asks_for_targets(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"{why}.*`target_modules`: all-linear"):
        select(checkpoint_of("layers.0.q_proj.weight", config=config))


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "C64"])
def test_only_floating_point_weights_are_taken(dtype: str) -> None:
    assert dtype not in FLOAT_DTYPES
    with pytest.raises(UsageError, match="no linear layers"):
        select(checkpoint_of("layers.0.q_proj.weight", dtype=dtype), "all-linear")


def test_m_and_n_are_those_of_the_layer() -> None:
    info = TensorInfo("w", "F32", (2, 3), "x", 0)
    assert (Target("w", info, None, (2, 3), False).m, Target("w", info, None, (2, 3), False).n) == (2, 3)
    assert (Target("w", info, None, (2, 3), True).m, Target("w", info, None, (2, 3), True).n) == (3, 2)
