"""The shared-basis file: written, validated, verified."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import frodctl
from frodctl.arrays import from_torch, to_torch
from frodctl.checkpoint import codec, stream
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.basis_file import (
    BasisMetadata,
    ModuleRecord,
    check_name,
    file_metadata,
    open_basis,
    specs_of,
    write_basis,
)
from frodctl.method.pattern import patterns

N = 6
MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj")
TENSORS = {
    "V.q_proj": torch.arange(36.0).reshape(N, N),
    "tau.q_proj": torch.arange(6.0, dtype=torch.float64),
    **{f"lambda.{module}": torch.full((N,), 0.5) for module in MODULES},
}
METADATA = BasisMetadata(
    tool="frodctl 0",
    model="org/naïve",
    revision=None,
    alpha=1e-3,
    seed=7,
    sparsity={"q_proj": 0.1},
    precision="auto",
    V_digests={"q_proj": stream.digest(from_torch(TENSORS["V.q_proj"]))},
    digests={name: stream.digest(from_torch(tensor)) for name, tensor in TENSORS.items() if name != "V.q_proj"},
    modules=[ModuleRecord(name, "q_proj", i, (4, N), False, "sha256:0") for i, name in enumerate(MODULES)],
)


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: str | None = None) -> Path:
    save_file(tensors, path, {"format": "pt", "frodctl": METADATA.to_json() if metadata is None else metadata})
    return path


def save_indices(folder: Path, indices: torch.Tensor) -> Path:
    """With positions, and their digest."""
    metadata = edited(lambda value: value["digests"].update({"indices.q_proj": stream.digest(from_torch(indices))}))
    return save(folder / "x.safetensors", {**TENSORS, "indices.q_proj": indices}, metadata)


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    """The metadata after a change, and without its digest, which would tell."""
    value = json.loads(METADATA.to_json())
    del value["digest"]
    change(value)
    return json.dumps(value)


def test_metadata_that_was_changed_is_refused() -> None:
    value = json.loads(METADATA.to_json())
    for key, other in (("seed", 8), ("sparsity", {"q_proj": 0.2}), ("model", "org/other"), ("digest", "sha256:0")):
        with pytest.raises(InvalidInput, match="digests differ"):
            BasisMetadata.from_json(json.dumps({**value, key: other}), "x")


def test_metadata_survives_the_round_trip() -> None:
    read = BasisMetadata.from_json(METADATA.to_json(), "x")
    assert read.to_json() == METADATA.to_json()
    assert read.modules[1] == METADATA.modules[1]
    assert (read.model, read.sparsity, read.seed, read.peft_loadable) == ("org/naïve", {"q_proj": 0.1}, 7, True)
    collided = dataclasses.replace(METADATA, peft_collisions=("self_query",))
    assert not BasisMetadata.from_json(collided.to_json(), "x").peft_loadable
    shared = dataclasses.replace(METADATA, share_input={"q_proj": ["k_proj", "q_proj"]})
    read = BasisMetadata.from_json(shared.to_json(), "x")
    assert (read.share_input, read.peft_loadable) == ({"q_proj": ["k_proj", "q_proj"]}, False)
    assert "share_input" not in METADATA.to_json()  # files of others stay as they were


def test_what_later_versions_add_is_ignored() -> None:
    BasisMetadata.from_json(edited(lambda v: v.update(new=1)), "x")
    BasisMetadata.from_json(edited(lambda v: v["modules"][0].update(new=1)), "x")


def test_the_file_is_read_by_the_library_and_its_header_sorted(tmp_path: Path) -> None:
    """Two parts, as categories come, become one file."""
    other = {name.replace("q_proj", "v_proj"): tensor + 1 for name, tensor in TENSORS.items()}
    save_file(other, tmp_path / "0")
    save_file(TENSORS, tmp_path / "1")
    with open(tmp_path / "x.safetensors", "wb") as file:
        write_basis(file, [tmp_path / "0", tmp_path / "1"], METADATA)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == (TENSORS | other).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in (TENSORS | other).items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "frodctl": METADATA.to_json()}
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == ["format", "frodctl"]
    frodctl = json.loads(header["__metadata__"]["frodctl"])
    assert list(frodctl) == sorted(frodctl)


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "0")
    with open(tmp_path / "x", "wb") as file:
        write_basis(file, [tmp_path / "0"], METADATA)
    specs = codec.layout(specs_of("q_proj", N, "F32", MODULES))
    assert codec.file_bytes(specs, file_metadata(METADATA)) == (tmp_path / "x").stat().st_size


def test_an_opened_file_gives_its_tensors(tmp_path: Path) -> None:
    basis = open_basis(save(tmp_path / "x.safetensors", TENSORS))
    for name, tensor in TENSORS.items():
        assert torch.equal(to_torch(basis.tensor(name)), tensor)
    assert basis.width("q_proj") == N
    assert np.array_equal(basis.indices()["q_proj"], patterns({"q_proj": N}, {"q_proj": 0.1}, 7)["q_proj"])
    basis.verify()


def test_stored_indices_stand_in_for_the_seeded_ones(tmp_path: Path) -> None:
    indices = torch.tensor([[0, 1], [1, 0]])
    basis = open_basis(save_indices(tmp_path, indices))
    assert np.array_equal(basis.indices()["q_proj"], indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_v_may_be_stored_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    v = TENSORS["V.q_proj"].to(dtype)
    metadata = edited(lambda value: value["basis"].update(q_proj=stream.digest(from_torch(v))))
    open_basis(save(tmp_path / "x.safetensors", {**TENSORS, "V.q_proj": v}, metadata)).verify()


WRONG_TENSORS = {
    "V.q_proj": [torch.ones(s) for s in ((N, N + 1), (N,), (), (N + 1, N + 1))] + [torch.ones(N, N).long()],
    "tau.q_proj": [torch.ones(N), torch.ones(N + 1).double(), torch.ones(N, 1).double()],
    "lambda.model.layers.1.q_proj": [torch.ones(N).double(), torch.ones(N - 1), torch.ones(N).half()],
    "indices.q_proj": [torch.ones(2, 3), torch.ones(3, 2).long(), torch.ones(2).long()],
}  # fmt: skip


@pytest.mark.parametrize(("name", "tensor"), [(name, t) for name, wrong in WRONG_TENSORS.items() for t in wrong])
def test_a_tensor_of_another_kind_is_refused_by_name(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"x\.safetensors: .*(q_proj)"):
        open_basis(save(tmp_path / "x.safetensors", {**TENSORS, name: tensor}))


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    rest = {other: tensor for other, tensor in TENSORS.items() if other != name}
    with pytest.raises(InvalidInput, match=r"x\.safetensors: .*q_proj"):
        open_basis(save(tmp_path / "x.safetensors", rest))


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        ([[0, 1], [1, N]], "outside the 6 x 6"),
        ([[0, -1], [1, 0]], "outside the 6 x 6"),
        ([[0, 2**62], [1, 0]], "outside the 6 x 6"),
        ([[0, 1], [1, 1]], "on the diagonal"),
        ([[0, 2, 0], [1, 1, 1]], "twice"),
    ],
)
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, indices: list[list[int]], wrong: str) -> None:
    path = save_indices(tmp_path, torch.tensor(indices))
    with pytest.raises(InvalidInput, match=rf"indices\.q_proj .*{wrong}"):
        open_basis(path).indices()


METADATA_DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no version": lambda v: v.pop("version"),
    "no modules": lambda v: v.pop("modules"),
    "no seed": lambda v: v.pop("seed"),
    "modules is an object": lambda v: v.update(modules={"a": 1}),
    "basis is a list": lambda v: v.update(basis=["q_proj"]),
    "sparsity is a number": lambda v: v.update(sparsity=0.1),
    "sparsity of no category": lambda v: v.update(sparsity={}),
    "seed is a string": lambda v: v.update(seed="x"),
    "alpha is null": lambda v: v.update(alpha=None),
    **{f"alpha {a}": lambda v, a=a: v.update(alpha=a) for a in (True, 0, -1, float("nan"), float("inf"), "1")},
    **{f"seed {s}": lambda v, s=s: v.update(seed=s) for s in (True, 2**64, -(2**63) - 1, 1.0, None)},
    **{
        f"sparsity {s}": lambda v, s=s: v["sparsity"].update(q_proj=s)
        for s in (True, -0.1, 2, 1e308, float("nan"), float("inf"), "0.1", None)
    },
    "basis of numbers": lambda v: v.update(basis={"q_proj": 1}),
    "digests is a list": lambda v: v.update(digests=["x"]),
    "digests is null": lambda v: v.update(digests=None),
    "a digest is a number": lambda v: v["digests"].update({"tau.q_proj": 1}),
    "a digest is missing": lambda v: v["digests"].pop("tau.q_proj"),
    "share_input is a list": lambda v: v.update(share_input=["q_proj"]),
    "share_input of no category": lambda v: v.update(share_input={"k_proj": ["k"]}),
    "share_input of text": lambda v: v.update(share_input={"q_proj": "q_proj"}),
    "model is a number": lambda v: v.update(model=1),
    "revision is a number": lambda v: v.update(revision=1),
    "transposed is text": lambda v: v["modules"][0].update(transposed="no"),
    "digest is a list": lambda v: v["modules"][0].update(digest=[]),
    "unknown category": lambda v: v["modules"][0].update(category="k_proj"),
    "category is a list": lambda v: v["modules"][0].update(category=[]),
    "shape of text": lambda v: v["modules"][0].update(shape="ab"),
    "shape of three": lambda v: v["modules"][0].update(shape=[4, N, 1]),
    "other width": lambda v: v["modules"][0].update(shape=[4, N + 1]),
    "transposed": lambda v: v["modules"][0].update(transposed=True),
    "no digest": lambda v: v["modules"][0].pop("digest"),
}


@pytest.mark.parametrize("damage", METADATA_DAMAGE.values(), ids=METADATA_DAMAGE)
def test_damaged_metadata_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(InvalidInput, match=r"x\.safetensors"):
        open_basis(save(tmp_path / "x.safetensors", TENSORS, edited(damage)))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", '"x"', "[" * 100_000])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match=r"x\.safetensors"):
        open_basis(save(tmp_path / "x.safetensors", TENSORS, text))


@pytest.mark.parametrize(("version", "text"), [(2, "format 2.* update frodctl"), (10**9, "update frodctl"),
                                               (0, "damaged"), ("2", "damaged"), (None, "damaged"), (True, "damaged"),
                                               (1.5, "damaged")])  # fmt: skip
def test_another_version_is_refused(tmp_path: Path, version: object, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        open_basis(save(tmp_path / "x.safetensors", TENSORS, edited(lambda v: v.update(version=version))))


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="not a shared-basis file"):
        open_basis(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"text")
    with pytest.raises(InvalidInput, match="not a valid safetensors file"):
        open_basis(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", TENSORS)
def test_a_flipped_bit_is_found_wherever_it_is_read(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "x.safetensors", TENSORS)
    raw = bytearray(path.read_bytes())
    raw[open_basis(path).header.tensors[name][1] + 17] ^= 1
    path.write_bytes(raw)
    damaged = open_basis(path)
    for read in (damaged.verify, lambda: damaged.tensor(name)):
        with pytest.raises(InvalidInput, match=rf"x\.safetensors: {re.escape(name)} is damaged"):
            read()
    for other in TENSORS.keys() - {name}:
        damaged.tensor(other)


def test_tensors_that_later_versions_add_are_ignored(tmp_path: Path) -> None:
    more = {"V.new": torch.ones(2, 2), "lambda.new": torch.ones(2), "x": torch.ones(1)}
    path = save(tmp_path / "x.safetensors", {**TENSORS, **more})
    open_basis(path).verify()
    assert {row.values["name"] for row in frodctl.inspect(path, spectrum=True).targets[0].rows} == {*TENSORS, *more}


def test_files_without_digests_are_read(tmp_path: Path) -> None:
    """Those that earlier versions wrote: V alone has one."""
    path = save(tmp_path / "x.safetensors", TENSORS, edited(lambda v: v.pop("digests")))
    basis = open_basis(path)
    basis.verify()
    assert all(torch.equal(to_torch(basis.tensor(name)), tensor) for name, tensor in TENSORS.items())


def test_a_path_where_nothing_is_is_wrong_usage(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", str(tmp_path / "missing"), "~/no-such-basis"):
        with pytest.raises(UsageError, match="no such file"):
            open_basis(path)
    for path in ("", 5, None, b"x"):
        with pytest.raises(UsageError, match="basis"):
            open_basis(path)  # type: ignore[arg-type]


def test_what_is_no_basis_file_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"garbage")
    for path in (tmp_path, tmp_path / "garbage"):
        with pytest.raises(InvalidInput):
            open_basis(path)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    basis = open_basis(save(tmp_path / "x.safetensors", TENSORS))
    with pytest.raises(UsageError, match=r"no tensor V\.q_prj; V\.q_proj"):
        basis.tensor("V.q_prj")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"])
def test_no_basis_is_written_under_a_name_of_weights(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would be taken for"):
        check_name(tmp_path / name)
    for good in ("model.frod.safetensors", "model.basis.safetensors", "b.safetensors"):
        check_name(tmp_path / good)
