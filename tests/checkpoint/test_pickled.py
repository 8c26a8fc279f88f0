"""pytorch_model.bin: the bytes are where we say they are, and no code of the file runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from frodctl.arrays import to_torch
from frodctl.checkpoint import pickled, stream
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Location, TensorInfo
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
        assert torch.equal(to_torch(read), tensor), name
        assert to_torch(read).dtype == tensor.dtype
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
        assert torch.equal(to_torch(stream.read_tensor(tmp_path, info.slice(i))), expert)


def repack(source: Path, path: Path, compression: int, order: int = 1) -> None:
    """The same archive as another zip program would write it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for item in old.infolist()[::order]:
            new.writestr(item.filename, old.read(item))


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_a_repacked_archive_is_read_rightly(tmp_path: Path, order: int) -> None:
    state = {"a": torch.zeros(32, 32), "b": torch.ones(32, 32), "c": torch.full((32, 32), 2.0)}
    torch.save(state, tmp_path / "original.bin")
    repack(tmp_path / "original.bin", tmp_path / "x.bin", zipfile.ZIP_STORED, order)
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["b"], state["b"])  # torch reads it
    infos = headers(tmp_path / "x.bin")
    for name, tensor in state.items():
        assert torch.equal(to_torch(stream.read_tensor(tmp_path, infos[name])), tensor)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_not_unpacked(tmp_path: Path, compression: int) -> None:
    """It may be a thousand times as large as it looks."""
    torch.save({"a": torch.zeros(32, 32)}, tmp_path / "original.bin")
    repack(tmp_path / "original.bin", tmp_path / "x.bin", compression)
    with pytest.raises(InvalidInput, match=r"x\.bin: its members are compressed"):
        headers(tmp_path / "x.bin")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {item.filename: archive.read(item) for item in archive.infolist()}


