"""Adapters: every byte that a digest is recorded of, and every field, by whichever way it is read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.frod.layer import FrodLayer
from safetensors.torch import load_file, save_file

import frodctl
from frodctl.arrays import from_torch
from frodctl.checkpoint import codec
from frodctl.checkpoint.stream import digest
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import Provenance, write_adapter
from frodctl.training import peft as bridge
from frodctl.training.layer import FrodLinear
from tests import peft_models
from tests.training.conftest import labelled, perturb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("lean", "self-contained", "selected")
SHARED = "base_model.frod_"
Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.frod_"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a basis, one with positions of its own, and adapters of every kind; not to be written to."""
    root = tmp_path_factory.mktemp("written")
    base = peft_models.save_base(root / "base", "llama", torch.float32)
    basis = root / "basis.safetensors"
    frodctl.decompose(base, basis, target_modules="q_proj,down_proj", sparsity=0.05, seed=3)
    model = frodctl.attach(peft_models.task_model("llama", base), basis)
    perturb(model)
    frodctl.save_adapter(model, root / "lean")
    frodctl.save_adapter(model, root / "self-contained", self_contained=True)
    model = frodctl.attach(peft_models.task_model("llama", base), basis)
    frodctl.select_pattern(model, [labelled("llama")])
    perturb(model)
    frodctl.save_adapter(model, root / "selected")
    model = frodctl.attach(peft_models.task_model("llama", base), basis)
    frodctl.select_pattern(model, [labelled("llama")], output=root / "patterns.safetensors")
    perturb(model)
    frodctl.save_adapter(model, root / "over-patterns")
    peft_models.trained_adapter(root / "peft", "llama", base)
    return root


def accepted(way: str, read: Callable[[], Any]) -> None:
    read()
    pytest.fail(f"{way} took it")


@dataclass(frozen=True)
class Files:
    """A copy of them that may be damaged."""

    root: Path
    untouched: Any  #: the model, which nothing that is refused may change

    def model(self) -> Any:
        """A model that may be changed."""
        return copy.deepcopy(self.untouched)

    def ways(self, adapter: str, basis: str | None = None) -> dict[str, Callable[[], Any]]:
        """Everything that reads an adapter, over the basis file that is given or lies near it."""
        folder, base, out = self.root / adapter, self.root / "base", self.root / "out"
        file = None if basis is None else self.root / basis
        return {
            "load_adapter": lambda: frodctl.load_adapter(self.untouched, folder, file),
            "merge": lambda: frodctl.merge(base, folder, out, basis=file),
            "inspect --base": lambda: frodctl.inspect(folder, base=str(base), basis=file),
            "inspect --spectrum": lambda: frodctl.inspect(folder, spectrum=True, basis=file),
            "bridge": lambda: bridge.load(self.untouched, folder, file),
        }

    def refused(self, ways: Mapping[str, Callable[[], Any]], match: str) -> None:
        for way, read in ways.items():
            with pytest.raises(InvalidInput, match=match) as error:
                accepted(way, read)
            assert error.value.exit_code == 3
            assert len(str(error.value).splitlines()) == 1
        assert not list(self.root.glob("out*"))

    def edit(self, adapter: str, change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> None:
        """Change an adapter's config, and leave out its own digest."""
        file = self.root / adapter / CONFIG
        value = json.loads(file.read_text())
        if signed and isinstance(value.get("frodctl"), dict):
            value["frodctl"].pop("digest", None)
        change(value)
        file.write_text(json.dumps(value))

    def retrain(self, adapter: str, change: Callable[[dict[str, torch.Tensor]], Any], *, signed: bool = True) -> None:
        """Change an adapter's tensors, and their digests with them."""
        file = self.root / adapter / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, {"format": "pt"})
        if signed:
            own = {name: digest(from_torch(tensor)) for name, tensor in tensors.items() if "frod_V" not in name}
            self.edit(adapter, lambda config: config["frodctl"].update(digests=own))


@pytest.fixture(scope="module")
def untouched(written: Path) -> Any:
    return peft_models.task_model("llama", written / "base")


