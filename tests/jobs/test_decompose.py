"""Decompositions of real and tiny checkpoints, checked from the file alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import frodctl
from frodctl.arrays import to_torch
from frodctl.checkpoint import codec
from frodctl.errors import FrodctlError, InvalidInput, OutOfResources, UsageError
from frodctl.jobs.decompose import DecomposeOptions, DecomposePlan, plan_decompose, run_decompose
from frodctl.jobs.progress import Progress
from tests import forked
from tests.conftest import LLAMA_CONFIG, PEAK_MEMORY, edit_unseen, llama_layers, save_checkpoint, snapshot
from tests.method import reference

ALPHA = 1e-3


def planned(model: str, output: Path, *, dry_run: bool = False, **options: Any) -> DecomposePlan:
    """The plan of a run."""
    return plan_decompose(model, output, DecomposeOptions.of(**options), dry_run=dry_run)


def weights_of(folder: Path, basis: frodctl.BasisFile) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """By category, each module's name and weight in nn.Linear orientation, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    grouped: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for module in basis.metadata.modules:
        weight = tensors[f"{module.name}.weight"]
        assert tuple(weight.shape) == module.shape
        grouped.setdefault(module.category, []).append((module.name, weight.T if module.transposed else weight))
    return grouped


def check_identities(folder: Path, path: Path) -> None:
    """What holds for every shared-basis file: the weights come back from V and λ, and Σλ² = 1."""
    basis = frodctl.open_basis(path)
    basis.verify()
    for category, members in weights_of(folder, basis).items():
        V, tau = to_torch(basis.tensor(f"V.{category}")), to_torch(basis.tensor(f"tau.{category}"))
        scales = [to_torch(basis.tensor(f"lambda.{name}")) for name, _ in members]
        weights = [weight for _, weight in members]
        assert max(reference.reconstruction_errors(weights, V, scales)) <= 1e-5
        squares = sum(scale.double().square() for scale in scales)
        live = squares > 0
        assert (squares[live] - 1).abs().max() <= 1e-5
        assert (tau[~live] == 1 / ALPHA).all()
        assert (tau.diff() >= 0).all()


@pytest.mark.parametrize("checkpoint", ["minilm", "example"])
def test_trained_checkpoints(checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from peft.tuners.frod.model import _projection_from_weights

    folder: Path = request.getfixturevalue(checkpoint)
    result = frodctl.decompose(str(folder), tmp_path / "basis.safetensors", target_modules="all-linear")
    check_identities(folder, result.output)
    basis = frodctl.open_basis(result.output)
    for category, members in weights_of(folder, basis).items():
        weights = [weight for _, weight in members]
        V, tau = to_torch(basis.tensor(f"V.{category}")), to_torch(basis.tensor(f"tau.{category}"))
        expected, residual = reference.tau_and_residual(weights, ALPHA, V)
        assert np.abs(tau.numpy() - expected).max() <= 1e-5 * expected[-1]
        assert residual <= 1e-3
        theirs = torch.nn.functional.normalize(_projection_from_weights([w.float() for w in weights], ALPHA), dim=0)
        ours = torch.nn.functional.normalize(V, dim=0)
        cosines = (ours.double() * theirs.double()).sum(dim=0)
        sines = (ours.double() - cosines.sign() * theirs.double()).norm(dim=0)
        steps = torch.from_numpy(np.diff(expected, prepend=-np.inf, append=np.inf))
        gaps = torch.minimum(steps[:-1], steps[1:])
        assert (sines <= 1e-4 * expected[-1] / gaps).all()


def tiny_models() -> dict[str, Any]:
    """Models of the architectures that PEFT's tuner gets wrong, and the ordinary ones."""
    import transformers as t

    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 50,
    }
    clip = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50)
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(
                d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=40,
                encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=50, max_position_embeddings=16,
            )
        ),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**clip, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50},
                vision_config={**clip, "hidden_size": 24, "intermediate_size": 40, "image_size": 8, "patch_size": 4},
                projection_dim=16,
            )
        ),
        "bert-cross-attention": lambda: t.BertLMHeadModel(
            t.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50, n_positions=16)),
        "one-layer-llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=50,
            )
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(
                hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=50, num_local_experts=4,
            )
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", tiny_models())
def test_every_layer_of_every_architecture(name: str, tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = tiny_models()[name]()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    first, second = (
        frodctl.decompose(str(folder), tmp_path / f"{i}.safetensors", target_modules="all-linear") for i in range(2)
    )
    assert first.output.read_bytes() == second.output.read_bytes()
    check_identities(folder, first.output)
    basis = frodctl.open_basis(first.output)
    stored = {module.name for module in basis.metadata.modules}
    for path, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear | Conv1D) and any(part.isdigit() for part in path.split("."))
        if linear and not path.endswith(".gate"):
            assert any(path == name or path.endswith("." + name) for name in stored), path
    for category, members in weights_of(folder, basis).items():
        assert {weight.shape[1] for _, weight in members} == {basis.width(category)}


