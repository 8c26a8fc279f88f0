"""Which files of a folder belong to the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frodctl.checkpoint.companions import companions, files_below, module_folders

KEPT = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt",
    "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "preprocessor_config.json",
    "modeling_custom.py", "LICENSE", "LICENSE.txt", "NOTICE", "1_Pooling/config.json", "sentencepiece.bpe.model",
]  # fmt: skip
LEFT = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
    "onnx/model.onnx", "onnx/config.json", "model.gguf", "adapter_config.json", "adapter_model.safetensors",
    "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "rng_state_0.pth", "README.md",
    ".gitattributes", ".cache/huggingface/x", "runs/a/events.out.tfevents.1", "checkpoint-50/config.json",
    "saved_model/saved_model.pb", "saved_model/variables/variables.data-00000-of-00001", "model.onnx.data", "a.pkl",
    "onnx2/model.onnx_data_1", "model.keras", "x.tar.gz", "model.safetensors.index.fp32.json",
    "tiny-llama.frod.safetensors", "__pycache__/modeling_custom.cpython-311.pyc", "x.partial/key/journal",
    "frodctl.json",
]  # fmt: skip


def test_what_is_kept_and_what_is_left() -> None:
    assert companions([*KEPT, *LEFT]) == sorted(KEPT)


def test_folders_that_sentence_transformers_lists_come_with_their_weights() -> None:
    files = ["2_Dense/model.safetensors", "2_Dense/config.json", "modules.json", "other/model.safetensors"]
    assert companions(files) == ["modules.json"]
    assert companions(files, {"2_Dense"}) == ["2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]


@pytest.mark.parametrize(
    ("content", "folders"),
    [
        (json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense/x"}]), {"1_Pooling", "2_Dense"}),
        (json.dumps([{"path": "../x"}, {"path": "/etc"}, {"path": "."}]), set()),
        ("[" * 100_000, set()),
        ("[1, 2]", set()),
        ("{", set()),
    ],
)
def test_the_list_of_modules_is_not_trusted(content: str, folders: set[str], tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    assert module_folders(tmp_path / "modules.json") == folders
    assert module_folders(tmp_path / "missing.json") == set()


def test_files_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e", ".hidden/f", "b/.g"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "secret").symlink_to("/etc/hostname")
    assert files_below(tmp_path) == ["a", "b/c", "b/d/e", "linked"]
    assert files_below(tmp_path, sub_folders=False) == ["a", "linked"]


@pytest.mark.parametrize(
    ("folder", "followed"),
    [
        ("models--org--name/snapshots/commit", True),
        ("models--org--name/snapshots/commit/unet", True),
        ("models--org--name/snapshot/commit", False),
        ("name/snapshots/commit", False),
        ("work/model", False),
    ],
)
def test_links_to_blobs_are_followed_in_the_hub_cache_alone(folder: str, followed: bool, tmp_path: Path) -> None:
    """A ``blobs`` folder somewhere above an ordinary one is anybody's."""
    (tmp_path / folder).mkdir(parents=True)
    for above in (tmp_path / folder).parents:
        if above.is_relative_to(tmp_path):
            (above / "blobs").mkdir()
            (above / "blobs" / "secret").touch()
    for depth, name in enumerate(("a", "b", "c", "d"), 1):
        target = tmp_path / folder / ("../" * depth) / "blobs" / "secret"
        if target.exists():
            (tmp_path / folder / name).symlink_to("../" * depth + "blobs/secret")
    depth = folder.count("/") if folder.startswith("models") else 0
    assert files_below(tmp_path / folder) == (["abcd"[depth - 1]] if followed else [])


def test_a_cache_whose_blobs_are_elsewhere_is_none(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").touch()
    (tmp_path / "models--x" / "blobs").symlink_to(tmp_path / "secrets")
    (snapshot / "key").symlink_to("../../blobs/key")
    assert files_below(snapshot) == []
