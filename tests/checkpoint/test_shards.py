"""Files filled in any order, taken up after a kill, and read again."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from frodctl.checkpoint import codec
from frodctl.checkpoint.codec import TensorSpec
from frodctl.checkpoint.shards import ShardWriter, index, index_file, plan_shards, verify
from frodctl.errors import FrodctlError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(7),
    "c": torch.arange(5, dtype=torch.uint8),
}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
SPECS = [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]


def content(name: str) -> bytes:
    return TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_every_tensor_is_in_one_file_and_none_is_too_large(sizes: list[int], limit: int) -> None:
    specs = [TensorSpec(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    planned = plan_shards(specs, limit)
    assert sorted(s.name for shard in planned for s in shard.specs) == sorted(s.name for s in specs)
    for shard in planned:
        total = sum(spec.nbytes for spec in shard.specs)
        assert total <= limit or sum(spec.nbytes > 0 for spec in shard.specs) == 1
    assert [s.file for s in planned] == (
        ["model.safetensors"]
        if len(planned) == 1
        else [f"model-{i:05d}-of-{len(planned):05d}.safetensors" for i in range(1, len(planned) + 1)]
    )
    assert index(planned)["metadata"]["total_size"] == sum(sizes)


def test_the_index_is_called_as_its_files() -> None:
    for name in ("model", "diffusion_pytorch_model"):
        planned = plan_shards(SPECS, 10, name)
        assert all(re.fullmatch(rf"{name}-0000\d-of-0000\d.safetensors", shard.file) for shard in planned)
        assert index_file(planned) == f"{name}.safetensors.index.json"
    assert plan_shards(SPECS, 1000, name)[0].file == "diffusion_pytorch_model.safetensors"


@settings(deadline=None)
@given(order=st.permutations(list(TENSORS)), piece=st.integers(1, 30), limit=st.sampled_from([20, 1000]))
def test_tensors_written_in_any_order_and_pieces(
    order: list[str], piece: int, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    planned = plan_shards(SPECS, limit)
    with ShardWriter(folder, planned, folder / "journal") as writer:
        for name in order:
            data = content(name)
            writer.write(name, [data[i : i + piece] for i in range(0, len(data), piece)])
    verify(folder, planned, writer.digests)
    found = {name: t for shard in planned for name, t in load_file(folder / shard.file).items()}
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tensor.shape
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.ndim else found[name] == tensor
        assert codec.read_header(folder / index(planned)["weight_map"][name])


def test_a_system_without_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.pwrite")
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as writer, ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: writer.write(name, [content(name)[:3], content(name)[3:]]), TENSORS))
    verify(tmp_path, planned, writer.digests)


def test_what_a_killed_run_finished_is_taken_up_if_it_is_whole(tmp_path: Path) -> None:
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as writer:
        for name in ("b", "a", "c"):
            writer.write(name, [content(name)])
    with open(tmp_path / "journal", "a") as file:
        file.write('["scal')  # the line that was being written
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[planned[0].offsets()["a"]] ^= 1  # never reached the disk
    (tmp_path / "model.safetensors").write_bytes(data)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as again:
        assert set(again.digests) == {"b", "c"}
        for name in set(TENSORS) - set(again.digests):
            again.write(name, [content(name)])
    verify(tmp_path, planned, again.digests)


@pytest.mark.parametrize(
    "tail",
    [
        b'["scal',
        b"\x00\xff\xfe garbage \x80\n",
        b"\xff" * 40,
        b"[" * 100_000,
        b"null\n7\n{}\n[]\n" + b'"ab"\n["b"]\n["b", 1, 2]\n[{}, "x", "y"]\n["b", "x", "y", "z"]\n[null, null, null]',
        b'["\\ud800", "x", "y"]\n["other", "x", "y"]',
        b"1" * 10_000,
        b"NaN\n[NaN, NaN, NaN]",
    ],
)
def test_a_journal_with_an_invalid_tail(tail: bytes, tmp_path: Path) -> None:
    """What stands before it is believed, and the journal is sound again."""
    planned = plan_shards(SPECS, 1000)
    journal = tmp_path / "journal"
    with ShardWriter(tmp_path, planned, journal) as writer:
        writer.write("a", [content("a")])
    journal.write_bytes(journal.read_bytes() + tail)
    for _ in range(2):
        with ShardWriter(tmp_path, planned, journal) as again:
            assert set(again.digests) == {"a"}
    assert len(journal.read_text().splitlines()) == 1


@settings(deadline=None)
@given(data=st.binary(max_size=60), place=st.integers(0, 200))
def test_any_bytes_in_a_journal(data: bytes, place: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("journal")
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(folder, planned, folder / "journal") as writer:
        for name in ("a", "b"):
            writer.write(name, [content(name)])
    noted = bytearray((folder / "journal").read_bytes())
    noted[place : place + len(data)] = data
    (folder / "journal").write_bytes(noted)
    with ShardWriter(folder, planned, folder / "journal") as again:
        assert set(again.digests) <= {"a", "b"}


def test_a_tensor_made_from_other_bytes_is_not_taken_up(tmp_path: Path) -> None:
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as writer:
        writer.write("a", [content("a")], lambda: "one")
        writer.write("b", [content("b")], lambda: "two")
        writer.write("c", [content("c")])
    sources = {"a": "one", "b": "changed", "c": ""}
    for _ in range(2):
        with ShardWriter(tmp_path, planned, tmp_path / "journal", sources.__getitem__) as again:
            assert set(again.digests) == {"a", "c"}


def test_too_few_bytes_are_a_fault_of_the_caller(tmp_path: Path) -> None:
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as writer, pytest.raises(AssertionError, match="wrote 1"):
        writer.write("b", [b"x"])
    assert writer.digests == {}


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_a_disk_that_does_not_keep_what_it_was_given(where: str, tmp_path: Path) -> None:
    planned = plan_shards(SPECS, 1000)
    with ShardWriter(tmp_path, planned, tmp_path / "journal") as writer:
        for name in TENSORS:
            writer.write(name, [content(name)])
    data = (tmp_path / "model.safetensors").read_bytes()
    changed = data.replace(b'"scalar"', b'"scalas"') if where == "header" else data[:-1] + b"?"
    (tmp_path / "model.safetensors").write_bytes(changed)
    with pytest.raises(FrodctlError, match=r"header read back|reads back differently"):
        verify(tmp_path, planned, writer.digests)
