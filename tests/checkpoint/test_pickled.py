"""pytorch_model.bin: the bytes are where we say they are, and no code of the file runs."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from frodctl.checkpoint import pickled, stream
from frodctl.checkpoint.source import Location, TensorInfo, open_checkpoint
from frodctl.errors import InvalidInput

BASE = torch.arange(24.0).reshape(4, 6)
STATE = {
    "plain": BASE,
    "tied": BASE,
    "transposed": BASE.T,
    "view": BASE[1:, 2:],
    "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "bf16": BASE.bfloat16() + 1,
    "int": torch.arange(5),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(BASE + 2),
}


def headers(path: Path) -> dict[str, TensorInfo]:
    return {info.name: info for info in pickled.read_header(path)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_read_are_the_tensors_saved(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    infos = headers(path)
    assert infos.keys() == STATE.keys()
    for name, tensor in STATE.items():
        read = stream.read_tensor(tmp_path, infos[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
        stream.digest(read)


def test_zip_archives_are_not_held_in_memory(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin")
    assert all(info.data is None for info in pickled.read_header(tmp_path / "x.bin"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dims", [(0, 1), (0, 2), (1, 2)])
def test_slices_of_a_transposed_expert_tensor(tmp_path: Path, dims: tuple[int, int], zipped: bool) -> None:
    experts = torch.arange(24.0).reshape(2, 3, 4).transpose(*dims)
    torch.save({"experts": experts}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    info = headers(tmp_path / "x.bin")["experts"]
    for i, expert in enumerate(experts):
        assert torch.equal(stream.read_tensor(tmp_path, info, i), expert)


def repack(source: Path, path: Path, compression: int, order: int = 1) -> None:
    """The same archive as another zip program would write it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for item in old.infolist()[::order]:
            new.writestr(item.filename, old.read(item))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_a_repacked_archive_is_read_rightly_or_refused(tmp_path: Path, compression: int, order: int) -> None:
    state = {"a": torch.zeros(32, 32), "b": torch.ones(32, 32), "c": torch.full((32, 32), 2.0)}
    torch.save(state, tmp_path / "original.bin")
    repack(tmp_path / "original.bin", tmp_path / "x.bin", compression, order)
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["b"], state["b"])  # torch reads it
    try:
        infos = headers(tmp_path / "x.bin")
    except InvalidInput:
        return
    for name, tensor in state.items():
        assert torch.equal(stream.read_tensor(tmp_path, infos[name]), tensor)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    state = {"weight": BASE, "evil": Exploit(tmp_path / "owned")}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput, match=r"pytorch_model\.bin") as caught:
        open_checkpoint(Location(str(tmp_path)))
    assert not (tmp_path / "owned").exists()
    assert "can still be loaded" not in str(caught.value)  # no advice to load it all the same


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "content",
    [
        [BASE],
        {"epoch": 3},
        {1: BASE},
        {"a": BASE.to_sparse()},
        {"a": torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8)},
        {"a": torch.ones(2, dtype=torch.complex128)},
        torch.nn.Linear(2, 2),
    ],
    ids=["list", "number", "name is a number", "sparse", "quantized", "complex128", "module"],
)
def test_anything_but_named_dense_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(InvalidInput, match=r"x\.bin"):
        pickled.read_header(tmp_path / "x.bin")


def test_a_training_checkpoint_holds_its_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": BASE}, "epoch": 3}, tmp_path / "x.bin")
    info = headers(tmp_path / "x.bin")["a"]
    assert torch.equal(stream.read_tensor(tmp_path, info), BASE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    torch.save(STATE, tmp_path / "whole.bin", _use_new_zipfile_serialization=zipped)
    raw = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InvalidInput, match=r"x\.bin") as caught:
        pickled.read_header(tmp_path / "x.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tied_tensors_count_once_and_views_of_one_storage_each(tmp_path: Path, zipped: bool) -> None:
    state = {"a": BASE[:2], "b": BASE[2:], "tied": BASE[2:]}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert open_checkpoint(Location(str(tmp_path))).parameters() == BASE.numel()


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save({"a": BASE}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": BASE + 1}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(Location(str(tmp_path)))
    assert torch.equal(stream.read_tensor(tmp_path, checkpoint.tensors["b"]), BASE + 1)
    assert checkpoint.parameters() == 2 * BASE.numel()
