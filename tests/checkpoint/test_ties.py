"""Ties, against the models that transformers builds from the same files, and by their rules one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

import frodctl
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Checkpoint, Location
from frodctl.checkpoint.ties import same_bytes
from frodctl.errors import InvalidInput
from tests.conftest import llama_layers, save_checkpoint

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 40, "embedding_size": 32, **_IDS,
}  # fmt: skip
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "dff": 48}
_XL = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
_TWO = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 40,
    "max_target_positions": 40, "num_mel_bins": 8, "decoder_start_token_id": 1, **_IDS,
}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (AutoModelForCausalLM, _USUAL) for name in ("llama", "gpt_neox", "bloom", "falcon", "mamba", "opt")},
    **{name: (AutoModelForMaskedLM, _USUAL) for name in ("bert", "roberta", "albert", "electra", "modernbert")},
    **{name: (AutoModelForCausalLM, _GPT) for name in ("gpt2", "openai-gpt", "ctrl")},
    "xlnet": (AutoModelForCausalLM, _XL),
    "t5": (AutoModelForSeq2SeqLM, _T5),
    "bart": (AutoModelForSeq2SeqLM, _TWO),
    "whisper": (AutoModelForSpeechSeq2Seq, _TWO),
}


@pytest.mark.parametrize("tied", [True, False, None], ids=["tied", "untied", "as by default"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_parameters_as_the_live_model(family: str, tied: bool | None, tmp_path: Path) -> None:
    """Saved by transformers, and with everything stored that the live model names."""
    cls, settings = FAMILIES[family]
    flag = {} if tied is None else {"tie_word_embeddings": tied}
    model = cls.from_config(AutoConfig.for_model(family, **settings, **flag))
    model.save_pretrained(tmp_path / "once")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    buffers = {name for name, _ in model.named_buffers()}
    state = {name: t.detach().clone() for name, t in model.state_dict().items() if name not in buffers}
    save_checkpoint(tmp_path / "twice", state, config)
    for folder in ("once", "twice"):
        checkpoint = open_checkpoint(Location(str(tmp_path / folder)))
        stored = [info.parameters for name, info in checkpoint.tensors.items() if name in buffers]
        assert checkpoint.parameters() - sum(stored) == sum(p.numel() for p in model.parameters())


PAIRS = [
    ("model.embed_tokens", "lm_head"),
    ("gpt_neox.embed_in", "embed_out"),
    ("transformer.wte", "lm_head"),
    ("wte", "lm_head"),
    ("transformer.word_embeddings", "lm_head"),
    ("model.tok_embeddings", "output"),
    ("language_model.model.tok_embeddings", "language_model.output"),
    ("backbone.embeddings", "lm_head"),
    ("shared", "lm_head"),
    ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ("transformer.embedding.word_embeddings", "transformer.output_layer"),
]
LM = {"architectures": ["SomeForCausalLM"]}
#: What the config says, whether a head that is stored beside the embedding counts, by whether they are alike.
CONFIGS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "tied": ({"tie_word_embeddings": True}, True, True),
    "untied": ({"tie_word_embeddings": False}, False, False),
    "silent": ({}, True, False),
    "null": ({"tie_word_embeddings": None}, True, False),
    "tied text": ({"text_config": {"tie_word_embeddings": True}}, True, True),
    "deeply": ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True, True),
    "another tower": ({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}, False, False),
    "in two minds": ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True, False),
    "no list": ({"architectures": 5, "text_config": [3]}, True, False),
}


def opened(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(Location(str(save_checkpoint(folder, tensors, config))))


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "different"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("embedding", "head"), PAIRS)
def test_counting_and_merging_go_by_one_rule(
    embedding: str, head: str, config: str, alike: bool, tmp_path: Path
) -> None:
    content, if_alike, if_different = CONFIGS[config]
    weight = torch.arange(24.0).reshape(6, 4)
    tensors = {f"{embedding}.weight": weight, f"{head}.weight": weight.clone() if alike else weight + 1}
    checkpoint = opened(tmp_path, tensors, LM | content)
    tied = if_alike if alike else if_different
    assert checkpoint.parameters() == (24 if tied else 48)
    assert checkpoint.ties.broken_by(list(tensors)) == (sorted(tensors) if tied else [])
    assert checkpoint.ties.broken_by(list(tensors), with_head=False) == []
    checkpoint.ties.require_kept(list(tensors), "here", with_head=False)
    if tied:
        with pytest.raises(InvalidInput, match=f"^here: {sorted(tensors)[0]} is tied .* untie them in the base"):
            checkpoint.ties.require_kept(list(tensors), "here")
    else:
        checkpoint.ties.require_kept(list(tensors), "here")


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (LM, True),
        (LM | {"tie_word_embeddings": True}, True),
        (LM | {"tie_word_embeddings": False}, False),
        ({"architectures": ["SomeModel"]}, False),
        ({}, False),
    ],
)
def test_a_head_that_is_not_stored(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """A language model without a head of its own is tied, unless its config denies it."""
    checkpoint = opened(tmp_path, {"model.embed_tokens.weight": torch.ones(6, 4)}, config)
    assert checkpoint.parameters() == 24
    changed = ["model.embed_tokens.weight"]
    assert checkpoint.ties.broken_by(changed) == (changed if tied else [])


def test_a_head_of_another_shape_is_not_the_embedding(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(6, 4), "lm_head.weight": torch.ones(8, 4)}
    checkpoint = opened(tmp_path, tensors, {"tie_word_embeddings": True})
    assert checkpoint.parameters() == 24 + 32
    assert checkpoint.ties.broken_by(["lm_head.weight"]) == []


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("shared", [True, False], ids=["one storage", "two"])
def test_a_pickled_head(zipped: bool, shared: bool, tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight if shared else weight.clone()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(Location(str(tmp_path)))
    assert checkpoint.parameters() == 24
    assert checkpoint.ties.broken_by(state) == sorted(state)


def test_a_budget_counts_a_tied_head_once(tmp_path: Path) -> None:
    """The same share of the same model, whether its tied head is stored or not."""
    layers = llama_layers(2)
    embedding = torch.randn(200, 32)
    plans = []
    for name, more in (("once", {}), ("twice", {"embed_out.weight": embedding.clone()})):
        folder = save_checkpoint(tmp_path / name, {"gpt_neox.embed_in.weight": embedding, **layers, **more}, LM)
        plans.append(
            frodctl.decompose(str(folder), tmp_path / f"{name}.safetensors", budget=0.05, target_modules="all-linear")
        )
    assert plans[0].plan.trainable_parameters == plans[1].plan.trainable_parameters


def test_headers_alone_tell_of_no_equal_bytes(tmp_path: Path) -> None:
    save_file({"a.wte.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(Location(str(tmp_path)))
    remote = Checkpoint("org/name", "0" * 40, None, {}, checkpoint.tensors)
    assert (checkpoint.parameters(), remote.parameters()) == (4, 8)


@pytest.mark.parametrize("theirs", ["safetensors", "bin", "old"])
@pytest.mark.parametrize("mine", ["safetensors", "bin", "old"])
def test_bytes_are_compared_element_by_element_whatever_the_file(mine: str, theirs: str, tmp_path: Path) -> None:
    A = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    A[2, 3] = float("nan")
    other = {"equal": A, "columns first": A.T.contiguous().T, "sign of zero": A.clone(), "last": A.clone()}
    state = {name: tensor.clone() for name, tensor in other.items()}
    state["sign of zero"][0, 0], other["sign of zero"][0, 0] = 0.0, -0.0
    other["last"][5, 3] += 1

    def saved(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> Checkpoint:
        folder.mkdir()
        if kind == "safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        else:
            file = folder / "pytorch_model.bin"
            torch.save(tensors, file, _use_new_zipfile_serialization=kind == "bin")
        return open_checkpoint(Location(str(folder)))

    one, two = saved(tmp_path / "a", mine, state), saved(tmp_path / "b", theirs, other)
    assert one.source is not None
    assert two.source is not None
    found = {name: same_bytes(one.source, one.tensors[name], two.source, two.tensors[name]) for name in state}
    assert found == {"equal": True, "columns first": True, "sign of zero": False, "last": False}