@pytest.fixture
def files(written: Path, untouched: Any, tmp_path: Path) -> Iterator[Files]:
    yield Files(Path(shutil.copytree(written, tmp_path / "files")), untouched)
    assert not any(isinstance(module, FrodLinear | FrodLayer) for module in untouched.modules())


def flipped(file: Path) -> Iterator[str]:
    """The tensors' names; while one is handed out, a bit of its middle byte is another."""
    data = file.read_bytes()
    for name, (spec, offset) in codec.read_header(file).tensors.items():
        place = offset + spec.nbytes // 2
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        yield name
    file.write_bytes(data)


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value the digests are."""
    if isinstance(value, str) and value.startswith("sha256:"):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from strings(item, (*path, key))


def other_digest(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    text = value[path[-1]]
    value[path[-1]] = text[:-1] + ("0" if text[-1] != "0" else "1")


class TestADigestAndItsBytes:
    """A flipped bit behind each recorded digest, and a digit of the digest itself."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_adapter_s_tensors(self, kind: str, files: Files) -> None:
        names = []
        for name in flipped(files.root / kind / WEIGHTS):
            names.append(name)
            ways = files.ways(kind)
            if "frod_V" in name:  # the figures of λ and S do without it
                del ways["inspect --spectrum"]
            if "lambda_0" in name:  # PEFT's model does without it
                del ways["bridge"]
            files.refused(ways, f"tensor {name} is damaged")
        assert len(names) == {"lean": 12, "self-contained": 24, "selected": 14}[kind]

    @pytest.mark.parametrize(("file", "adapter"), [("basis", "lean"), ("patterns", "over-patterns")])
    def test_a_basis_file_s_tensors(self, file: str, adapter: str, files: Files) -> None:
        path = files.root / f"{file}.safetensors"
        for name in flipped(path):
            wrong = f"{file}.safetensors: {name} is damaged"
            ways = {"inspect BASIS --base": lambda: frodctl.inspect(path, base=str(files.root / "base"))}
            if not name.startswith("tau."):
                ways |= files.ways(adapter, path.name)
                ways["attach"] = lambda: frodctl.attach(files.untouched, path)
                ways["get_peft_model"] = lambda: bridge.get_peft_model(files.untouched, path)
            if name.startswith("V."):
                del ways["inspect --spectrum"]
            if name.startswith("lambda."):
                del ways["bridge"]
            files.refused(ways, wrong)

    @pytest.mark.parametrize("kind", [*KINDS, "over-patterns"])
    def test_an_adapter_s_digests(self, kind: str, files: Files) -> None:
        before = (files.root / kind / CONFIG).read_text()
        paths = [path for path in strings(json.loads(before)) if path[1] != "digest"]  # test_what_the_config_says…
        assert {path[1] for path in paths} == {"basis", "base", "pattern", "digests"}
        for path in paths:
            files.edit(kind, lambda config, path=path: other_digest(config, path))
            field, name = path[1], path[-1]
            held = kind == "self-contained"
            basis = "patterns.safetensors" if kind == "over-patterns" else "basis.safetensors"
            ways = files.ways(kind, None if held else basis)
            if field == "basis" and held:  # the figures of λ and S do without V
                del ways["inspect --spectrum"]
            if field == "base" and held:  # only these read the base's bytes
                ways = {way: ways[way] for way in ("merge", "inspect --base")}
            if "lambda_0" in name:
                del ways["bridge"]
            files.refused(ways, f"{kind}|basis.safetensors|patterns.safetensors|base")
            (files.root / kind / CONFIG).write_text(before)

    def test_a_basis_file_s_digests(self, files: Files) -> None:
        path = files.root / "basis.safetensors"
        header = codec.read_header(path)
        tensors, before = load_file(path), json.loads(header.metadata["frodctl"])
        for place in strings(before):
            value = json.loads(header.metadata["frodctl"])
            other_digest(value, place)
            save_file(tensors, path, {"format": "pt", "frodctl": json.dumps(value)})
            if place[0] == "digests" and place[1].startswith("tau"):
                ways = {"inspect": lambda: frodctl.inspect(path, spectrum=True)}
            else:
                ways = files.ways("lean", path.name)
                if place[0] == "digests":
                    del ways["bridge"]
            files.refused(ways, r"basis\.safetensors")

    @pytest.mark.parametrize("kind", KINDS)
    def test_digests_that_are_left_out(self, kind: str, files: Files) -> None:
        """Of one tensor; or of one that is not there."""
        files.edit(kind, lambda config: config["frodctl"]["digests"].pop(f"{KEY}lambda_l"))
        files.refused(files.ways(kind), "lambda_l")
        files.edit(kind, lambda config: config["frodctl"]["digests"].update({f"{KEY}lambda_l": "sha256:", "x": ""}))
        files.refused(files.ways(kind), "tensor x, of which its config has a digest, is missing")
        files.edit(kind, lambda config: config["frodctl"].pop("digests"))
        files.refused(files.ways(kind), "no digest of tensor")

    def test_positions_that_nothing_says(self, files: Files) -> None:
        files.edit("over-patterns", lambda config: config["frodctl"]["pattern"].pop("self_attn_q_proj"))
        files.refused(files.ways("over-patterns"), "no digest of the positions of self_attn_q_proj")


