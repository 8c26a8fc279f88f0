"""Finding a checkpoint on disk and reading its headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import frodctl
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import WEIGHT_FILES, Location, choose_weights
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from tests.conftest import LLAMA_CONFIG, llama_layers, save_checkpoint

A, B = torch.ones(2, 3), torch.ones(4, 3)


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


GOOD_MAP = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_a_folder(tmp_path: Path) -> None:
    tensors = llama_layers(2)
    checkpoint = open_checkpoint(Location(str(save_checkpoint(tmp_path, tensors, LLAMA_CONFIG))))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert checkpoint.config == LLAMA_CONFIG
    assert checkpoint.parameters() == sum(tensor.numel() for tensor in tensors.values())
    assert (checkpoint.root, checkpoint.revision) == (tmp_path, None)


def test_a_subfolder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "text_encoder", {"a": A})
    assert open_checkpoint(Location(str(tmp_path), subfolder="text_encoder")).tensors.keys() == {"a"}
    with pytest.raises(FrodctlError, match="unet"):
        open_checkpoint(Location(str(tmp_path), subfolder="unet"))


def test_without_weights_the_sub_folders_that_have_some_are_named(tmp_path: Path) -> None:
    for folder in ("unet", "text_encoder", "vae"):
        save_checkpoint(tmp_path / folder, {"a": A})
    (tmp_path / "vae" / "model.safetensors").rename(tmp_path / "vae" / WEIGHT_FILES[3])
    for other in ("scheduler", "tokenizer"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="no weights here, but in text_encoder, unet, vae: choose one with `sub"):
        open_checkpoint(Location(str(tmp_path)))
    with pytest.raises(InvalidInput, match="no weights here, neither"):
        open_checkpoint(Location(str(tmp_path), subfolder="scheduler"))


def test_a_single_file_with_and_without_a_config(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path, {"a": A}) / "model.safetensors"
    assert open_checkpoint(Location(str(file))).config == {}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(Location(str(file))).config == {"model_type": "llama"}


def test_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_checkpoint(tmp_path / "here", {"a": A}))
    assert open_checkpoint(Location("model.safetensors")).tensors.keys() == {"a"}
    assert Location("model.safetensors").short_name() == "model"
    assert Location(".").short_name() == "here"


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Location(str(sharded(tmp_path, GOOD_MAP))))
    assert {name: info.file for name, info in checkpoint.tensors.items()} == GOOD_MAP


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "", ".", "..", None, 3]
)
def test_an_index_that_names_an_outside_file(tmp_path: Path, file: object) -> None:
    save_file({"b": B}, tmp_path / "x.safetensors")
    folder = sharded(tmp_path / "model", {"a": GOOD_MAP["a"], "b": file})  # type: ignore[dict-item]
    with pytest.raises(InvalidInput, match=r"tensor b|\.\."):
        open_checkpoint(Location(str(folder)))


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)
    (tmp_path / GOOD_MAP["b"]).unlink()
    with pytest.raises(InvalidInput, match=GOOD_MAP["b"]):
        open_checkpoint(Location(str(tmp_path)))


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    sharded(tmp_path, {**GOOD_MAP, "c": GOOD_MAP["b"]})
    with pytest.raises(InvalidInput, match=f"tensor c .*{GOOD_MAP['b']}"):
        open_checkpoint(Location(str(tmp_path)))
    sharded(tmp_path, {"a": GOOD_MAP["b"], "b": GOOD_MAP["b"]})
    with pytest.raises(InvalidInput, match="tensor a "):
        open_checkpoint(Location(str(tmp_path)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9999, "\0"])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    sharded(tmp_path, GOOD_MAP)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"index\.json"):
        open_checkpoint(Location(str(tmp_path)))


def test_a_config_that_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": A})
    (tmp_path / "config.json").write_text("not JSON")
    with pytest.raises(InvalidInput, match=r"config\.json"):
        open_checkpoint(Location(str(tmp_path)))


def test_a_truncated_shard(tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)
    shard = tmp_path / GOOD_MAP["b"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=f"{GOOD_MAP['b']}.*truncated"):
        open_checkpoint(Location(str(tmp_path)))


def test_several_files_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidInput, match="several safetensors files and no index"):
        open_checkpoint(Location(str(tmp_path)))
    assert open_checkpoint(Location(str(tmp_path / GOOD_MAP["b"]))).tensors.keys() == {"b"}


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="adapter: name its base model"):
        open_checkpoint(Location(str(tmp_path)))


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "a/b/c", "~/missing-model", "~no-such-user/model"])
def test_a_missing_path_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(FrodctlError, match="no such file or folder") as caught:
        open_checkpoint(Location(model))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("revision", ["refs/pr/1", "feature/x"])
def test_a_revision_may_hold_slashes(revision: str) -> None:
    location = Location(f"org/name@{revision}")
    assert location.local_path() is None
    assert location.short_name() == "name"


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidInput, match=r"model\.gguf"):
        open_checkpoint(Location(str(tmp_path / "model.gguf")))
    with pytest.raises(InvalidInput, match="no weights"):
        open_checkpoint(Location(str(tmp_path)))


def test_weights_are_preferred_in_the_order_transformers_prefers_them() -> None:
    for i, name in enumerate(WEIGHT_FILES):
        assert choose_weights([*reversed(WEIGHT_FILES[i:]), "other.safetensors", "config.json"], "x") == name
    assert choose_weights(["adapter_model.safetensors", "only.safetensors"], "x") == "only.safetensors"


def test_a_head_that_is_stored_although_tied_counts_once(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}
    tied = save_checkpoint(tmp_path / "tied", tensors, {"tie_word_embeddings": True})
    untied = save_checkpoint(tmp_path / "untied", tensors, {"tie_word_embeddings": False})
    assert open_checkpoint(Location(str(tied))).parameters() == 32
    assert open_checkpoint(Location(str(untied))).parameters() == 64


def test_an_empty_tensor_hides_no_other(tmp_path: Path) -> None:
    """An empty tensor begins where the next one does."""
    full = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({"full": full, "empty": empty}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert open_checkpoint(Location(str(path))).parameters() == 2


def test_integers_are_no_parameters(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": A, "position_ids": torch.arange(9)})
    assert open_checkpoint(Location(str(tmp_path))).parameters() == A.numel()


def test_an_index_file_stands_for_its_checkpoint(example: Path) -> None:
    by_index = open_checkpoint(Location(str(example / "model.safetensors.index.json")))
    assert by_index.tensors == open_checkpoint(Location(str(example))).tensors


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_tied_head_counts_once(where: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    config = tied if where == "top" else {"text_config": tied}
    weight = torch.ones(6, 4)
    folder = save_checkpoint(tmp_path, {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}, config)
    assert open_checkpoint(Location(str(folder))).parameters() == 24


def test_a_shared_basis_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", llama_layers(2), LLAMA_CONFIG)
    (tmp_path / "basis").mkdir()
    frodctl.decompose(str(tmp_path / "model"), tmp_path / "basis" / "b.safetensors")
    for model in ("basis", "basis/b.safetensors"):
        with pytest.raises(InvalidInput, match=r"b\.safetensors: is a shared-basis file, not a checkpoint"):
            frodctl.decompose(str(tmp_path / model), tmp_path / "out.safetensors")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "renamed.safetensors", "adapter_model.bin"])
def test_an_adapters_file_is_no_checkpoint(file: str, tmp_path: Path) -> None:
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.frod_lambda_l": A}
    save_file(tensors, tmp_path / file) if file.endswith("s") else torch.save(tensors, tmp_path / file)
    with pytest.raises(InvalidInput, match=f"{file}: is an adapter, not a checkpoint: name its base"):
        open_checkpoint(Location(str(tmp_path / file)))


@pytest.mark.parametrize("model", ["", b"", 5, None])
def test_a_model_that_is_no_name(model: Any) -> None:
    with pytest.raises(UsageError):
        Location(model)


def test_a_path_object_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model", {"a": A})
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in (tmp_path / "model", Path("~/model"), "~/model"):
        assert open_checkpoint(Location(model)).tensors.keys() == {"a"}  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ['"\\ud800"', '"a\\u0000b"', '"a/\\ud800"'])
def test_an_index_whose_names_are_no_names(text: str, tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)
    for content in (f'{{"weight_map": {{"a": {text}}}}}', f'{{"weight_map": {{{text}: "{GOOD_MAP["a"]}"}}}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InvalidInput) as caught:
            open_checkpoint(Location(str(tmp_path)))
        str(caught.value).encode()


def test_a_config_with_half_a_surrogate_pair_is_rewritten(tmp_path: Path) -> None:
    """Merging into another dtype writes the config anew."""
    from tests.jobs.test_merge import write_adapter

    folder = save_checkpoint(tmp_path / "base", llama_layers(2), LLAMA_CONFIG)
    frodctl.decompose(str(folder), tmp_path / "b.safetensors")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"name": "\\ud800", ', 1))
    write_adapter(tmp_path / "adapter", folder, tmp_path / "b.safetensors")
    basis = tmp_path / "b.safetensors"
    frodctl.merge(str(folder), str(tmp_path / "adapter"), tmp_path / "out", basis=basis, dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["name"] == "?"