def test_conv1d_is_decomposed_as_its_transpose(tmp_path: Path) -> None:
    weights = [torch.randn(32, 96, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    linear = {f"h.{i}.attn.c_attn.weight": w.T for i, w in enumerate(weights)}
    conv1d = {f"h.{i}.attn.c_attn.weight": w for i, w in enumerate(weights)}
    a = save_checkpoint(tmp_path / "linear", linear, {"model_type": "gpt_bigcode"})
    b = save_checkpoint(tmp_path / "conv1d", conv1d, {"model_type": "gpt2"})
    files = [frodctl.decompose(str(f), tmp_path / f"{f.name}.safetensors").output for f in (a, b)]
    first, second = (load_file(f) for f in files)
    assert first["V.attn_c_attn"].shape == (32, 32)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value: float, tmp_path: Path) -> None:
    tensors = llama_layers(3)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    folder = save_checkpoint(tmp_path / "model", tensors, LLAMA_CONFIG)
    with pytest.raises(InvalidInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or Inf"):
        frodctl.decompose(str(folder), tmp_path / "basis.safetensors", target_modules="all-linear")
    assert not (tmp_path / "basis.safetensors").exists()


@pytest.mark.parametrize("scale", [1e-8, 1e-7, 1e-6, 1e6])
def test_a_dtype_that_v_does_not_fit_is_refused_with_those_that_it_does(tmp_path: Path, scale: float) -> None:
    base = save_checkpoint(tmp_path / "base", {k: w * scale for k, w in llama_layers(4).items()}, LLAMA_CONFIG)
    output = tmp_path / "basis.safetensors"
    with pytest.raises(FrodctlError, match=r"^self_attn_q_proj: .* float16; give `dtype=float32` or `dtype=bfloat16`$"):
        frodctl.decompose(base, output, dtype="float16", target_modules="q_proj")
    assert not output.exists()
    frodctl.decompose(base, output, dtype="bfloat16", target_modules="q_proj")
    frodctl.decompose(base, output, dtype="float32", target_modules="q_proj", force=True)
    check_identities(base, output)


def test_a_layer_whose_scales_leave_float32_is_named(tmp_path: Path) -> None:
    tensors = llama_layers(4)
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e-42  # which leaves some bits
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e3
    base = save_checkpoint(tmp_path / "base", tensors, LLAMA_CONFIG)
    with pytest.raises(FrodctlError, match=r"^model\.layers\.2\.mlp\.up_proj: its weights are so much smaller"):
        frodctl.decompose(base, tmp_path / "basis.safetensors", target_modules="up_proj")
    assert not (tmp_path / "basis.safetensors").exists()


def test_header_metadata_is_the_contract(example: Path, tmp_path: Path) -> None:
    import hashlib
    import json

    output = frodctl.decompose(str(example), tmp_path / "b.safetensors", sparsity=0.02, seed=5, alpha=0.01).output
    with safe_open(output, "pt") as file:
        assert file.metadata()["format"] == "pt"
        metadata = json.loads(file.metadata()["frodctl"])
        for category, digest in metadata["basis"].items():
            raw = file.get_tensor(f"V.{category}").numpy().tobytes()
            assert digest == "sha256:" + hashlib.sha256(raw).hexdigest()
    assert metadata["version"] == 1
    assert metadata["model"] == str(example)
    assert (metadata["alpha"], metadata["seed"]) == (0.01, 5)
    assert metadata["sparsity"] == dict.fromkeys(metadata["basis"], 0.02)
    stored: dict[str, torch.Tensor] = {}
    for shard in example.glob("*.safetensors"):
        stored |= load_file(shard)
    for module in metadata["modules"]:
        weight = stored[module["name"] + ".weight"].view(torch.uint8).numpy().tobytes()
        assert module["digest"] == "sha256:" + hashlib.sha256(weight).hexdigest()


def test_collisions_are_said_in_the_file(tmp_path: Path) -> None:
    tensors = {
        f"{tower}.layers.{i}.self_attn.q_proj.weight": torch.randn(8, width)
        for tower, width in (("encoder", 8), ("decoder", 12))
        for i in range(2)
    }
    folder = save_checkpoint(tmp_path / "model", tensors)
    basis = frodctl.open_basis(
        frodctl.decompose(str(folder), tmp_path / "b.safetensors", target_modules="q_proj").output
    )
    assert set(basis.metadata.V_digests) == {"encoder_self_attn_q_proj", "decoder_self_attn_q_proj"}
    assert not basis.metadata.peft_loadable


class TestShareInput:
    OPTIONS: ClassVar = {"target_modules": "all-linear", "share_input": True}

    def test_one_basis_for_layers_that_read_the_same(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)
        result = frodctl.decompose(folder, tmp_path / "b.safetensors", **self.OPTIONS)
        check_identities(folder, result.output)
        basis = frodctl.open_basis(result.output)
        together = "self_attn_q_proj_k_proj"
        assert set(basis.metadata.V_digests) == {together, "mlp_up_proj", "mlp_down_proj"}
        assert basis.metadata.share_input == {together: ["k_proj", "q_proj"]}
        assert not basis.metadata.peft_loadable
        weights = [weight for _, weight in weights_of(folder, basis)[together]]
        assert len(weights) == 6
        V, tau = (to_torch(basis.tensor(f"{name}.{together}")) for name in ("V", "tau"))
        expected, residual = reference.tau_and_residual(weights, ALPHA, V)
        assert np.abs(tau.numpy() - expected).max() <= 1e-5 * expected[-1]
        assert residual <= 1e-3

    def test_less_is_stored_and_computed_for_as_many_trained_numbers(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)
        shared, separate = (
            planned(str(folder), tmp_path / "b.safetensors", target_modules="all-linear", share_input=share)
            for share in (True, False)
        )
        assert shared.trainable_parameters == separate.trainable_parameters
        assert shared.output_bytes < separate.output_bytes
        assert shared.flops < separate.flops
        assert "share_input" not in separate.metadata(*separate._blank_digests()).to_json()

    def test_nothing_to_share(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)
        with pytest.raises(UsageError, match="`share_input`: no two of these modules"):
            planned(str(folder), tmp_path / "b.safetensors", target_modules="k_proj,up_proj", share_input=True)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_budget_is_kept(share: float, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)
    plan = planned(str(folder), tmp_path / "b.safetensors", target_modules="all-linear", budget=share)
    total = plan.checkpoint.parameters()
    assert share * total - 4 * 3 <= plan.trainable_parameters <= share * total
    with pytest.raises(UsageError, match="scales alone take"):
        planned(str(folder), tmp_path / "b.safetensors", target_modules="all-linear", budget=1e-4)


class TestAllocate:
    OPTIONS: ClassVar = {"target_modules": "all-linear", "budget": 0.2}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)

    def test_by_spectrum(self, folder: Path, tmp_path: Path) -> None:
        """s in proportion to the RMS singular value of each category's stack; the seed's positions for them."""
        result = frodctl.decompose(str(folder), tmp_path / "b.safetensors", allocate="spectrum", **self.OPTIONS)
        uniform = frodctl.decompose(str(folder), tmp_path / "u.safetensors", **self.OPTIONS)
        basis, weights = frodctl.open_basis(result.output), load_file(folder / "model.safetensors")
        factors = {}
        for category, sparsity in basis.metadata.sparsity.items():
            names = [record.name for record in basis.metadata.modules if record.category == category]
            stack = torch.cat([weights[f"{name}.weight"] for name in names]).double()
            n = stack.shape[1]
            rms = float(torch.linalg.svdvals(stack).square().sum() / n) ** 0.5
            factors[category] = sparsity / rms
            assert basis.indices()[category].shape[1] == max(1, int(n * n * sparsity))
        assert len(set(basis.metadata.sparsity.values())) == len(factors) > 3
        assert list(factors.values()) == pytest.approx([min(factors.values())] * len(factors), rel=1e-5)
        total, share = result.plan.checkpoint.parameters(), self.OPTIONS["budget"]
        trained = result.plan.trainable_parameters
        assert share * total - 4 * 3 * len(factors) <= trained <= share * total
        assert trained == sum(category.row()["trainable_parameters"] for category in result.categories)
        first, second = load_file(result.output), load_file(uniform.output)
        assert all(torch.equal(first[name], second[name]) for name in second)

    def test_the_plan_knows_the_total_alone(self, folder: Path, tmp_path: Path) -> None:
        plan = planned(str(folder), tmp_path / "b.safetensors", allocate="spectrum", **self.OPTIONS)
        assert plan.trainable_parameters == int(self.OPTIONS["budget"] * plan.checkpoint.parameters())
        assert {category.row()["nnz"] for category in plan.categories} == {None}

    def test_it_needs_a_budget(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="needs a `budget`"):
            planned(str(folder), tmp_path / "b.safetensors", allocate="spectrum")

    def test_resumed(self, folder: Path, tmp_path: Path) -> None:
        """What a run with another allocation finished serves; only the sparsities differ."""
        one = frodctl.decompose(str(folder), tmp_path / "1.safetensors", allocate="spectrum", **self.OPTIONS)

        def stop(progress: Progress) -> None:
            if progress.text.startswith("writing"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            frodctl.decompose(str(folder), tmp_path / "2.safetensors", target_modules="all-linear", progress=stop)
        two = frodctl.decompose(str(folder), tmp_path / "2.safetensors", allocate="spectrum", **self.OPTIONS)
        assert all(category.resumed for category in two.categories)
        assert one.output.read_bytes() == two.output.read_bytes()


def test_plan_tells_the_size_of_the_output(example: Path, tmp_path: Path) -> None:
    plan = planned(str(example), tmp_path / "b.safetensors", target_modules="all-linear", dry_run=True)
    result = frodctl.decompose(str(example), tmp_path / "b.safetensors", target_modules="all-linear")
    assert plan.output_bytes == result.output_bytes == result.output.stat().st_size


def kill(folder: Path, output: Path, moment: forked.Moment) -> None:
    """End a decomposition of everything at this moment of it."""
    words = ["decompose", folder, "-o", output, "--target-modules", "all-linear"]
    killed = forked.frodctl(words, output.parent, moment=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert Path(f"{output}.partial").is_dir()


def test_a_killed_run_is_taken_up_with_the_same_bytes(example: Path, tmp_path: Path) -> None:
    undisturbed = frodctl.decompose(str(example), tmp_path / "whole.safetensors", target_modules="all-linear")
    names = [category.plan.name for category in undisturbed.categories]
    output = tmp_path / "killed.safetensors"
    kill(example, output, (1, names[2]))
    assert not output.exists()
    resumed = frodctl.decompose(str(example), output, target_modules="all-linear")
    assert [category.resumed for category in resumed.categories] == [True, True] + [False] * (len(names) - 2)
    assert output.read_bytes() == undisturbed.output.read_bytes()
    assert not (tmp_path / "killed.safetensors.partial").exists()


@pytest.mark.long  # tests/trust kills at every operation on files
def test_killed_at_every_moment_and_rerun(tmp_path: Path) -> None:
    """At every report and before every change of a file: what has the final name is whole, and a rerun makes it."""
    model = save_checkpoint(tmp_path / "model", llama_layers(2), LLAMA_CONFIG)
    output, options = tmp_path / "b.safetensors", {"target_modules": "q_proj,k_proj"}
    expected = frodctl.decompose(model, tmp_path / "whole.safetensors", **options).output.read_bytes()
    resumed = []
    for moment in count(1):
        words = ["decompose", model, "-o", output, "--target-modules", options["target_modules"]]
        done = forked.frodctl(words, tmp_path, moment=(moment, ""))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if not output.exists():
            resumed.append(sum(c.resumed for c in frodctl.decompose(model, output, **options).categories))
            assert sorted(os.listdir(tmp_path)) == ["b.safetensors", "model", "whole.safetensors"]
        assert output.read_bytes() == expected, moment
        output.unlink()
        shutil.rmtree(f"{output}.partial", ignore_errors=True)
    assert resumed == sorted(resumed)
    assert set(resumed) == {0, 1, 2}
    assert moment > len(resumed) + 2  # those after publishing


def test_another_job_does_not_take_up_the_pieces(example: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    kill(example, output, (1, "mlp_up_proj"))
    result = frodctl.decompose(str(example), output, target_modules="all-linear", alpha=0.5)
    assert not any(category.resumed for category in result.categories)
    first = frodctl.decompose(str(example), output, target_modules="all-linear", force=True)
    assert any(category.resumed for category in first.categories)  # nor does it take them away
    assert not (tmp_path / "b.safetensors.partial").exists()


def test_a_damaged_piece_is_computed_again(example: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    kill(example, output, (1, "mlp_up_proj"))
    pieces = sorted((tmp_path / "b.safetensors.partial").glob("*/0000.safetensors"))
    assert len(pieces) == 1
    os.truncate(pieces[0], 1000)
    result = frodctl.decompose(str(example), output, target_modules="all-linear")
    assert not result.categories[0].resumed
    check_identities(example, output)


# Resuming and publishing, checked by digests


def finish_all_but_writing(folder: Path, output: Path, **options: Any) -> None:
    """Every category finished, and then the run ends."""

    def stop(progress: Progress) -> None:
        if progress.text.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frodctl.decompose(str(folder), output, target_modules="all-linear", progress=stop, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)


@pytest.mark.parametrize("where", ["V.", "tau.", "lambda.", "record", "end"])
def test_one_flipped_bit_in_a_piece_is_not_published(where: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    finish_all_but_writing(model, output)
    piece = next(tmp_path.glob("b.safetensors.partial/*/0001.safetensors"))
    header = codec.read_header(piece).tensors
    places = {name.split(".")[0] + ".": offset + 3 for name, (_, offset) in header.items()}
    places["record"] = piece.read_bytes().index(b"rms_singular_value") + len('rms_singular_value\\": 1')
    places["end"] = piece.stat().st_size - 1
    edit_unseen(piece, places[where])
    result = frodctl.decompose(str(model), output, target_modules="all-linear")
    assert [category.resumed for category in result.categories] == [True, False, True, True]
    whole = frodctl.decompose(str(model), tmp_path / "whole.safetensors", target_modules="all-linear")
    assert output.read_bytes() == whole.output.read_bytes()


def test_a_piece_damaged_before_it_is_published(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"

    def damage(progress: Progress) -> None:
        if progress.text.startswith("writing"):
            piece = next(tmp_path.glob("b.safetensors.partial/*/0001.safetensors"))
            edit_unseen(piece, piece.stat().st_size - 1)

    with pytest.raises(FrodctlError, match="reads back differently"):
        frodctl.decompose(str(model), output, target_modules="all-linear", progress=damage)
    assert not output.exists()
    result = frodctl.decompose(str(model), output, target_modules="all-linear")
    assert [category.resumed for category in result.categories] == [True, False, True, True]
    check_identities(model, output)


def test_a_base_edited_in_secret_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    """Its size and time are as they were; the category of the changed weight is computed again."""
    output = tmp_path / "b.safetensors"
    finish_all_but_writing(model, output)
    weights = model / "model.safetensors"
    offset = codec.read_header(weights).tensors["model.layers.1.mlp.up_proj.weight"][1]
    edit_unseen(weights, offset + 2)
    result = frodctl.decompose(str(model), output, target_modules="all-linear")
    changed = {category.plan.name for category in result.categories if not category.resumed}
    assert changed == {"mlp_up_proj"}
    whole = frodctl.decompose(str(model), tmp_path / "whole.safetensors", target_modules="all-linear")
    assert output.read_bytes() == whole.output.read_bytes()


# Where output may be


def test_the_plan_of_a_dry_run_is_checked_as_it_runs(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    plan = planned(str(model), output, dry_run=True)
    output.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        run_decompose(plan)
    assert output.read_text() == "precious"
    run_decompose(planned(str(model), output, dry_run=True, force=True))
    frodctl.open_basis(output).verify()


def test_what_appears_during_the_run_is_kept(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"

    def appear(progress: Progress) -> None:
        if progress.text.startswith("writing"):
            output.write_text("precious")

    with pytest.raises(UsageError, match="exists"):
        frodctl.decompose(str(model), output, progress=appear)
    assert output.read_text() == "precious"
    result = frodctl.decompose(str(model), output, force=True)
    assert all(category.resumed for category in result.categories)


def test_headers_alone_cannot_be_decomposed(model: Path, tmp_path: Path) -> None:
    plan = planned(str(model), tmp_path / "b.safetensors", dry_run=True)
    remote = replace(plan, checkpoint=replace(plan.checkpoint, root=None))
    with pytest.raises(UsageError, match="headers alone"):
        run_decompose(remote)


@pytest.mark.parametrize("name", ["b.st", "b.bin", "b", "b.safetensors.bak", ".safetensors", "b.SAFETENSORS"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_name_that_no_command_would_read(name: str, dry_run: bool, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        planned(str(model), tmp_path / name, dry_run=dry_run)


def inputs(root: Path, example: Path) -> dict[str, Path]:
    """Checkpoints of several kinds, by their names, and a link to each: as a folder and as a file."""
    shutil.copytree(example, root / "sharded")
    save_checkpoint(root / "single", llama_layers(2), LLAMA_CONFIG)
    save_checkpoint(root / "odd", llama_layers(2), LLAMA_CONFIG)
    (root / "odd" / "model.safetensors").rename(root / "odd" / "weights.safetensors")
    (root / "linked").mkdir()  # as in the Hub's cache, every file is a link
    for file in (root / "single").iterdir():
        (root / "linked" / file.name).symlink_to(file)
    return {
        "sharded": root / "sharded",
        "index": root / "sharded" / "model.safetensors.index.json",
        "single": root / "single",
        "file": root / "single" / "model.safetensors",
        "odd": root / "odd",
        "linked": root / "linked",
    }


@pytest.mark.parametrize(
    "kind",
    ["sharded", "single", "file", "linked", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("index", "odd"))],
)
def test_no_path_to_an_input_is_an_output(
    kind: str, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to name a file of the checkpoint, and the names of weights that it does not have yet."""
    found = inputs(tmp_path, example)
    model = found[kind]
    folder = model if model.is_dir() else model.parent
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "folder").symlink_to(folder)
    parts = ("model", "model-00001-of-00005", "adapter_model", "diffusion_pytorch_model", "pytorch_model")
    outputs = [folder / f"{name}.safetensors" for name in parts]
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        (work / f"link{number}.safetensors").symlink_to(file)
        os.link(file.resolve(), work / f"hard{number}.safetensors")
        outputs += [file, file.resolve(), work / f"link{number}.safetensors", work / f"hard{number}.safetensors"]
    outputs += [work / "folder" / path.name for path in outputs if path.parent == folder]
    outputs += [Path(os.path.relpath(path, work)) for path in outputs]
    outputs += [path.parent / ".." / path.parent.name / path.name for path in outputs if path.is_absolute()]
    before = snapshot(tmp_path)
    for output in outputs:
        for force in (False, True):
            with pytest.raises(UsageError):
                frodctl.decompose(str(model), output, force=force)
            with pytest.raises(UsageError):
                run_decompose(planned(str(model), output, dry_run=True, force=force))
    assert snapshot(tmp_path) == before
    elsewhere = tmp_path / "b.safetensors"
    read = planned(str(model), elsewhere).checkpoint.files()
    frodctl.decompose(str(model), folder / "basis.frod.safetensors")  # may lie beside the weights, and changes nothing
    assert planned(str(model), elsewhere).checkpoint.files() == read


PEAK = f"""
import sys, frodctl
{PEAK_MEMORY}
frodctl.decompose(sys.argv[1], sys.argv[2], target_modules="all-linear", cache_size=4_000_000)
print(peak())
"""


def test_peak_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Four times the layers add 100 MB of weights; the peak stays within 10 %."""
    peaks = []
    for layers in (8, 32):
        tensors = {f"layers.{i}.up_proj.weight": torch.randn(2048, 512) for i in range(layers)}
        folder = save_checkpoint(tmp_path / str(layers), tensors)
        command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / f"{layers}.safetensors")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] <= 1.1 * peaks[0]


def test_the_plan_bounds_the_peak(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", {f"layers.{i}.up.weight": torch.randn(512, 2048) for i in range(6)})
    plan = planned(str(folder), tmp_path / "b.safetensors", target_modules="all-linear", cache_size=4_000_000)
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "b.safetensors")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 * plan.peak_memory_bytes <= peak <= 1.1 * plan.peak_memory_bytes


@pytest.mark.parametrize("shape", [(512, 2048), (2800, 1024)], ids=["wide", "tall"])
def test_a_limit_of_memory(tmp_path: Path, shape: tuple[int, int]) -> None:
    """At shares of what is planned without one: within it and the same decomposition, or refused with what will do."""
    folder = save_checkpoint(tmp_path / "m", {f"layers.{i}.up.weight": torch.randn(shape) for i in range(6)})
    basis = tmp_path / "basis.safetensors"
    plan = planned(str(folder), basis, target_modules="all-linear")
    plain = load_file(frodctl.decompose(str(folder), basis, target_modules="all-linear", force=True).output)
    done = 0
    for share in (1.0, 0.85, 0.7, 0.5, 0.25):
        limit = int(share * plan.most_memory_bytes)
        output = tmp_path / f"{share}.safetensors"
        options: dict[str, Any] = {"target_modules": "all-linear", "memory_limit": limit}
        try:
            limited = planned(str(folder), output, **options)
        except OutOfResources as error:
            least = int(re.findall(r"at least (\d+) MB", str(error))[0])
            options["memory_limit"] = f"{least} MB"
            assert limit < planned(str(folder), output, **options).most_memory_bytes <= least * 1e6
            continue
        assert limited.most_memory_bytes <= limit
        program = PEAK.replace("cache_size=4_000_000", f"memory_limit={limit}")
        command = [sys.executable, "-c", program, str(folder), str(output)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert peak <= 1.05 * limit
        assert frodctl.open_basis(output).metadata.memory_limit == limit
        state = load_file(output)
        for name in (name for name in state if name.startswith("lambda.")):
            torch.testing.assert_close(state[name], plain[name], rtol=1e-4, atol=1e-6)
        done += 1
    assert done >= 2


def test_fused_experts_are_one_matrix_each(tmp_path: Path) -> None:
    """(experts, out, in) and, for some model types, (experts, in, out)."""
    hidden, inner, experts = 16, 24, 3
    gate_up = [torch.randn(experts, 2 * inner, hidden, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    config = {"model_type": "qwen3_moe", "hidden_size": hidden}
    straight = save_checkpoint(
        tmp_path / "a", {f"model.layers.{i}.mlp.experts.gate_up_proj": w for i, w in enumerate(gate_up)}, config
    )
    turned = save_checkpoint(
        tmp_path / "b",
        {f"model.layers.{i}.mlp.experts.gate_up_proj": w.mT for i, w in enumerate(gate_up)},
        {**config, "model_type": "gpt_oss"},
    )
    results = []
    for folder in (straight, turned):
        output = frodctl.decompose(
            str(folder), tmp_path / f"{folder.name}.safetensors", target_modules="all-linear"
        ).output
        results.append(load_file(output))
        assert len(frodctl.open_basis(output).metadata.modules) == 2 * experts
    assert results[0]["V.experts_gate_up_proj"].shape == (hidden, hidden)
    assert "lambda.model.layers.1.mlp.experts.gate_up_proj[2]" in results[0]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_the_file_is_readable_by_the_safetensors_library(example: Path, tmp_path: Path) -> None:
    output = frodctl.decompose(str(example), tmp_path / "b.safetensors", dtype="bfloat16").output
    ours = codec.read_header(output)
    theirs = load_file(output)
    assert set(ours.tensors) == set(theirs)
    assert theirs["V.self_attn_q_proj"].dtype == torch.bfloat16
    assert theirs["tau.self_attn_q_proj"].dtype == torch.float64


def degenerate_models() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoints whose stacked weights lack rank, or whose T has no preferred directions."""
    dead, twins = llama_layers(3), llama_layers(3)
    for name, weight in dead.items():
        weight[:, [1, 4]] = 0
        twins[name] = twins[name.replace(".1.", ".0.").replace(".2.", ".0.")].clone()
    short = {name: weight[:6] for name, weight in llama_layers(3).items()}
    exact = {name: weight[:8] for name, weight in llama_layers(4, m=32).items()}
    return {"dead columns": dead, "identical layers": twins, "fewer rows": short, "as many rows": exact}


@pytest.mark.parametrize(("name", "ranks"), [
    ("dead columns", {"mlp_down_proj": 46, "mlp_up_proj": 30, "self_attn_k_proj": 24, "self_attn_q_proj": 30}),
    ("identical layers", {"mlp_down_proj": 32, "mlp_up_proj": 32, "self_attn_k_proj": 8, "self_attn_q_proj": 32}),
    ("fewer rows", dict.fromkeys(("mlp_down_proj", "mlp_up_proj", "self_attn_k_proj", "self_attn_q_proj"), 18)),
    ("as many rows", dict.fromkeys(("mlp_down_proj", "mlp_up_proj", "self_attn_k_proj", "self_attn_q_proj"), 32)),
])  # fmt: skip
def test_degenerate_checkpoints(name: str, ranks: dict[str, int], tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", degenerate_models()[name], LLAMA_CONFIG)
    first, second = (
        frodctl.decompose(str(folder), tmp_path / f"{i}.safetensors", target_modules="all-linear") for i in range(2)
    )
    assert first.output.read_bytes() == second.output.read_bytes()
    check_identities(folder, first.output)
    assert {category.plan.name: category.outcome.rank for category in first.categories} == ranks
    if name != "dead columns":  # T is a multiple of I: V is that of the plain SVD
        basis = frodctl.open_basis(first.output)
        for category in ranks:
            V = torch.nn.functional.normalize(to_torch(basis.tensor(f"V.{category}")).double(), dim=0)
            torch.testing.assert_close(V.T @ V, torch.eye(len(V), dtype=torch.float64), rtol=0, atol=1e-5)