def swapped(positions: torch.Tensor) -> torch.Tensor:
    return positions.flip(0)


def put(row: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(positions: torch.Tensor) -> torch.Tensor:
        found = positions.clone()
        found[row, 5] = value
        return found

    return change


def doubled(positions: torch.Tensor) -> torch.Tensor:
    found = positions.clone()
    found[:, 1] = found[:, 0]
    return found


def on_the_diagonal(positions: torch.Tensor) -> torch.Tensor:
    found = positions.clone()
    found[0, 3] = found[1, 3]
    return found


OUTSIDE = [put(row, value) for row in (0, 1) for value in (-1, -(2**40), 32, 33, 10**6, 2**31, 2**62)]


def without_basis(files: Files) -> tuple[str, None]:
    for path in files.root.glob("*.safetensors"):
        path.unlink()
    return "lean", None


def another_basis(files: Files) -> tuple[str, str]:
    frodctl.decompose(files.root / "base", files.root / "other.safetensors", target_modules="q_proj,down_proj", alpha=1)
    return "lean", "other.safetensors"


def narrower_basis(files: Files) -> tuple[str, str]:
    frodctl.decompose(files.root / "base", files.root / "other.safetensors", target_modules="q_proj")
    return "lean", "other.safetensors"


def other_positions(files: Files) -> tuple[str, str]:
    return "over-patterns", "basis.safetensors"


def another_base(files: Files) -> tuple[str, str]:
    files.edit("lean", lambda config: config["frodctl"]["base"].update({Q: f"sha256:{0:064}"}))
    return "lean", "basis.safetensors"


def another_seed(files: Files) -> tuple[str, None]:
    files.edit("self-contained", lambda config: config["frodctl"].update(seed=4))
    return "self-contained", None


def damaged(files: Files) -> tuple[str, None]:
    next(flipped(files.root / "lean" / WEIGHTS))
    return "lean", None


class TestOneSentence:
    """A refusal is the same one whoever reads the adapter."""

    @pytest.mark.parametrize(
        "fault",
        [without_basis, another_basis, narrower_basis, other_positions, another_base, another_seed, damaged],
    )
    def test_from_everybody(self, fault: Callable[[Files], tuple[str, str | None]], files: Files) -> None:
        ways = files.ways(*fault(files))
        if fault is without_basis:  # the figures of λ and S do without
            del ways["inspect --spectrum"]
        said = {}
        for way, read in ways.items():
            with pytest.raises(InvalidInput) as error:
                accepted(way, read)
            said[way] = str(error.value)
        assert len(set(said.values())) == 1, said


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "form": lambda own: own.update(form="reconstruct"),
    "dtype": lambda own: own.update(dtype=dict.fromkeys(own["basis"], "BF16")),
    "categories": lambda own: own.update(categories={Q: "self_attn_o_proj"}),
    "seed": lambda own: own.update(seed=1, pattern={}),
    "pattern": lambda own: own.update(pattern={}),
    "digests": lambda own: own.update(digests={}),
    "sparsity": lambda own: own["sparsity"].update(self_attn_q_proj=0.5),
    "base": lambda own: own["base"].popitem(),
    "basis": lambda own: own["basis"].popitem(),
    "head": lambda own: own.update(head={"id2label": {"0": "a"}}),
    "something new": lambda own: own.update(new=1),
    "its digest": lambda own: own.update(digest="sha256:" + 64 * "0"),
}


