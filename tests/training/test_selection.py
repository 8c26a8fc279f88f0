"""Patterns chosen by the gradient: the largest |Uᵀ (∂L/∂W) V|, kept wherever the adapter goes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MambaForCausalLM

import frodctl
import frodctl.training.peft as bridge
from frodctl.arrays import to_torch
from frodctl.checkpoint.stream import digest
from frodctl.errors import FrodctlError, InvalidInput, OutOfResources, UsageError
from frodctl.training import selection
from frodctl.training.attached import frod_layers
from tests import peft_models
from tests.training.conftest import Case, Cases, labelled, mamba, perturb


def batches(family: str) -> list[dict[str, Tensor]]:
    return [labelled(family, seed) for seed in range(3)]


def exact_scores(case: Case) -> dict[str, Tensor]:
    """Σ over layers and batches of (Uᵀ (∂L/∂W) V)², from the base model's own gradients, in float64."""
    model, basis = case.model().double(), frodctl.open_basis(case.basis)
    scores: dict[str, Tensor] = {}
    for data in batches(case.family):
        model.zero_grad()
        model(**data).loss.backward()
        for record in basis.metadata.modules:
            parameter = next(p for name, p in model.named_parameters() if name.endswith(f"{record.name}.weight"))
            W, G = parameter.detach(), parameter.grad
            W, G = (W.T, G.T) if record.transposed else (W, G)
            V = to_torch(basis.tensor(f"V.{record.category}")).double()
            scales = to_torch(basis.tensor(f"lambda.{record.name}")).double()
            U = W @ torch.linalg.inv(V).T * torch.where(scales > 0, 1 / scales, 0)
            scores[record.category] = scores.get(record.category, torch.zeros(())) + (U.T @ G @ V) ** 2
    return scores


@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_the_largest_gradients(family: str, cases: Cases) -> None:
    case = cases(family)
    found = frodctl.select_pattern(case.attached(), batches(family))
    basis = frodctl.open_basis(case.basis)
    assert set(found) == set(basis.metadata.V_digests)
    for category, score in exact_scores(case).items():
        rows, columns = found[category]
        assert (rows != columns).all()
        assert found[category].shape == basis.indices()[category].shape
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
        rest = score.clone().fill_diagonal_(0)
        rest[rows, columns] = 0
        assert score[rows, columns].min() >= 0.999 * rest.max()


