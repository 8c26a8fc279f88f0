"""Saved adapters: taken up again, merged, refused where they do not belong, and resumed by transformers' Trainer."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import frodctl
from frodctl import training
from frodctl.arrays import to_torch
from frodctl.checkpoint import files
from frodctl.errors import FrodctlError, InvalidInput, OutOfResources, UsageError
from frodctl.jobs.progress import Progress
from frodctl.training import peft as bridge
from frodctl.training.attached import attachment_of
from frodctl.training.layer import FrodLinear
from tests import peft_models
from tests.conftest import snapshot
from tests.jobs.test_merge import sign
from tests.training.conftest import Case, Cases, labelled, perturb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def logits(model: Any) -> torch.Tensor:
    return peft_models.logits(model.eval())


def config(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return value


def edit(folder: Path, **changes: Any) -> None:
    value = config(folder)
    value["frodctl"].pop("digest", None)
    for key, change in changes.items():
        value["frodctl"][key] = change
    (folder / CONFIG).write_text(json.dumps(value))


def saved(case: Case, folder: Path, **options: Any) -> Any:
    """The live model; its adapter is in the folder."""
    model = case.trained()
    frodctl.save_adapter(model, folder, **options)
    return model


@pytest.mark.parametrize("family", peft_models.FAMILIES)
class TestEveryFamily:
    def test_loading(self, family: str, cases: Cases, tmp_path: Path) -> None:
        case = cases(family)
        model = saved(case, tmp_path / "adapter")
        fresh = case.model()
        assert (logits(fresh) - logits(model)).norm() > 0.02 * logits(model).norm()
        assert frodctl.load_adapter(fresh, tmp_path / "adapter", case.basis) is fresh
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5

    @pytest.mark.parametrize("self_contained", [False, True])
    def test_merging(self, family: str, self_contained: bool, cases: Cases, tmp_path: Path) -> None:
        case = cases(family)
        model = saved(case, tmp_path / "adapter", self_contained=self_contained)
        basis = {} if self_contained else {"basis": case.basis}
        result = frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", **basis)
        assert result.plan.sources[0].form == "delta"
        auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
        merged, loading = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
        assert (logits(merged) - logits(model)).abs().max() <= 1e-5

    def test_untrained_it_merges_to_the_base(self, family: str, cases: Cases, tmp_path: Path) -> None:
        case = cases(family, torch.bfloat16)
        model = case.attached()
        frodctl.save_adapter(model, tmp_path / "adapter")
        result = frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", basis=case.basis)
        assert len(result.unchanged) == len(result.plan.weights) >= 12

    def test_going_on_with_the_optimizer_s_state(self, family: str, cases: Cases, tmp_path: Path) -> None:
        """The same losses as without the interruption."""
        case = cases(family)

        def steps(model: Any, optimizer: Any, count: range) -> list[float]:
            losses = []
            for number in count:
                loss = model(**labelled(family, seed=number)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            return losses

        def optimizer_of(model: Any) -> Any:
            groups = frodctl.parameter_groups(model, rho_lambda=0.01, rho_sparse=0.01, lr=1e-3)
            return torch.optim.AdamW(groups)

        model = case.attached().eval()
        optimizer = optimizer_of(model)
        before = steps(model, optimizer, range(3))
        frodctl.save_adapter(model, tmp_path / "adapter")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        expected = steps(model, optimizer, range(3, 8))
        fresh = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis).eval()
        resumed = optimizer_of(fresh)
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        found = steps(fresh, resumed, range(3, 8))
        assert abs(expected[0] - before[0]) > 1e-3
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-6


class TestTheFiles:
    def test_small_by_default(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = saved(case, tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        layers = {path: module for path, module in model.named_modules() if isinstance(module, FrodLinear)}
        expected = {f"base_model.model.{p}.frod_{w}" for p in layers for w in ("lambda_l", "lambda_s_values")}
        assert set(tensors) == expected
        opened = frodctl.open_basis(case.basis)
        for path, layer in layers.items():
            update = layer.update()
            assert update is not None
            exact = to_torch(opened.tensor(f"lambda.{path}")).double() + update.delta.detach().double()
            assert torch.equal(tensors[f"base_model.model.{path}.frod_lambda_l"], exact.float())
            assert torch.equal(tensors[f"base_model.model.{path}.frod_lambda_s_values"], update.values)

    def test_self_contained(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("gpt2", torch.bfloat16)
        saved(case, tmp_path / "adapter", self_contained=True)
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        opened = frodctl.open_basis(case.basis)
        for category, indices in opened.indices().items():
            V = to_torch(opened.tensor(f"V.{category}"))
            assert tensors[f"base_model.frod_V.{category}"].dtype == V.dtype
            assert torch.equal(tensors[f"base_model.frod_V.{category}"], V)
            assert torch.equal(tensors[f"base_model.frod_s_indices.{category}"], to_torch(indices))
            assert tensors[f"base_model.frod_s_size.{category}"].tolist() == [len(V)] * 2
        name = "transformer.h.0.attn.c_attn"
        assert torch.equal(tensors[f"base_model.model.{name}.frod_lambda_0"], to_torch(opened.tensor(f"lambda.{name}")))

    def test_the_config(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        saved(case, tmp_path / "adapter")
        found, opened = config(tmp_path / "adapter"), frodctl.open_basis(case.basis)
        assert found["peft_type"].startswith("frodctl")
        assert found["base_model_name_or_path"] == str(case.base)
        assert found["task_type"] == "SEQ_CLS"
        assert found["save_projection"] is True
        assert found["modules_to_save"] == ["classifier"]
        assert (found["projection_prng_key"], found["sparse_rate"]) == (3, 0.05)
        own = found["frodctl"]
        assert own["form"] == "delta"
        assert own["basis"] == opened.metadata.V_digests
        assert own["base"] == {record.name: record.digest for record in opened.metadata.modules}
        assert (own["seed"], own["sparsity"]) == (3, dict(opened.metadata.sparsity))
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert str(tmp_path) not in card

    def test_the_card_of_a_base_whose_name_is_not_plain_yaml(self, tmp_path: Path) -> None:
        base = peft_models.save_base(tmp_path / "no: 'b' # \"é\"\n- c", "gpt2", torch.float32)
        frodctl.decompose(base, tmp_path / "b.safetensors", target_modules="c_attn")
        model = frodctl.attach(peft_models.task_model("gpt2", base), tmp_path / "b.safetensors")
        frodctl.save_adapter(model, tmp_path / "adapter")
        fields = {"library_name": "frodctl", "base_model": base.name, "tags": ["frod"]}
        assert metadata_load(tmp_path / "adapter" / "README.md") == fields

    @pytest.mark.parametrize("says", [True, False, None])
    @pytest.mark.parametrize("self_contained", [False, True])
    def test_plain_peft_refuses_it(self, self_contained: bool, says: bool | None, cases: Cases, tmp_path: Path) -> None:
        """Every way of PEFT's and transformers' to load it, whatever it says of save_projection."""
        case, folder = cases("llama"), tmp_path / "adapter"
        saved(case, folder, self_contained=self_contained)
        value = config(folder)
        assert value.pop("save_projection") is True
        (folder / CONFIG).write_text(json.dumps(value | ({} if says is None else {"save_projection": says})))
        for load in (
            lambda: peft.PeftConfig.from_pretrained(folder),
            lambda: peft.FrodConfig.from_pretrained(folder),
            lambda: peft.PeftModel.from_pretrained(case.model(), folder),
            lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
            lambda: case.model().load_adapter(str(folder)),
            lambda: AutoModelForCausalLM.from_pretrained(folder),
        ):
            with pytest.raises(KeyError, match=r"PEFT cannot load this adapter; load it with frodctl\.load_adapter"):
                load()

    @pytest.mark.parametrize("options", [
        {"target_modules": "q_proj,down_proj"},
        {"target_modules": "q_proj", "seed": 11},
        {"sparsity": 0.2},
        {"sparsity": {"mlp_up_proj": 0.0}},
        {"seed": 5, "sparsity": {"mlp_up_proj": 0.3, "mlp_down_proj": 0.001}},
    ])  # fmt: skip
    def test_other_targets_and_patterns(self, options: dict[str, Any], cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = case.trained(**options)
        frodctl.save_adapter(model, tmp_path / "adapter")
        fresh = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5
        frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", basis=case.basis)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (logits(merged) - logits(model)).abs().max() <= 1e-5

    def test_several_adapters(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = case.trained()
        frodctl.attach(model, case.basis, adapter_name="second", target_modules="up_proj")
        perturb(model, seed=9)
        assert frodctl.save_adapter(model, tmp_path, adapter_name="default") == tmp_path
        assert frodctl.save_adapter(model, tmp_path) == tmp_path / "second"
        with pytest.raises(UsageError, match="default, second"):
            frodctl.save_adapter(model, tmp_path, adapter_name="third")
        fresh = frodctl.load_adapter(case.model(), tmp_path, case.basis)
        frodctl.load_adapter(fresh, tmp_path, case.basis, adapter_name="second")
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5
        for name in ("default", "second"):
            training.set_adapter(fresh, name)
            training.set_adapter(model, name)
            assert (logits(fresh) - logits(model)).abs().max() <= 1e-5
            out = tmp_path.with_name(f"{tmp_path.name}-{name}")
            frodctl.merge(str(case.base), str(tmp_path), out, basis=case.basis, adapter_name=name)
            merged = AutoModelForCausalLM.from_pretrained(out)
            assert (logits(merged) - logits(model)).abs().max() <= 1e-5

    @pytest.mark.filterwarnings("ignore")
    def test_names_without_what_is_wrapped_around_modules(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        model = case.trained()
        frodctl.save_adapter(model, tmp_path / "plain")
        compiled = torch.compile(model, backend="aot_eager").state_dict()
        assert all(name.startswith("_orig_mod.") for name in compiled)
        model.save_pretrained(tmp_path / "compiled", state_dict=compiled)
        blocks = model.bert.encoder.layer
        for number, block in enumerate(blocks):
            blocks[number] = checkpoint_wrapper(block)
        assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
        frodctl.save_adapter(model, tmp_path / "wrapped")
        model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
        expected = (tmp_path / "plain" / WEIGHTS).read_bytes()
        for way in ("compiled", "wrapped", "state"):
            assert (tmp_path / way / WEIGHTS).read_bytes() == expected
        states = [load_file(tmp_path / way / "model.safetensors") for way in ("compiled", "state")]
        assert states[0]
        assert states[0].keys() == states[1].keys()

    def test_saving_again_keeps_other_files(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = saved(case, tmp_path / "adapter")
        (tmp_path / "adapter" / "notes.txt").write_text("mine")
        (tmp_path / "adapter" / "README.md").write_text("mine")
        perturb(model, seed=12)
        frodctl.save_adapter(model, tmp_path / "adapter")
        fresh = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert files == {CONFIG, WEIGHTS, "README.md", "notes.txt"}
        assert (tmp_path / "adapter" / "README.md").read_text() == "mine"

    @pytest.mark.parametrize("cut", range(7))
    def test_a_cut_leaves_no_mixture(
        self, cut: int, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever saving over an adapter ends, a reader finds the old one, the new one, or none."""
        case = cases("llama")
        model = saved(case, tmp_path / "adapter")
        (tmp_path / "adapter" / "README.md").unlink()
        old = logits(model)
        perturb(model, seed=12)
        count = iter(range(99))

        def cutting(step: Callable[..., None]) -> Callable[..., None]:
            def cut_or_go_on(*arguments: Any) -> None:
                if next(count) == cut:
                    raise KeyboardInterrupt
                step(*arguments)

            return cut_or_go_on

        monkeypatch.setattr(files, "fsync", cutting(files.fsync))  # once for each file and for the folder, and then
        monkeypatch.setattr(files, "replace", cutting(files.replace))
        with pytest.raises(KeyboardInterrupt):
            frodctl.save_adapter(model, tmp_path / "adapter")
        assert not list((tmp_path / "adapter").glob("*.tmp"))
        try:
            fresh = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        except InvalidInput:
            assert cut >= 3
            return
        assert cut < 3
        assert (logits(fresh) - old).abs().max() <= 1e-5

    def test_a_place_that_cannot_be_a_folder(self, cases: Cases, tmp_path: Path) -> None:
        model = cases("llama").trained()
        (tmp_path / "file").write_text("mine")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "occupied" / CONFIG).mkdir(parents=True)
        before = snapshot(tmp_path)
        for place in ("file", "file/inner", "file/a/b", "fifo", "occupied"):
            with pytest.raises(UsageError, match=place.split("/")[0]):
                frodctl.save_adapter(model, tmp_path / place)
        assert snapshot(tmp_path) == before

    def test_a_full_disk_leaves_nothing(self, cases: Cases, tmp_path: Path) -> None:
        """A limit on the size of files stands for it."""
        model = cases("llama").trained()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
            with pytest.raises(OutOfResources, match="nothing was left"):
                frodctl.save_adapter(model, tmp_path / "a" / "adapter")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", [{"peft_type": "LORA"}, {"peft_type": "FROD"}])
    def test_another_adapter_stays(self, value: dict[str, Any], cases: Cases, tmp_path: Path) -> None:
        (tmp_path / CONFIG).write_text(json.dumps(value))
        (tmp_path / WEIGHTS).write_text("precious")
        before = snapshot(tmp_path)
        with pytest.raises(UsageError, match="not frodctl's"):
            frodctl.save_adapter(cases("llama").trained(), tmp_path)
        assert snapshot(tmp_path) == before

    def test_what_has_diverged_is_not_saved(self, cases: Cases, tmp_path: Path) -> None:
        model = cases("llama").attached()
        next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")
        with pytest.raises(InvalidInput, match="holds NaN or Inf; training has diverged"):
            frodctl.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_nothing_attached(self, cases: Cases, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no adapter is attached"):
            frodctl.save_adapter(cases("llama").model(), tmp_path / "adapter")


class TestWithoutABasisFile:
    """The basis is in the adapter itself, or found by its digests."""

    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_self_contained(self, family: str, cases: Cases, tmp_path: Path) -> None:
        case = cases(family)
        model = saved(case, tmp_path / "adapter", self_contained=True)
        fresh = frodctl.load_adapter(case.model(), tmp_path / "adapter")
        over_file = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        assert torch.equal(logits(fresh), logits(over_file))
        records, whole = (attachment_of(m).adapters["default"].modules for m in (fresh, over_file))
        assert {p: r.shape for p, r in records.items()} == {p: r.shape for p, r in whole.items()}
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5

    @pytest.mark.parametrize("options", [{}, {"seed": 11, "target_modules": "q_proj"}, {"sparsity": 0.0}])
    def test_saved_again(self, options: dict[str, Any], cases: Cases, tmp_path: Path) -> None:
        """Over itself, and on from there: as there is no file, it holds its basis again."""
        case = cases("llama", torch.bfloat16)
        model = case.trained(**options)
        frodctl.save_adapter(model, tmp_path / "adapter", self_contained=True)
        before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
        again = frodctl.load_adapter(case.model(), tmp_path / "adapter")
        frodctl.save_adapter(again, tmp_path / "adapter")
        assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
        perturb(again, seed=12)
        frodctl.save_adapter(again, tmp_path / "adapter")
        frodctl.save_adapter(again, tmp_path / "other")
        fresh = frodctl.load_adapter(case.model(), tmp_path / "other")
        assert (logits(fresh) - logits(again)).norm() < 0.01 * logits(again).norm()  # δ = λ' − λ but for its last bits
        frodctl.save_adapter(fresh, tmp_path / "third")
        assert (tmp_path / "third" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()
        frodctl.merge(case.base, tmp_path / "other", tmp_path / "out")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert (logits(merged) - logits(again)).norm() < 0.05 * logits(again).norm()

    def test_its_file_is_gone(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter", self_contained=True)
        model = frodctl.load_adapter(case.model(), tmp_path / "adapter")
        frodctl.save_adapter(case.trained(), tmp_path / "adapter")
        with pytest.raises(InvalidInput, match="is no longer there"):
            frodctl.save_adapter(model, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_patterns_need_the_file(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        frodctl.save_adapter(case.attached(), tmp_path / "adapter", self_contained=True)
        model = frodctl.load_adapter(case.model(), tmp_path / "adapter")
        with pytest.raises(UsageError, match="with the basis file"):
            frodctl.select_pattern(model, [labelled("llama")], output=tmp_path / "patterns.safetensors")
        frodctl.select_pattern(model, [labelled("llama")])
        perturb(model)
        frodctl.save_adapter(model, tmp_path / "selected")
        fresh = frodctl.load_adapter(case.model(), tmp_path / "selected")
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5

    @pytest.mark.parametrize("place", ["run/adapter/x.safetensors", "run/renamed.safetensors", "basis.safetensors"])
    def test_found_near_it(self, place: str, cases: Cases, tmp_path: Path) -> None:
        """In its folder, in the one above, and where it was as the adapter was saved (two up)."""
        case = cases("llama")
        shutil.copy(case.basis, tmp_path / "basis.safetensors")
        model = frodctl.attach(case.model(), tmp_path / "basis.safetensors")
        perturb(model)
        frodctl.save_adapter(model, tmp_path / "run" / "adapter")
        assert config(tmp_path / "run" / "adapter")["frodctl"]["basis_file"] == "../../basis.safetensors"
        (tmp_path / "basis.safetensors").rename(tmp_path / place)
        self.every_way(case, tmp_path / "run" / "adapter", logits(model))

    def every_way(self, case: Case, folder: Path, expected: torch.Tensor) -> None:
        near = "takes its basis, by its digests, from"
        with pytest.warns(UserWarning, match=near):
            fresh = frodctl.load_adapter(case.model(), folder)
        assert (logits(fresh) - expected).abs().max() <= 1e-5
        said: list[Progress] = []
        out = folder.with_name("out")
        frodctl.merge(case.base, folder, out, progress=said.append)
        assert any(near in report.text for report in said)
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert (logits(merged) - expected).abs().max() <= 1e-5
        said.clear()
        rows = frodctl.inspect(folder, base=str(case.base), progress=said.append).targets[0].rows
        assert all(row.values["scales_change_norm"] > 0 for row in rows)
        assert any(near in report.text for report in said)
        with pytest.warns(UserWarning, match=near):
            loaded = bridge.load(case.model(), folder)
        assert (logits(loaded) - expected).abs().max() <= 1e-4

    @pytest.mark.parametrize("self_contained", [True, False])
    def test_nothing_is_said_of_a_basis_that_is_given_or_its_own(
        self, self_contained: bool, cases: Cases, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        case = cases("llama")
        frodctl.save_adapter(frodctl.attach(case.model(), case.basis), tmp_path, self_contained=self_contained)
        basis = None if self_contained else case.basis
        frodctl.load_adapter(case.model(), tmp_path, basis)
        bridge.load(case.model(), tmp_path, basis)
        assert not [warning for warning in recwarn if "digest" in str(warning.message)]

    def test_found_in_the_working_directory(
        self, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the name that was recorded, where the way from the adapter is long."""
        case = cases("llama")
        deep = tmp_path / "a" / "b" / "c" / "adapter"
        shutil.copy(case.basis, tmp_path / "basis.safetensors")
        model = frodctl.attach(case.model(), tmp_path / "basis.safetensors")
        frodctl.save_adapter(model, deep)
        assert config(deep)["frodctl"]["basis_file"] == "basis.safetensors"
        monkeypatch.chdir(tmp_path)
        frodctl.load_adapter(case.model(), deep)
        monkeypatch.chdir(tmp_path / "a")
        with pytest.raises(InvalidInput, match=r"no file with the digests .* is near it; give .*`basis`"):
            frodctl.load_adapter(case.model(), deep)

    def test_never_by_its_name(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        frodctl.decompose(case.base, tmp_path / "basis.safetensors", target_modules="all-linear")
        model = frodctl.attach(case.model(), tmp_path / "basis.safetensors")
        frodctl.save_adapter(model, tmp_path / "adapter")
        frodctl.decompose(case.base, tmp_path / "basis.safetensors", target_modules="all-linear", alpha=0.1, force=True)
        for read in (
            lambda: frodctl.load_adapter(case.model(), tmp_path / "adapter"),
            lambda: frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "out"),
            lambda: frodctl.inspect(tmp_path / "adapter", base=str(case.base)),
            lambda: bridge.load(case.model(), tmp_path / "adapter"),
        ):
            with pytest.raises(InvalidInput, match=r"\(`basis`\)$"):
                read()

    def test_the_one_with_its_positions(self, cases: Cases, tmp_path: Path) -> None:
        """Of two files with the same V."""
        case = cases("llama")
        shutil.copy(case.basis, tmp_path / "a.safetensors")
        model = frodctl.attach(case.model(), tmp_path / "a.safetensors")
        frodctl.select_pattern(model, [labelled("llama")], output=tmp_path / "b.safetensors")
        perturb(model)
        frodctl.save_adapter(model, tmp_path / "adapter")
        edit(tmp_path / "adapter", basis_file="a.safetensors")
        self.every_way(case, tmp_path / "adapter", logits(model))

    def test_damaged_neighbours_are_passed_over(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        model = saved(case, tmp_path / "adapter")
        edit(tmp_path / "adapter", basis_file="/")
        (tmp_path / "a.safetensors").write_bytes(b"{")
        (tmp_path / "b.safetensors").mkdir()
        (tmp_path / "c.safetensors").symlink_to("nowhere")
        save_file({"x": torch.ones(1)}, tmp_path / "d.safetensors", {"frodctl": "{}"})
        shutil.copy(case.basis, tmp_path / "e.safetensors")
        self.every_way(case, tmp_path / "adapter", logits(model))


WRONG: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), "", "\ud800", "a\0b", b"x", 1j, [], [None], {}, {"a": 1}, object(),
]  # fmt: skip


class TestEveryParameterGivenEveryWrongValue:
    """Either it is read, or refused by an error of ours that is one line."""

    def test_loading(self, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter", self_contained=True)
        monkeypatch.chdir(tmp_path)
        for parameter in ("model", "folder", "basis", "dropout", "adapter_name"):
            for value in [*WRONG, "nowhere", tmp_path]:
                right = {"model": case.model(), "folder": tmp_path / "adapter", "basis": case.basis}
                self.check(frodctl.load_adapter, right, parameter, value)

    def test_saving(self, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = cases("llama").attached()
        monkeypatch.chdir(tmp_path)
        for parameter in ("model", "folder", "adapter_name", "self_contained", "state_dict"):
            for value in [*WRONG, "other"]:
                right = {"model": model, "folder": tmp_path / "adapter"}
                self.check(frodctl.save_adapter, right, parameter, value)

    def check(self, function: Any, right: dict[str, Any], parameter: str, value: Any) -> None:
        error: Exception | None = None
        try:
            function(**right | {parameter: value})
        except Exception as raised:
            error = raised
        assert error is None or isinstance(error, FrodctlError), (parameter, value, error)
        assert "\n" not in str(error), (parameter, value)
        if value is WRONG[-1] and parameter != "model":
            assert f"`{parameter}`" in str(error)


class TestLabels:
    """What a classifier's labels are called is the adapter's to say, and the merged model's config says it too."""

    def trained(self, case: Case, folder: Path, **labels: Any) -> Any:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(case.base, **labels)
        model = frodctl.attach(model, case.basis, modules_to_save=["classifier"])
        perturb(model)
        frodctl.save_adapter(model, folder)
        return model

    def test_merged(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
        model = self.trained(case, tmp_path / "adapter", **names, problem_type="single_label_classification")
        head = config(tmp_path / "adapter")["frodctl"]["head"]
        assert head["architecture"] == "BertForSequenceClassification"
        frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "out", basis=case.basis)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert merged.config.id2label == names["id2label"]
        assert merged.config.label2id == names["label2id"]
        assert merged.config.problem_type == "single_label_classification"
        assert (logits(merged) - logits(model)).abs().max() <= 1e-5

    def test_over_a_base_with_others(self, cases: Cases, tmp_path: Path) -> None:
        """As many, of other names: a classifier that is trained for something else."""
        case = cases("bert")
        self.trained(case, tmp_path / "one", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        frodctl.merge(case.base, tmp_path / "one", tmp_path / "base", basis=case.basis)
        frodctl.decompose(tmp_path / "base", tmp_path / "b.safetensors", target_modules="query")
        other = Case("bert", tmp_path / "base", tmp_path / "b.safetensors")
        self.trained(other, tmp_path / "two", id2label={0: "cold", 1: "warm"}, label2id={"cold": 0, "warm": 1})
        frodctl.merge(tmp_path / "base", tmp_path / "two", tmp_path / "out")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found["id2label"] == {"0": "cold", "1": "warm"}

    def test_the_class_alone_for_a_language_model(self, cases: Cases, tmp_path: Path) -> None:
        saved(cases("llama"), tmp_path / "adapter")
        assert config(tmp_path / "adapter")["frodctl"]["head"] == {"architecture": "LlamaForCausalLM"}


class TestSavedModules:
    """What is listed as trained as a whole is there, whole."""

    def test_of_two_adapters(self, cases: Cases, tmp_path: Path) -> None:
        """Each with a head of its own, also where one of them is on the model already."""
        case = cases("bert")
        model = saved(case, tmp_path / "one")
        first = logits(model)
        perturb(model, seed=9)
        frodctl.save_adapter(model, tmp_path / "two")
        fresh = frodctl.load_adapter(case.model(), tmp_path / "one", case.basis)
        frodctl.load_adapter(fresh, tmp_path / "two", case.basis, adapter_name="two")
        assert (logits(fresh) - logits(model)).abs().max() <= 1e-5
        training.set_adapter(fresh, "default")
        assert (logits(fresh) - first).abs().max() <= 1e-5

    @pytest.mark.parametrize("missing", ["classifier.weight", "classifier.bias"])
    def test_without_a_tensor(self, missing: str, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        saved(case, tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        del tensors[f"base_model.model.{missing}"]
        save_file(tensors, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
        with pytest.raises(InvalidInput, match=missing.replace(".", r"\.")):
            frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
        sign(tmp_path / "adapter")
        model = case.model()
        with pytest.raises(InvalidInput, match=missing.replace(".", r"\.")):
            frodctl.load_adapter(model, tmp_path / "adapter", case.basis)
        assert not any(isinstance(module, FrodLinear) for module in model.modules())

    def test_without_any(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        saved(case, tmp_path / "adapter")
        tensors = {k: t for k, t in load_file(tmp_path / "adapter" / WEIGHTS).items() if "classifier" not in k}
        save_file(tensors, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
        sign(tmp_path / "adapter")
        for read in (
            lambda: frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis),
            lambda: frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "out", basis=case.basis),
        ):
            with pytest.raises(InvalidInput, match="classifier was trained as a whole"):
                read()


class TestWhatDoesNotBelongTogether:
    def refused(self, case: Case, folder: Path, message: str, basis: Path | None = None) -> None:
        model = case.model()
        with pytest.raises(InvalidInput, match=message):
            frodctl.load_adapter(model, folder, basis or case.basis)
        assert not any(isinstance(module, FrodLinear) for module in model.modules())

    def test_another_basis(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        other = tmp_path / "other.safetensors"
        frodctl.decompose(str(case.base), other, target_modules="all-linear", alpha=0.1)
        self.refused(case, tmp_path / "adapter", r"V\.\w+ is not the one", other)

    def test_another_base(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        base = config(tmp_path / "adapter")["frodctl"]["base"]
        edit(tmp_path / "adapter", base=base | {next(iter(base)): "sha256:0"})
        self.refused(case, tmp_path / "adapter", "trained on another base")

    def test_another_live_model(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        model = case.model()
        model.model.layers[2].mlp.up_proj.weight.data.mul_(1.05)
        with pytest.raises(InvalidInput, match=r"layers\.2\.mlp\.up_proj: its weight is not the one"):
            frodctl.load_adapter(model, tmp_path / "adapter", case.basis)

    def test_other_scales(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter", self_contained=True)
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        tensors["base_model.model.model.layers.0.mlp.up_proj.frod_lambda_0"][0] += 1
        save_file(tensors, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
        sign(tmp_path / "adapter")
        self.refused(case, tmp_path / "adapter", "began at other scales")

    def test_peft_s_own(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        peft_models.trained_adapter(tmp_path / "adapter", "llama", case.base)
        self.refused(case, tmp_path / "adapter", "not trained by frodctl")

    def test_nan(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        tensors["base_model.model.model.layers.0.mlp.up_proj.frod_lambda_s_values"][0] = float("inf")
        save_file(tensors, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
        sign(tmp_path / "adapter")
        self.refused(case, tmp_path / "adapter", "holds NaN or Inf")

    def test_another_number_of_values(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        rates = config(tmp_path / "adapter")["frodctl"]["sparsity"]
        edit(tmp_path / "adapter", sparsity=dict.fromkeys(rates, 0.2))
        self.refused(case, tmp_path / "adapter", "320 sparse values for the 1280 positions")

    def test_a_head_of_another_size(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        saved(case, tmp_path / "adapter")
        model = AutoModelForSequenceClassification.from_pretrained(case.base, num_labels=5)
        with pytest.raises(InvalidInput, match=r"classifier\.bias is \[3\], but .* is \[5\]"):
            frodctl.load_adapter(model, tmp_path / "adapter", case.basis)

    def test_no_head_there(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        saved(case, tmp_path / "adapter")
        model = AutoModel.from_pretrained(case.base)
        with pytest.raises(InvalidInput, match=r"classifier\.bias matches nothing, or several things, in BertModel"):
            frodctl.load_adapter(model, tmp_path / "adapter", case.basis)


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in labelled("bert", seed=index, rows=1).items()}


class TestTrainer:
    """transformers' Trainer: its checkpoints are adapters, and training resumes from them exactly."""

    def trainer(self, case: Case, out: Path, **options: Any) -> Any:
        torch.manual_seed(0)
        model = case.attached()
        arguments = TrainingArguments(
            output_dir=str(out), max_steps=8, save_steps=4, logging_steps=1, per_device_train_batch_size=4,
            learning_rate=5e-3, report_to=[], use_cpu=True, disable_tqdm=True, seed=1, **options,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, rho_lambda=0.01, rho_sparse=0.01, lr=5e-3))
        data = Examples()
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None))

    def test_a_checkpoint_is_an_adapter(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        trainer = self.trainer(case, tmp_path / "run")
        trainer.train()
        folder = tmp_path / "run" / "checkpoint-8"
        names = {path.name for path in folder.iterdir()}
        assert {CONFIG, WEIGHTS, "model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
        assert "config.json" not in names  # it is no checkpoint of a whole model
        state = load_file(folder / "model.safetensors")
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert {name for name in state} == set(trained)
        assert all(torch.equal(state[name], p) for name, p in trained.items())
        frodctl.merge(str(case.base), str(folder), tmp_path / "out", basis=case.basis)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert (logits(merged) - logits(trainer.model)).abs().max() <= 1e-5
        trainer.save_model(str(tmp_path / "last"))
        fresh = frodctl.load_adapter(case.model(), tmp_path / "last", case.basis)
        assert (logits(fresh) - logits(trainer.model)).abs().max() <= 1e-5

    def test_resuming(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        whole = self.trainer(case, tmp_path / "whole")
        whole.train()
        shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
        resumed = self.trainer(case, tmp_path / "cut")
        resumed.train(resume_from_checkpoint=True)
        expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        found = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
        assert len(found) == len(expected) == 8
        assert found == expected
        assert len(set(expected)) > 4
        for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_loading_the_best_at_the_end(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("bert")
        trainer = self.trainer(
            case, tmp_path / "run", load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
            metric_for_best_model="eval_loss", greater_is_better=True,
        )  # fmt: skip
        trainer.train()
        best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in best.items())

    def test_a_trained_folder_is_not_taken_for_a_model(self, cases: Cases, tmp_path: Path) -> None:
        model = cases("llama").trained()
        model.save_pretrained(tmp_path / "saved")
        with pytest.raises(KeyError, match="PEFT cannot load this adapter"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


class TestIn16Bit:
    """Training in bfloat16 is with V and V⁻ᵀ in bfloat16, and that is the operator which is merged."""

    def reference(self, case: Case, folder: Path, rounded: bool) -> dict[str, torch.Tensor]:
        """W + W D diag(λ)⁻¹ M Vᵀ in float64."""
        basis, trained, result = frodctl.open_basis(case.basis), load_file(folder / WEIGHTS), {}
        base = dict(case.model().named_parameters())
        for record in basis.metadata.modules:
            W = base[f"{record.name}.weight"].detach().double()
            V = to_torch(basis.tensor(f"V.{record.category}")).double()
            D, start = torch.linalg.inv(V).T, to_torch(basis.tensor(f"lambda.{record.name}")).double()
            if rounded:
                V, D = V.bfloat16().double(), D.bfloat16().double()
            prefix = f"base_model.model.{record.name}"
            M = torch.diag(trained[f"{prefix}.frod_lambda_l"].double() - start)
            rows, columns = to_torch(basis.indices()[record.category])
            M[rows, columns] += trained[f"{prefix}.frod_lambda_s_values"].double()
            result[f"{record.name}.weight"] = W + W @ (D * torch.where(start > 0, 1 / start, 0)) @ M @ V.T
        return result

    def test_merged_as_trained(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        saved(case, tmp_path / "adapter")
        assert set(config(tmp_path / "adapter")["frodctl"]["dtype"].values()) == {"BF16"}
        frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", basis=case.basis)
        merged = load_file(tmp_path / "out" / "model.safetensors")
        for name, exact in self.reference(case, tmp_path / "adapter", rounded=True).items():
            assert (merged[name] != exact.bfloat16()).double().mean() < 1e-3, name

    def test_in_float32_nothing_is_rounded(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        saved(case, tmp_path / "adapter")
        assert config(tmp_path / "adapter")["frodctl"]["dtype"] == {}

    def test_the_divergence_from_the_live_model(self, cases: Cases, tmp_path: Path) -> None:
        """Mean KL over 1,024 tokens: at most that of the W' of the stored V, rounded once."""
        case = cases("llama", torch.bfloat16)
        live = saved(case, tmp_path / "adapter")
        frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", basis=case.basis)
        tokens = torch.randint(0, 64, (32, 32), generator=torch.Generator().manual_seed(0))

        def logarithms(model: Any) -> torch.Tensor:
            with torch.no_grad():
                return model.eval()(input_ids=tokens).logits.double().log_softmax(-1)

        wanted = logarithms(live)

        def divergence(model: Any) -> float:
            return float((wanted.exp() * (wanted - logarithms(model))).sum(-1).mean())

        once = case.model()
        exact = self.reference(case, tmp_path / "adapter", rounded=False)
        once.load_state_dict({name: W.bfloat16() for name, W in exact.items()}, strict=False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert 0 < divergence(merged) <= divergence(once) < 0.01 * divergence(case.model())


class TestWhatIsInTheFolder:
    """Nothing of somebody else's is replaced by an adapter."""

    def test_a_model(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        shutil.copytree(case.base, tmp_path / "base")
        before = snapshot(tmp_path)
        with pytest.raises(UsageError, match=r"holds a model \(config\.json\)"):
            frodctl.save_adapter(case.trained(), tmp_path / "base")
        assert snapshot(tmp_path) == before

    def test_weights_without_a_config(self, cases: Cases, tmp_path: Path) -> None:
        """The basis file itself under a name of an adapter's, or anything."""
        case = cases("llama")
        for number, content in enumerate((case.basis.read_bytes(), b"mine")):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / WEIGHTS).write_bytes(content)
            with pytest.raises(UsageError, match="not frodctl's"):
                frodctl.save_adapter(case.trained(), folder)
            assert (folder / WEIGHTS).read_bytes() == content

    def test_what_a_killed_run_left(self, cases: Cases, tmp_path: Path) -> None:
        model = saved(cases("llama"), tmp_path / "adapter")
        (tmp_path / "adapter" / CONFIG).unlink()
        frodctl.save_adapter(model, tmp_path / "adapter")
        frodctl.load_adapter(cases("llama").model(), tmp_path / "adapter", cases("llama").basis)

    def test_a_state_that_is_none(self, cases: Cases, tmp_path: Path) -> None:
        model = cases("llama").trained()
        for state in ({1: 2}, {"x": 7}, [1], {name: 7 for name in model.state_dict()}):
            with pytest.raises(UsageError, match="state_dict"):
                frodctl.save_adapter(model, tmp_path / "adapter", state_dict=state)
        assert not (tmp_path / "adapter").exists()