@pytest.mark.parametrize("kind", ["lean", "self-contained", "selected"])
@pytest.mark.parametrize("key", EDITS)
def test_what_the_config_says_has_a_digest(files: Files, kind: str, key: str) -> None:
    """Form, categories, seed: with another one the same tensors make another model."""
    files.edit(kind, lambda config: EDITS[key](config["frodctl"]), signed=False)
    files.refused(files.ways(kind, "basis.safetensors"), "was changed since it was saved")


def test_a_config_without_its_object(files: Files) -> None:
    """As one of PEFT's own adapters it would be another model."""
    files.edit("self-contained", lambda config: (config.pop("frodctl"), config.update(peft_type="FROD")))
    files.refused(files.ways("self-contained"), "lacks the frodctl object")


class TestPositions:
    """They are never taken on trust: torch writes to wherever they point."""

    @pytest.mark.parametrize("change", [swapped, doubled, on_the_diagonal, *OUTSIDE])
    def test_not_those_of_the_seed(self, change: Callable[[torch.Tensor], torch.Tensor], files: Files) -> None:
        key = f"{SHARED}s_indices.self_attn_q_proj"
        files.retrain("self-contained", lambda tensors: tensors.update({key: change(tensors[key])}))
        files.edit("self-contained", lambda config: config["frodctl"].update(pattern={}))
        files.refused(files.ways("self-contained"), "s_indices.self_attn_q_proj")
        files.refused({"given": files.ways("self-contained", "basis.safetensors")["load_adapter"]}, "s_indices")

    @pytest.mark.parametrize("change", [doubled, on_the_diagonal, *OUTSIDE])
    def test_of_ones_own(self, change: Callable[[torch.Tensor], torch.Tensor], files: Files) -> None:
        """With all digests as they would be if these had been trained."""
        key = "base_model.indices.self_attn_q_proj"
        files.retrain("selected", lambda tensors: tensors.update({key: change(tensors[key])}))
        wrong = digest(from_torch(load_file(files.root / "selected" / WEIGHTS)[key]))
        files.edit("selected", lambda config: config["frodctl"]["pattern"].update(self_attn_q_proj=wrong))
        files.refused(files.ways("selected"), r"indices\.self_attn_q_proj (points outside|has )")

    @pytest.mark.parametrize("change", [doubled, on_the_diagonal, *OUTSIDE])
    def test_peft_s(self, change: Callable[[torch.Tensor], torch.Tensor], files: Files) -> None:
        key = f"{SHARED}s_indices.self_attn_q_proj"
        files.retrain("peft", lambda tensors: tensors.update({key: change(tensors[key])}), signed=False)
        ways = files.ways("peft")
        del ways["load_adapter"]
        files.refused(ways, r"indices\.self_attn_q_proj (points outside|has )")

    def test_peft_s_need_not_be_the_seed_s(self, files: Files) -> None:
        """PEFT goes by what it has saved: so do we, and so does the bridge."""
        key = f"{SHARED}s_indices.self_attn_q_proj"
        files.retrain("peft", lambda tensors: tensors.update({key: swapped(tensors[key])}), signed=False)
        frodctl.merge(files.root / "base", files.root / "peft", files.root / "out")
        merged = peft_models.task_model("llama", files.root / "out")
        theirs = bridge.load(files.model(), files.root / "peft")
        assert (peft_models.logits(merged) - peft_models.logits(theirs)).abs().max() <= 1e-5

    @pytest.mark.parametrize("size", [[32, 31], [0, 0], [64, 64]])
    def test_another_size(self, size: list[int], files: Files) -> None:
        key = f"{SHARED}s_size.self_attn_q_proj"
        files.retrain("self-contained", lambda tensors: tensors.update({key: torch.tensor(size)}))
        files.refused(files.ways("self-contained"), "s_size.self_attn_q_proj")

    @pytest.mark.parametrize("kind", [*KINDS, "peft"])
    @pytest.mark.parametrize("shape", [(2,), (3, 51), (51,), (2, 51, 1), (0,)])
    def test_another_shape(self, shape: tuple[int, ...], kind: str, files: Files) -> None:
        key = f"{SHARED}s_indices.self_attn_q_proj"
        wrong = torch.zeros(shape, dtype=torch.int64)
        files.retrain(kind, lambda tensors: tensors.update({key: wrong}), signed=kind != "peft")
        ways = files.ways(kind)
        files.refused(ways, "self_attn_q_proj")