def test_of_a_weight_that_is_read(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of its dt_proj: ∂L/∂W comes back to the weight itself."""
    base, basis = mamba(tmp_path / "mamba")

    def model() -> Any:
        return MambaForCausalLM.from_pretrained(base).eval()

    data = {name: tensor % 64 for name, tensor in labelled("llama").items()}
    attached = frodctl.attach(model(), basis, target_modules="dt_proj", sparsity=0.2)
    (indices,) = frodctl.select_pattern(attached, [data]).values()
    plain, score = model(), torch.zeros(8, 8)
    plain(**data).loss.backward()
    for path, layer in frod_layers(attached).items():
        weight, update = plain.get_submodule(path).weight, layer.update()
        V, D = update.basis.V, update.basis.D
        score += (update.inverse_scales[:, None] * ((weight @ D).T @ weight.grad @ V)).square().detach()
    score.fill_diagonal_(-1)
    rows, columns = indices
    assert len(rows) == 12
    assert score[rows, columns].min() >= 0.999 * score.flatten().sort(descending=True).values[11]


def test_nothing_else_changes(cases: Cases) -> None:
    case = cases("llama")
    model = case.attached()
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frodctl.select_pattern(model, batches("llama"))
    after = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.base_layer._forward_pre_hooks for layer in frod_layers(model).values())
    assert torch.equal(peft_models.logits(model), peft_models.logits(case.model()))
    patterns = {layer.update().basis.category: set() for layer in frod_layers(model).values()}
    for layer in frod_layers(model).values():
        patterns[layer.update().basis.category].add(id(layer.update().pattern))
    assert {len(shared) for shared in patterns.values()} == {1}


def test_a_loss_of_ones_own(cases: Cases) -> None:
    case = cases("bert")

    def loss(model: Any, data: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(input_ids=data["input_ids"]).logits, data["labels"])

    first = frodctl.select_pattern(case.attached(), batches("bert"))
    second = frodctl.select_pattern(case.attached(), iter(batches("bert")), loss=loss)
    assert all(torch.equal(first[category], second[category]) for category in first)


def test_in_16_bit_under_autocast_and_checkpointing(cases: Cases) -> None:
    """Nearly the positions of float32: all but a few of the steepest are the same."""
    exact = frodctl.select_pattern(cases("llama").attached(), batches("llama"))

    def share(found: dict[str, Tensor]) -> float:
        same = total = 0
        for category, indices in found.items():
            known = set(zip(*exact[category].tolist(), strict=True))
            same += len(known & set(zip(*indices.tolist(), strict=True)))
            total += len(known)
        return same / total

    def autocast(model: Any, data: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(**data).loss
            return loss

    checkpointed = cases("llama").attached().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert share(frodctl.select_pattern(checkpointed, batches("llama"))) == 1
    assert share(frodctl.select_pattern(cases("llama").attached(), batches("llama"), loss=autocast)) > 0.8
    half = cases("llama", torch.bfloat16).attached()
    assert share(frodctl.select_pattern(half, batches("llama"))) > 0.8


PROCESS = """
import sys, torch, frodctl
from transformers import LlamaForCausalLM
from tests.training.conftest import labelled
base, basis, store, rank, out = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
model = frodctl.attach(LlamaForCausalLM.from_pretrained(base).eval(), basis)
torch.save(frodctl.select_pattern(model, [labelled("llama", seed=int(rank))]), out)
torch.distributed.barrier()  # who leaves first would take the other along
torch.distributed.destroy_process_group()
"""


def test_processes_choose_together(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama")
    found = [tmp_path / str(rank) for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, case.base, case.basis, tmp_path / "store", str(rank), found[rank]],
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    alone = frodctl.select_pattern(case.attached(), batches("llama")[:2])
    for file in found:
        chosen = torch.load(file)
        assert all(torch.equal(chosen[category], alone[category]) for category in alone)


@pytest.fixture
def selected(cases: Cases) -> Callable[..., tuple[Case, Any]]:
    def make(family: str = "llama", **options: Any) -> tuple[Case, Any]:
        case = cases(family)
        model = case.attached()
        frodctl.select_pattern(model, batches(family), **options)
        perturb(model)
        return case, model

    return make


class TestSaved:
    def test_the_adapter_holds_the_positions(self, selected: Any, tmp_path: Path) -> None:
        case, model = selected("bert")
        expected = peft_models.logits(model)
        frodctl.save_adapter(model, tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert not any(".frod_V." in key for key in stored)
        loaded = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        assert (peft_models.logits(loaded) - expected).abs().max() <= 1e-5
        frodctl.save_adapter(loaded, tmp_path / "again")
        again = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert all(torch.equal(again[key], stored[key]) for key in stored if ".indices." in key)
        assert again.keys() == stored.keys()

    @pytest.mark.parametrize("self_contained", [False, True])
    def test_merged(self, self_contained: bool, selected: Any, tmp_path: Path) -> None:
        case, model = selected()
        frodctl.save_adapter(model, tmp_path / "adapter", self_contained=self_contained)
        basis = {} if self_contained else {"basis": case.basis}
        frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "out", **basis)
        merged = type(case.model()).from_pretrained(tmp_path / "out").eval()
        assert (peft_models.logits(merged) - peft_models.logits(model)).abs().max() <= 1e-5

    def test_plain_peft_refuses_it(self, selected: Any, tmp_path: Path) -> None:
        case, model = selected()
        frodctl.save_adapter(model, tmp_path / "adapter")
        with pytest.raises(KeyError, match="PEFT cannot load this adapter"):
            peft.PeftModel.from_pretrained(case.model(), str(tmp_path / "adapter"))

    def test_the_bridge_loads_it(self, selected: Any, tmp_path: Path) -> None:
        case, model = selected()
        frodctl.save_adapter(model, tmp_path / "adapter")
        loaded = bridge.load(case.model(), tmp_path / "adapter", case.basis)
        assert (peft_models.logits(loaded) - peft_models.logits(model)).abs().max() <= 1e-4

    def test_inspected(self, selected: Any, tmp_path: Path) -> None:
        case, model = selected()
        frodctl.save_adapter(model, tmp_path / "adapter")
        document = frodctl.inspect(
            tmp_path / "adapter", base=str(case.base), basis=str(case.basis), spectrum=True
        ).as_dict()
        changes = [row["delta_frobenius_norm"] for row in document["targets"][0]["tensors"]]
        exact = copy.deepcopy(model)
        frodctl.training.merge_(exact)
        base, merged = dict(case.model().named_parameters()), dict(exact.named_parameters())
        norms = [float((merged[name] - base[name]).norm()) for name in base if not merged[name].equal(base[name])]
        assert sorted(changes) == pytest.approx(sorted(norms), rel=1e-4)


class TestBasisFile:
    def test_written_with_the_positions(self, selected: Any, tmp_path: Path) -> None:
        output = tmp_path / "selected.safetensors"
        case, model = selected(output=output)
        old, new = frodctl.open_basis(case.basis), frodctl.open_basis(output)
        new.verify()
        added = {f"indices.{category}": digest(indices) for category, indices in new.indices().items()}
        assert new.metadata == replace(old.metadata, digests={**old.metadata.digests, **added})
        for name, (spec, _) in old.header.tensors.items():
            assert np.array_equal(new.tensor(name), old.tensor(name)), spec
        again = frodctl.attach(case.model(), output)
        for path, layer in frod_layers(again).items():
            assert torch.equal(layer.update().pattern.indices(), frod_layers(model)[path].update().pattern.indices())
        for category, indices in new.indices().items():
            assert np.array_equal(new.tensor(f"indices.{category}"), indices)
            assert not np.array_equal(indices, old.indices()[category])

    def test_adapters_need_that_file(self, selected: Any, tmp_path: Path) -> None:
        output = tmp_path / "selected.safetensors"
        case, model = selected(output=output)
        frodctl.save_adapter(model, tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert not any("indices" in key for key in stored)
        assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["frodctl"]["seed"] is None
        loaded = frodctl.load_adapter(case.model(), tmp_path / "adapter", output)
        assert (peft_models.logits(loaded) - peft_models.logits(model)).abs().max() <= 1e-5
        frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", basis=output)
        merged = type(case.model()).from_pretrained(tmp_path / "out").eval()
        assert (peft_models.logits(merged) - peft_models.logits(model)).abs().max() <= 1e-5

    def test_adapters_refuse_another_file_of_the_same_basis(self, selected: Any, tmp_path: Path) -> None:
        case, model = selected(output=tmp_path / "selected.safetensors")
        adapter, unselected = tmp_path / "adapter", case.basis
        frodctl.save_adapter(model, adapter)
        for use in (
            lambda: frodctl.load_adapter(case.model(), adapter, unselected),
            lambda: bridge.load(case.model(), adapter, unselected),
            lambda: frodctl.merge(case.base, adapter, tmp_path / "out", basis=unselected),
            lambda: frodctl.inspect(adapter, base=case.base, basis=unselected),
        ):
            with pytest.raises(InvalidInput, match=r"positions of \w+ are not those .* trained at"):
                use()
        assert not (tmp_path / "out").exists()

    def test_an_existing_file_is_kept_unless_forced(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        own = tmp_path / "basis.safetensors"
        own.write_bytes(case.basis.read_bytes())
        with pytest.raises(UsageError, match="exists"):
            frodctl.select_pattern(case.attached(), batches("llama"), output=own)
        assert own.read_bytes() == case.basis.read_bytes()
        model = case.attached()
        found = frodctl.select_pattern(model, batches("llama"), output=own, force=True)
        stored = frodctl.open_basis(own).indices()
        assert all(np.array_equal(stored[category], found[category]) for category in found)
        assert [path.name for path in tmp_path.iterdir()] == [own.name]

    def test_what_is_read_and_what_belongs_to_a_model_is_kept(self, cases: Cases, tmp_path: Path) -> None:
        """Its own basis file by whatever path, and the names of weights beside a config."""
        case = cases("llama")
        own = tmp_path / "basis.safetensors"
        own.write_bytes(case.basis.read_bytes())
        os.link(own, tmp_path / "hard-link.safetensors")
        (tmp_path / "link.safetensors").symlink_to(own)
        (tmp_path / "folder").symlink_to(tmp_path)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        model = frodctl.attach(case.model(), own)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for name, force in itertools.product(
            ("basis.safetensors", "hard-link.safetensors", "link.safetensors", "folder/basis.safetensors",
             "model/../basis.safetensors", "model/model.safetensors", "model/adapter_model.safetensors", "basis.st"),
            (False, True),
        ):  # fmt: skip
            with pytest.raises(UsageError):
                frodctl.select_pattern(model, batches("llama"), output=tmp_path / name, force=force)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_another_sparsity(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = case.attached(sparsity=0.2)
        found = frodctl.select_pattern(model, batches("llama"), output=tmp_path / "selected.safetensors")
        opened = frodctl.open_basis(tmp_path / "selected.safetensors")
        assert set(opened.metadata.sparsity.values()) == {0.2}
        assert {indices.shape[1] for indices in found.values()} == {32 * 32 // 5, 80 * 80 // 5}


class TestRefused:
    def test_after_training(self, cases: Cases) -> None:
        with pytest.raises(UsageError, match="right after attach"):
            frodctl.select_pattern(cases("llama").trained(), batches("llama"))

    def test_without_batches(self, cases: Cases) -> None:
        with pytest.raises(UsageError, match="no batch"):
            frodctl.select_pattern(cases("llama").attached(), [])

    def test_one_batch_instead_of_several(self, cases: Cases) -> None:
        with pytest.raises(UsageError, match="list"):
            frodctl.select_pattern(cases("llama").attached(), labelled("llama"))

    def test_a_batch_without_labels(self, cases: Cases) -> None:
        batch = labelled("llama")
        del batch["labels"]
        model = cases("llama").attached()
        with pytest.raises(UsageError, match=r"NoneType, not a scalar .* labels"):
            frodctl.select_pattern(model, [batch])
        with pytest.raises(UsageError, match=r"shape \[.*`loss`"):
            frodctl.select_pattern(model, [batch], loss=lambda m, b: m(**b).logits)
        with pytest.raises(UsageError, match=r"shape \[\], not a scalar with a gradient"):
            frodctl.select_pattern(model, [batch], loss=lambda m, b: m(**b).logits.detach().sum())
        frodctl.select_pattern(model, [batch], loss=lambda m, b: m(**b).logits.square().mean())

    def test_a_loss_that_is_not_finite(self, cases: Cases) -> None:
        model = cases("llama").attached()
        before = {path: layer.update().pattern for path, layer in frod_layers(model).items()}
        with pytest.raises(InvalidInput, match="NaN"):
            frodctl.select_pattern(model, batches("llama"), loss=lambda m, b: m(**b).loss * float("nan"))
        assert all(frod_layers(model)[path].update().pattern is pattern for path, pattern in before.items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_whatever_is_given(self, cases: Cases, tmp_path: Path) -> None:
        """A `FrodctlError`, and the model and its optimizer's parameters are as they were."""
        model = cases("llama").attached()
        before = {path: layer.update().pattern for path, layer in frod_layers(model).items()}
        right = {"output": (None, "x"), "force": (True,)}
        mistakes = (
            None, 1.5, -1, float("nan"), True, "x", "", b"", b"x", [], [None], ["x"], [1], {}, {"x": 1}, object(),
        )  # fmt: skip
        for parameter in ("batches", "loss", "output", "force"):
            for value in mistakes:
                if any(value is good for good in right.get(parameter, ())):
                    continue
                given = {"batches": batches("llama"), parameter: value}
                with pytest.raises(FrodctlError, match="batch" if parameter == "batches" else f"`{parameter}`"):
                    frodctl.select_pattern(model, **given)
                assert all(frod_layers(model)[path].update().pattern is pattern for path, pattern in before.items())
                assert not any(layer.base_layer._forward_pre_hooks for layer in frod_layers(model).values())
                assert not any("weight" in layer.update().__dict__ for layer in frod_layers(model).values())

    def test_a_full_disk(self, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The pattern is exchanged once its file is there."""

        def full(*_: Any, **__: Any) -> None:
            raise OutOfResources("no space left")

        monkeypatch.setattr(selection, "write_patterns", full)
        model = cases("llama").attached()
        before = {path: layer.update().pattern for path, layer in frod_layers(model).items()}
        with pytest.raises(OutOfResources):
            frodctl.select_pattern(model, batches("llama"), output=tmp_path / "out.safetensors")
        assert all(frod_layers(model)[path].update().pattern is pattern for path, pattern in before.items())

    def test_without_an_adapter(self, cases: Cases) -> None:
        with pytest.raises(UsageError, match="attach first"):
            frodctl.select_pattern(cases("llama").model(), batches("llama"))