#: What an archive's members may be changed to, and what is then said.
CHANGES: dict[str, tuple[dict[str, bytes], str]] = {
    "big-endian": ({"byteorder": b"big"}, "big-endian"),
    "of no endianness": ({"byteorder": b"little\0"}, "big-endian"),
    "alignment of 0": ({".storage_alignment": b"0"}, "damaged"),
    "alignment of 1e6": ({".storage_alignment": b"1000000"}, "damaged"),
    "storage too short": ({"data/0": bytes(40)}, "storage"),
    "storage too long": ({"data/0": bytes(400)}, "storage"),
    "much pickle": ({"data.pkl": bytes(9_000_000)}, "bytes of pickle"),
    "no pickle": ({"data.pkl": b""}, "damaged"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_an_archive_that_is_not_what_it_says(case: str, tmp_path: Path) -> None:
    changes, message = CHANGES[case]
    torch.save(STATE, tmp_path / "x.bin")
    parts = members(tmp_path / "x.bin") | {f"x/{name}": data for name, data in changes.items()}
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(InvalidInput, match=rf"x\.bin.*{message}"):
        headers(tmp_path / "x.bin")


def test_a_byte_order_mark_in_another_case_counts_as_it_does_for_torch(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin")
    parts = members(tmp_path / "x.bin")
    del parts["x/byteorder"]
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, data in {**parts, "x/ByteOrder": b"big"}.items():
            archive.writestr(name, data)
    with pytest.raises(InvalidInput, match="big-endian"):
        headers(tmp_path / "x.bin")


@pytest.mark.parametrize("before", [b"", b"PK\x03\x04" + bytes(30)], ids=["after it", "before it"])
def test_an_archive_with_something_around_it(before: bytes, tmp_path: Path) -> None:
    """zipfile and torch would find different directories."""
    torch.save(STATE, tmp_path / "x.bin")
    raw = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(before + raw if before else raw + b"x")
    with pytest.raises(InvalidInput, match="damaged"):
        headers(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(2**20, 2**20), "larger than the file"),
        (torch.zeros(1, 1).expand(3, 2**30), "larger than the file"),
        (torch.zeros(3, 4, device="meta"), "without its data"),
        (torch.empty(0, 2**61), "impossible shape"),
        (torch.zeros(6).as_strided((1, 3), (2**61, 2)), "impossible shape"),
        (torch.zeros([1] * 33), "impossible shape"),
        (torch.ones(3, dtype=torch.complex64).conj(), "something else"),
        (torch._neg_view(torch.ones(3)), "something else"),
    ],
    ids=["2**40 elements", "two dimensions", "meta", "2**63 bytes", "stride", "dimensions", "conjugate", "negative"],
)
def test_a_tensor_that_is_not_what_the_file_holds(
    tensor: torch.Tensor, message: str, zipped: bool, tmp_path: Path
) -> None:
    torch.save({"a": BASE, "odd": tensor}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput, match=rf"x\.bin.*{message}"):
        headers(tmp_path / "x.bin")


def test_many_views_of_little(tmp_path: Path) -> None:
    """Each is smaller than the file, all of them together are not."""
    row = torch.zeros(1, 1000)
    torch.save({str(i): row.expand(3, 1000) for i in range(1000)}, tmp_path / "x.bin")
    with pytest.raises(InvalidInput, match="larger than the file"):
        headers(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["\ud800", "a" * 1001], ids=["half a surrogate pair", "long"])
def test_a_name_that_is_none(name: str, zipped: bool, tmp_path: Path) -> None:
    torch.save({name: BASE}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput, match="name") as caught:
        headers(tmp_path / "x.bin")
    str(caught.value).encode()
    assert len(str(caught.value)) < 300


#: Reads archives of random tensors whose members, pickle or bytes are changed at random; anything but our own error, a
#: tensor of another size than it says, or the end of this process is a failure.
MUTATIONS = r"""
import random, resource, warnings, zipfile
from pathlib import Path
import torch
from frodctl.checkpoint import pickled, stream
from frodctl.errors import FrodctlError

warnings.simplefilter("ignore")
generator = random.Random(0)
base = torch.arange(24.0).reshape(4, 6)
state = {"a": base, "b": base.T, "c": base[1:, 2:].half(), "d": torch.ones(1, 3).expand(2, 3), "e": torch.empty(0, 3)}
numbers = [0, 1, 2, 5, 6, 7, 23, 24, 25, 127, 128, 255]

def spoil(data):
    data = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        if data:
            data[generator.randrange(len(data))] = generator.choice(numbers + list(b"(KJM\x8aRtbQq.0123"))
    return bytes(data)

def archive(zipped):
    torch.save(state, "o.bin", _use_new_zipfile_serialization=zipped)
    if not zipped:
        return spoil(Path("o.bin").read_bytes())
    kind = generator.random()
    if kind < 0.2:
        return spoil(Path("o.bin").read_bytes())
    with zipfile.ZipFile("o.bin") as old, zipfile.ZipFile("n.bin", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if kind < 0.7 and item.filename.endswith("data.pkl"):
                data = spoil(data)
            elif kind >= 0.7 and generator.random() < 0.3:
                data = spoil(data) if generator.random() < 0.5 else data[: len(data) // 2]
            if generator.random() > 0.02:
                compression = zipfile.ZIP_DEFLATED if generator.random() < 0.02 else zipfile.ZIP_STORED
                new.writestr(item.filename, data, compression)
    return Path("n.bin").read_bytes()

path = Path("x.bin")
resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9, 8 * 10**9))
accepted = 0
for number in range(400):
    path.write_bytes(archive(zipped=number % 4 > 0))
    try:
        infos = pickled.read_header(path)
    except FrodctlError as error:
        str(error).encode()
        assert len(str(error)) < 400
        continue
    accepted += 1
    for info in infos:
        assert stream.read_tensor(Path(), info).shape == info.shape
        stream.read_tensor(Path(), info).astype(float).sum()
print(accepted)
"""


def test_no_mutation_ends_otherwise_than_in_tensors_or_our_own_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MUTATIONS], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 400


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
    assert "needs code to load, which is never run" in str(caught.value)
    assert "can still be loaded" not in str(caught.value)  # no advice to load it all the same


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_code_is_not_called_damaged(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Exploit(tmp_path / "owned"), protocol))
    with pytest.raises(InvalidInput, match="needs code to load, which is never run"):
        pickled.read_header(tmp_path / "x.bin")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("module", [argparse, os], ids=lambda module: module.__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_with_objects_in_it(module: Any, zipped: bool, tmp_path: Path) -> None:
    thing = argparse.Namespace(lr=1) if module is argparse else os.stat_result(range(10))
    torch.save({"model": {"a": BASE}, "args": thing}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput, match="needs code to load"):
        pickled.read_header(tmp_path / "x.bin")


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x80\x02", b"PK\x03\x04", b"version https://git-lfs", bytes(999)])
def test_what_is_no_pickle_is_called_damaged(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(InvalidInput, match=r"x\.bin.*damaged"):
        pickled.read_header(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "raw",
    [b"N" * 300_000, b"X\xff\xff\xff\x00" + bytes(2**24) + b".", b"c" + b"a" * 300_000],
    ids=["many", "long", "line"],
)
def test_instructions_are_followed_so_far_only(raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_PICKLE_BYTES", 200_000)
    (tmp_path / "x.bin").write_bytes(b"\x80\x02" + raw)
    with pytest.raises(InvalidInput, match="ValueError"):
        pickled.read_header(tmp_path / "x.bin")


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
    assert torch.equal(to_torch(stream.read_tensor(tmp_path, info)), BASE)


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
    assert torch.equal(to_torch(stream.read_tensor(tmp_path, checkpoint.tensors["b"])), BASE + 1)
    assert checkpoint.parameters() == 2 * BASE.numel()