class TestComplete:
    """λ, where it began, S and V of every module; whatever else is listed."""

    @pytest.mark.parametrize("kind", [*KINDS, "peft"])
    @pytest.mark.parametrize("part", ["lambda_l", "lambda_s_values"])
    def test_without_a_part_of_a_module(self, part: str, kind: str, files: Files) -> None:
        files.retrain(kind, lambda tensors: tensors.pop(KEY + part), signed=kind != "peft")
        files.refused(files.ways(kind) | {"inspect": lambda: frodctl.inspect(files.root / kind)}, Q)

    @pytest.mark.parametrize("kind", [*KINDS, "peft"])
    @pytest.mark.parametrize("change", [lambda values: values[:-1], lambda values: torch.cat([values, values])])
    def test_another_number_of_values(self, change: Any, kind: str, files: Files) -> None:
        key = f"{KEY}lambda_s_values"
        files.retrain(kind, lambda tensors: tensors.update({key: change(tensors[key])}), signed=kind != "peft")
        files.refused(files.ways(kind), f"{Q} has .* sparse values for the 51 positions")

    @pytest.mark.parametrize("kind", ["lean", "selected", "over-patterns"])
    def test_without_any_values(self, kind: str, files: Files) -> None:
        """Of all modules of a category."""
        files.retrain(kind, lambda tensors: [tensors.pop(k) for k in list(tensors) if "q_proj.frod_lambda_s" in k])
        if kind == "over-patterns":  # where only the basis file says how many they are
            files.refused(files.ways(kind, "patterns.safetensors"), "51 positions of self_attn_q_proj")
        else:
            files.refused(files.ways(kind), "51 positions of self_attn_q_proj")

    def test_without_where_a_module_began(self, files: Files) -> None:
        files.retrain("self-contained", lambda tensors: tensors.pop(f"{KEY}lambda_0"))
        files.refused(files.ways("self-contained"), "q_proj has no frod_lambda_0")


NUMBERS: list[Any] = [float("nan"), float("inf"), 1e308, -0.1, -1, True, False, "0.05", None, [], 2]
CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"sparsity {number!r}": lambda config, number=number: config["frodctl"]["sparsity"].update(
            self_attn_q_proj=number
        )
        for number in NUMBERS
    },
    **{
        f"seed {seed!r}": lambda config, seed=seed: config["frodctl"].update(seed=seed)
        for seed in (True, 2**64, -(2**63) - 1, 10**400, 1.0, "1", [])
    },
    "no sparsity": lambda config: config["frodctl"].update(sparsity={}),
    "sparsity is a list": lambda config: config["frodctl"].update(sparsity=[1]),
    **{
        f"modules_to_save {value!r}": lambda config, value=value: config.update(modules_to_save=value)
        for value in (7, [""], [7], "norm", {"norm": 1}, ["norm"], [None], True)
    },
    **{
        f"{key} {value!r}": lambda config, key=key, value=value: config["frodctl"].update({key: value})
        for key in ("basis", "base", "pattern", "digests", "categories", "dtype", "head")
        for value in (7, ["x"], {"self_attn_q_proj": 7}, "x")
        if not (key == "head" and isinstance(value, dict))
    },
    "labels": lambda config: config["frodctl"].update(head={"id2label": {"0": 1}}),
    "label numbers": lambda config: config["frodctl"].update(head={"label2id": {"a": "0"}}),
    "architecture": lambda config: config["frodctl"].update(head={"architecture": 1}),
    "basis_file": lambda config: config["frodctl"].update(basis_file=["x"]),
    "version 0": lambda config: config["frodctl"].update(version=0),
    "version true": lambda config: config["frodctl"].update(version=True),
    "version text": lambda config: config["frodctl"].update(version="1"),
    "form": lambda config: config["frodctl"].update(form="sum"),
    "no form": lambda config: config["frodctl"].pop("form"),
    "own is a list": lambda config: config.update(frodctl=[1]),
    "own is a number": lambda config: config.update(frodctl=1),
    "type": lambda config: config.update(peft_type="LORA"),
    "no type": lambda config: config.pop("peft_type"),
    "type is a list": lambda config: config.update(peft_type=["FROD"]),
    "not of frodctl": lambda config: config.pop("frodctl"),
}


