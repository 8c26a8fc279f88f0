"""Layers that read the same activations, by name; the names against what models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    OPTConfig,
    OPTModel,
    T5Config,
    T5Model,
)

from frodctl.checkpoint import names, siblings

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def models() -> dict[str, Any]:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return {
        "llama": lambda: LlamaModel(LlamaConfig(**SMALL, intermediate_size=48)),
        "bert": lambda: BertLMHeadModel(
            BertConfig(**SMALL, intermediate_size=48, is_decoder=True, add_cross_attention=True)
        ),
        "opt": lambda: OPTModel(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
        "t5": lambda: T5Model(
            T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=50, is_gated_act=True)
        ),
        "bart": lambda: BartModel(
            BartConfig(
                d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50,
                **heads,
            )
        ),
        "mamba": lambda: MambaModel(MambaConfig(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=2)),
    }  # fmt: skip


#: Names of layers with one input in a block of each; a model with two towers has the same in both.
EXPECTED = {
    "llama": {"q_proj_k_proj_v_proj", "gate_proj_up_proj"},
    "bert": {"query_key_value", "key_value"},
    "opt": {"q_proj_k_proj_v_proj"},
    "t5": {"q_k_v", "k_v", "wi_0_wi_1"},
    "bart": {"q_proj_k_proj_v_proj", "k_proj_v_proj"},
    "mamba": set(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_that_are_joined_are_given_one_tensor(name: str) -> None:
    torch.manual_seed(0)
    model = models()[name]()
    linear = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and names.in_block(path)}
    joined = siblings.joined({path: module.in_features for path, module in linear.items()})
    assert {path.rpartition(".")[2] for path in joined.values()} == EXPECTED[name]
    given: dict[str, torch.Tensor] = {}
    for path, module in linear.items():
        module.register_forward_pre_hook(lambda _, inputs, path=path: given.update({path: inputs[0]}))
    ids = torch.arange(8)[None]
    more = {"decoder_input_ids": ids} if name in ("t5", "bart") else {}
    more |= {"encoder_hidden_states": torch.randn(1, 5, 32)} if name == "bert" else {}
    model(input_ids=ids, **more)
    groups: dict[str, list[torch.Tensor]] = {}
    for path, group in joined.items():
        groups.setdefault(group, []).append(given[path])
    for tensors in groups.values():
        assert len(tensors) > 1
        assert len({id(tensor) for tensor in tensors}) == 1


@pytest.mark.parametrize(
    "modules",
    [
        ["blocks.0.attention.key", "blocks.0.attention.value", "blocks.0.attention.receptance"],  # RWKV
        ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"],  # of an unknown model: R might be beside them
        ["decoder.layers.0.encoder_attn.q_proj", "decoder.layers.0.encoder_attn.k_proj"],
        ["layers.0.mlp.w1", "layers.0.mlp.w3"],  # which may follow each other
        ["layers.0.attn.qkv_proj", "layers.0.attn.o_proj"],
        ["q_proj"],
    ],
)
def test_others_are_not(modules: list[str]) -> None:
    assert siblings.joined(dict.fromkeys(modules, 8)) == {}


def test_experts_one_by_one() -> None:
    modules = [f"layers.{i}.moe.experts.{e}.{w}" for i in range(2) for e in range(3) for w in ("w1", "w2", "w3")]
    joined = siblings.joined({module: 12 if module.endswith("w2") else 8 for module in modules})
    assert set(joined) == {module for module in modules if not module.endswith("w2")}
    assert joined["layers.1.moe.experts.2.w3"] == "layers.1.moe.experts.2.w1_w3"


def test_layers_of_other_widths_are_left_alone() -> None:
    widths = {"layers.0.attn.query": 8, "layers.0.attn.key": 12, "layers.0.attn.value": 8}
    assert set(siblings.joined(widths).values()) == {"layers.0.attn.query_value"}


LASTS = st.sampled_from("q_proj k_proj v_proj o_proj query key value gate_proj up_proj w1 w3 dense".split())
PATHS = st.builds(
    "{}.{}.{}.{}".format,
    st.sampled_from(["encoder.layers", "decoder.layers", "h"]),
    st.integers(0, 2),
    st.sampled_from(["self_attn", "encoder_attn", "mlp", "experts.0", "crossattention.self"]),
    LASTS,
)


@given(st.dictionaries(PATHS, st.sampled_from([8, 12]), min_size=1, max_size=12))
def test_a_shared_category_holds_one_width_and_one_place(widths: dict[str, int]) -> None:
    joined = siblings.joined(widths)
    labels, collisions = names.categories(widths, joined)
    plain, of_peft = names.categories({m: w for m, w in widths.items() if m not in joined})
    assert {module: labels[module] for module in plain} == plain
    assert collisions == of_peft
    places: dict[str, set[tuple[str, int]]] = {}
    for module in joined:
        places.setdefault(labels[module], set()).add((names.role(module).rpartition(".")[0], widths[module]))
    assert all(len(found) == 1 for found in places.values())
    assert not set(places) & set(plain.values())