@pytest.mark.parametrize("kind", ["lean", "self-contained"])
@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_the_wrong_kind(change: Callable[[dict[str, Any]], Any], kind: str, files: Files) -> None:
    files.edit(kind, change)
    files.refused(files.ways(kind) | {"inspect": lambda: frodctl.inspect(files.root / kind)}, kind)


@pytest.mark.parametrize("field", ["projection_prng_key", "sparse_rate"])
@pytest.mark.parametrize("value", [True, float("nan"), "x", None, 1e308, -1e308, 2**70, [0]])
def test_peft_s_config(field: str, value: Any, files: Files) -> None:
    """Its seed and rate count where it does not hold the pattern."""
    files.retrain("peft", lambda t: [t.pop(k) for k in list(t) if k.startswith(SHARED + "s_")], signed=False)
    files.edit("peft", lambda config: config.update({field: value}))
    ways = files.ways("peft")
    files.refused(
        {way: ways[way] for way in ("merge", "inspect --base", "bridge")}, "projection_prng_key or sparse_rate"
    )


@pytest.mark.parametrize("value", [True, float("nan"), "x", None, 0, -1, float("inf"), []])
def test_peft_s_alpha(value: Any, files: Files) -> None:
    """It counts where V is computed again."""
    files.retrain("peft", lambda t: [t.pop(k) for k in list(t) if k.startswith(SHARED)], signed=False)
    files.edit("peft", lambda config: config.update(regularization_alpha=value))
    merge = lambda: frodctl.merge(  # noqa: E731
        files.root / "base", files.root / "peft", files.root / "out", recompute_projection=True
    )
    files.refused({"merge": merge}, "regularization_alpha")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS, "both"])
def test_a_folder_without_files(missing: str, files: Files) -> None:
    for name in (CONFIG, WEIGHTS) if missing == "both" else (missing,):
        (files.root / "lean" / name).unlink()
    ways = files.ways("lean")
    files.refused({way: ways[way] for way in ("load_adapter", "merge", "bridge")}, "adapter")


def test_a_path_that_is_not_there(files: Files) -> None:
    for read in files.ways("nowhere").values():
        with pytest.raises(FrodctlError, match="nowhere"):
            read()


@pytest.mark.parametrize("earlier", [False, True])
def test_weights_that_cannot_be_read_again_get_no_name(earlier: bool, tmp_path: Path) -> None:
    """They are opened before an adapter that is there is replaced."""
    folder = tmp_path / "adapter"
    tensors = {f"{KEY}lambda_s": np.ones(3, np.float32)}
    provenance = Provenance("delta", {}, {}, None, {}, {}, {}, {})
    if earlier:
        write_adapter(folder, tensors, {"r": 1}, provenance, "card")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InvalidInput, match="1001 characters"):
        write_adapter(folder, {**tensors, "a" * 1001: np.ones(1, np.float32)}, {"r": 2}, provenance, "card")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
