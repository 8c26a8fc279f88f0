"""Inspections against numpy's float64 SVD, PEFT's live model, and identities of the method."""

from __future__ import annotations

import json
import math
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import powerlaw
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info, threadpool_limits

import frodctl
from frodctl.arrays import from_torch, to_torch
from frodctl.checkpoint.stream import digest
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.jobs.inspect import InspectOptions, reports
from frodctl.jobs.inspect.report import FIGURES
from tests import peft_models
from tests.jobs.test_merge import sign, write_adapter


def rows(*targets: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """The rows of one target by name."""
    result = frodctl.inspect(*map(str, targets), **options)
    return {row.values["name"]: row.values for row in result.targets[0].rows}


def reference(W: np.ndarray) -> dict[str, float]:
    """The definitions, from numpy's SVD."""
    s = np.linalg.svd(W, compute_uv=False)
    energy, share = np.cumsum(s**2) / np.sum(s**2), s / s.sum()
    edge = math.sqrt(np.sum(s**2) / W.size) * sum(math.sqrt(size) for size in W.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = powerlaw.Fit(s**2, verbose=False, parameter_ranges={"alpha": [0, None]})
    return {
        "spectral_norm": s[0],
        "frobenius_norm": np.linalg.norm(W),
        "nuclear_norm": s.sum(),
        "stable_rank": np.sum(s**2) / s[0] ** 2,
        "effective_rank": math.exp(-np.sum(share * np.log(share))),
        "numerical_rank": np.sum(s > s[0] * max(W.shape) * 2.0**-23),
        "condition_number": s[0] / s[-1],
        **{f"energy_rank_{p}": np.searchsorted(energy, p / 100 * (1 - 1e-12)) + 1 for p in (90, 95, 99)},
        "marchenko_pastur_edge": edge,
        "above_edge": np.sum(s > edge),
        "power_law_alpha": fit.alpha,
        "power_law_distance": fit.D,
        "power_law_xmin": fit.xmin,
    }


def close(found: float | None, expected: float, key: str) -> bool:
    if math.isnan(expected):  # of two singular values there is no power law
        return found is None
    return found == pytest.approx(expected, rel=1e-2 if key == "condition_number" else 1e-6)


def test_every_figure_of_a_trained_model_is_numpys(minilm: Path) -> None:
    weights = load_file(next(minilm.glob("*.safetensors")))
    found = rows(minilm, spectrum=True, exclude=("embeddings.word*",))
    assert set(found) == {
        n for n, w in weights.items() if w.ndim == 2 and w.is_floating_point() and not n.startswith("embeddings.word")
    }
    assert len(found) > 35
    for name, row in found.items():
        expected = reference(weights[name].double().numpy())
        wrong = {key: (row[key], value) for key, value in expected.items() if not close(row[key], value, key)}
        assert not wrong, (name, wrong)
        assert (row["shape"], row["dtype"]) == (list(weights[name].shape), "F32")


def test_estimates_enclose_the_exact_figures(example: Path) -> None:
    exact, found = rows(example, spectrum=True), rows(example, estimate=True)
    assert set(exact) == set(found)
    missed = total = 0
    for name, row in found.items():
        assert set(row["estimated"]) == set(row["errors"])
        for key, error in row["errors"].items():
            total += 1
            missed += abs(row[key] - exact[name][key]) > error
        assert row["frobenius_norm"] == pytest.approx(exact[name]["frobenius_norm"], rel=1e-12)
        assert row["condition_number"] is None
    assert total >= 5 * len(found)  # a few, of small matrices, come out exact
    assert missed <= 0.05 * total
    assert found == rows(example, estimate=True)
    assert found != rows(example, estimate=True, seed=1)


def test_fused_experts_are_taken_one_by_one(tmp_path: Path) -> None:
    fused = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    save_file(
        {
            "layers.0.experts.up": fused,
            "norm": torch.ones(6),
            "ids": torch.ones(2, 2).long(),
            "conv.weight": torch.ones(5, 1, 4),
        },
        tmp_path / "m.safetensors",
    )
    found = rows(tmp_path / "m.safetensors", spectrum=True)
    assert list(found) == [f"layers.0.experts.up[{i}]" for i in range(3)]
    for i, row in enumerate(found.values()):
        assert row["nuclear_norm"] == pytest.approx(np.linalg.svd(fused[i].double().numpy())[1].sum(), rel=1e-9)
        assert row["shape"] == [8, 6]


@pytest.fixture
def three_cores() -> Iterator[None]:
    with threadpool_limits(3, "blas"):
        yield


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_several_matrices_at_a_time_have_the_same_figures(example: Path, three_cores: None) -> None:
    several = rows(example, spectrum=True)
    assert blas_threads() == {3}
    with threadpool_limits(1, "blas"):
        found = rows(example, spectrum=True)
    for (name, row), one in zip(found.items(), several.values(), strict=True):
        assert all(close(one[key], row[key], key) for key in FIGURES if row[key] is not None), name
        assert [one[key] is None for key in FIGURES] == [row[key] is None for key in FIGURES], name


def test_whoever_takes_only_the_first_has_his_threads_back(example: Path, three_cores: None) -> None:
    report = next(reports([str(example)], InspectOptions.of(spectrum=True)))
    next(report.rows)
    report.rows.close()
    assert blas_threads() == {3}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frodctl")]


def test_nan_is_an_error_that_names_the_tensor(example: Path, tmp_path: Path) -> None:
    save_file({"fine": torch.ones(4, 4), "broken": torch.full((4, 4), float("nan"))}, tmp_path / "m.safetensors")
    with pytest.raises(InvalidInput, match="tensor broken: holds NaN"):
        rows(tmp_path / "m.safetensors", spectrum=True)


# Adapters


@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_what_an_adapter_makes_of_the_weights(family: str, tmp_path: Path) -> None:
    """ΔW's figures against those of the live model's own weights, and λ' − λ against PEFT's at its start."""
    base = peft_models.save_base(tmp_path / "base", family, torch.float32)
    peft_models.trained_adapter(tmp_path / "start", family, base, bias="none")
    torch.manual_seed(0)
    live = peft_models.trained_adapter(tmp_path / "adapter", family, base, bias="none")
    fresh = peft_models.get_peft_model(peft_models.task_model(family, base), peft_models.frod_config(family))
    start = {n.removesuffix(".frod_lambda_l.default"): p for n, p in fresh.named_parameters() if "frod_lambda_l" in n}
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = {
        n: p.detach().clone() for n, p in live.get_base_model().state_dict().items() if n.endswith("base_layer.weight")
    }
    merged = live.merge_and_unload().state_dict()
    found = rows(tmp_path / "adapter", base=str(base))
    assert len(found) >= 6
    for name, row in found.items():
        if row["category"] == "trained as a whole":
            continue
        W = before[f"{name}.base_layer.weight"].double()
        delta = merged[f"{name}.weight"].double() - W
        assert row["relative_change"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        expected = reference(delta.numpy())
        for key in ("spectral_norm", "frobenius_norm", "nuclear_norm", "stable_rank", "effective_rank"):
            assert row[f"delta_{key}"] == pytest.approx(expected[key], rel=1e-4), (name, key)
        assert row["delta_numerical_rank"] == min(W.shape)  # the update has full rank
        prefix = f"base_model.model.{name}"
        moved = (state[f"{prefix}.frod_lambda_l"] - start[prefix]).double()
        S = state[f"{prefix}.frod_lambda_s_values"].double()
        assert row["scales_change_norm"] == pytest.approx(float(moved.norm()), rel=1e-3)
        assert row["sparse_norm"] == pytest.approx(float(S.norm()), rel=1e-6)
        energy = float(S.square().sum() / (S.square().sum() + moved.square().sum()))
        assert row["off_diagonal_energy"] == pytest.approx(energy, rel=1e-3)


def test_an_adapter_by_itself(tmp_path: Path) -> None:
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    peft_models.trained_adapter(tmp_path / "adapter", "llama", base)
    headers = frodctl.inspect(str(tmp_path / "adapter")).targets[0]
    assert headers.kind == "adapter"
    assert headers.summary["written_by"].startswith("PEFT 0.")
    assert headers.summary["basis"] == "in the adapter"
    assert headers.summary["modules"] == len(headers.rows) == 12
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = sum(t.numel() for n, t in state.items() if "frod_lambda" in n)
    assert headers.summary["trainable_parameters"] == trained
    row = rows(tmp_path / "adapter", spectrum=True)["model.layers.0.self_attn.q_proj"]
    assert row["scales_change_norm"] is None  # where PEFT began is not in the file
    assert row["sparse_occupancy"] == 1.0


def test_an_adapter_of_our_own_with_its_basis(tmp_path: Path) -> None:
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    basis = tmp_path / "basis.safetensors"
    frodctl.decompose(str(base), basis, target_modules="q_proj", sparsity=0.05)
    adapter = write_adapter(tmp_path / "adapter", base, basis, 0.1)
    state, opened = load_file(adapter / "adapter_model.safetensors"), frodctl.open_basis(basis)
    for name, row in rows(adapter, spectrum=True, basis=basis).items():
        start = to_torch(opened.tensor(f"lambda.{name}")).double()
        moved = state[f"base_model.model.{name}.frod_lambda_l"].double() - start
        assert row["scales_change_relative"] == pytest.approx(float(moved.norm() / start.norm()), rel=1e-9)
    whole = rows(adapter, base=str(base), basis=basis)
    frodctl.merge(str(base), str(adapter), tmp_path / "out", basis=basis)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, row in whole.items():
        delta = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert row["delta_nuclear_norm"] == pytest.approx(float(torch.linalg.matrix_norm(delta, "nuc")), rel=1e-4)


def test_a_small_update_is_not_buried_in_rounding(tmp_path: Path) -> None:
    """One scale moved by 1e-4: the update has rank one, also where W + ΔW in float32 would not show it."""
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    basis = tmp_path / "basis.safetensors"
    frodctl.decompose(str(base), basis, target_modules="q_proj")
    adapter = write_adapter(tmp_path / "adapter", base, basis)
    state = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    state[f"base_model.model.{name}.frod_lambda_l"][5] *= 1 + 1e-4
    save_file(state, adapter / "adapter_model.safetensors", {"format": "pt"})
    sign(adapter)
    found = rows(adapter, base=str(base), basis=basis)
    assert found[name]["delta_numerical_rank"] == 1
    assert found["model.layers.0.self_attn.q_proj"]["delta_frobenius_norm"] == 0


def test_a_basis_that_is_not_the_adapters(tmp_path: Path) -> None:
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    frodctl.decompose(str(base), tmp_path / "basis.safetensors", target_modules="q_proj")
    frodctl.decompose(str(base), tmp_path / "other.safetensors", target_modules="q_proj", alpha=0.5)
    adapter = write_adapter(tmp_path / "adapter", base, tmp_path / "basis.safetensors", 0.1)
    with pytest.raises(InvalidInput, match="is not the one that"):
        rows(adapter, spectrum=True, basis=tmp_path / "other.safetensors")


def test_peft_s_own_with_a_basis_needs_trust(tmp_path: Path) -> None:
    """Where it began no file of PEFT's says: the scales of a basis file are taken if one says so."""
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    peft_models.trained_adapter(tmp_path / "adapter", "llama", base, target_modules=["q_proj"])
    basis = tmp_path / "basis.safetensors"
    frodctl.decompose(base, basis, target_modules="q_proj")
    with pytest.raises(InvalidInput, match=r"does not record which basis .*`trust_basis=True`"):
        rows(tmp_path / "adapter", spectrum=True, basis=basis)
    found = rows(tmp_path / "adapter", spectrum=True, basis=basis, trust_basis=True)
    assert all(row["scales_change_norm"] > 0 for row in found.values())


@pytest.mark.parametrize("ours", [True, False])
def test_without_its_basis_nothing_is_advised_that_does_not_exist(ours: bool, tmp_path: Path) -> None:
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    if ours:
        (tmp_path / "away").mkdir()
        frodctl.decompose(str(base), tmp_path / "away" / "basis.safetensors", target_modules="q_proj")
        adapter = write_adapter(tmp_path / "adapter", base, tmp_path / "away" / "basis.safetensors", 0.1)
    else:
        peft_models.trained_adapter(tmp_path / "adapter", "llama", base, save_projection=False)
        adapter = tmp_path / "adapter"
    with pytest.raises(InvalidInput, match=r"trained with \(`basis`\)$"):
        rows(adapter, base=str(base))


# Bases


def test_a_basis_and_its_base(example: Path, tmp_path: Path) -> None:
    basis = tmp_path / "b.safetensors"
    frodctl.decompose(str(example), basis, target_modules="all-linear")
    opened = frodctl.open_basis(basis)
    result = frodctl.inspect(str(basis), base=str(example)).targets[0]
    found = {row.values["name"]: row.values for row in result.rows}
    assert result.kind == "basis"
    assert result.summary["trainable_share"] == pytest.approx(
        result.summary["trainable_parameters"] / frodctl.inspect(str(example)).targets[0].summary["parameters"]
    )
    for category in result.summary["categories"]:
        V = to_torch(opened.tensor(f"V.{category['category']}")).double().numpy()
        assert category["condition_number"] == pytest.approx(np.linalg.cond(V), rel=1e-6)
        layers = [m.name for m in opened.metadata.modules if m.category == category["category"]]
        lambdas = np.stack([to_torch(opened.tensor(f"lambda.{name}")).double().numpy() for name in layers])
        sharing = 1 / (lambdas**4).sum(0)
        assert 1 <= sharing.min() <= sharing.max() <= len(layers) * (1 + 1e-6)
        assert category["sharing"] == pytest.approx(sharing, abs=1e-4)
        assert category["sharing_quantiles"]["p50"] == pytest.approx(np.median(sharing), rel=0.02)
    for record in opened.metadata.modules:
        row = found[f"lambda.{record.name}"]
        assert row["reconstruction_error"] < 1e-6
        assert row["base_digest"] == "same"
        assert row["maximum"] == float(to_torch(opened.tensor(f"lambda.{record.name}")).max())


def test_a_basis_of_another_base(example: Path, tmp_path: Path) -> None:
    basis = tmp_path / "b.safetensors"
    frodctl.decompose(str(example), basis, target_modules="q_proj")
    other = tmp_path / "other"
    shutil.copytree(example, other)
    file = json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.self_attn.q_proj.weight"
    state = load_file(other / file[name])
    state[name] = state[name] * 1.25
    save_file(state, other / file[name], {"format": "pt"})
    found = rows(basis, base=str(other))
    changed = found["lambda.model.layers.0.self_attn.q_proj"]
    assert changed["base_digest"] == "differs"
    assert changed["reconstruction_error"] == pytest.approx(0.2, rel=1e-3)
    assert found["lambda.model.layers.1.self_attn.q_proj"]["base_digest"] == "same"


def test_a_singular_basis_loses_what_lies_in_its_null_direction(example: Path, tmp_path: Path) -> None:
    basis = tmp_path / "b.safetensors"
    frodctl.decompose(str(example), basis, target_modules="q_proj")
    state = load_file(basis)
    with safe_open(basis, "pt") as file:
        kept = json.loads(file.metadata()["frodctl"])
    exact = rows(basis, base=str(example))
    ((category, _),) = kept["basis"].items()
    state[f"V.{category}"][:, -1] = 0
    del kept["digest"]
    kept["basis"][category] = digest(from_torch(state[f"V.{category}"]))
    save_file(state, basis, {"format": "pt", "frodctl": json.dumps(kept)})
    found = rows(basis, base=str(example))
    for name in (name for name in found if name.startswith("lambda.")):
        assert exact[name]["reconstruction_error"] < 0.01 < found[name]["reconstruction_error"] < 1


# Comparisons


def test_two_checkpoints(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    A = {"same": torch.randn(4, 4, generator=g), "moved": torch.randn(6, 4, generator=g), "cast": torch.ones(3),
         "grown": torch.ones(2, 2), "gone": torch.ones(1), "ids": torch.tensor([1, 2])}  # fmt: skip
    B = {"same": A["same"].clone(), "moved": A["moved"] + 0.1, "cast": torch.ones(3).half(), "grown": torch.ones(3, 2),
         "new": torch.ones(1), "ids": torch.tensor([1, 3])}  # fmt: skip
    save_file(A, tmp_path / "a.safetensors")
    save_file(B, tmp_path / "b.safetensors")
    result = frodctl.inspect(str(tmp_path / "a.safetensors"), against=str(tmp_path / "b.safetensors"), spectrum=True)
    found = {row.values["name"]: row.values for row in result.targets[0].rows}
    assert {name: row["status"] for name, row in found.items()} == {
        "same": "equal", "moved": "differs", "cast": "other dtype", "grown": "other shape", "gone": "only here",
        "new": "only there", "ids": "differs",
    }  # fmt: skip
    moved = found["moved"]
    a, b = A["moved"].double(), B["moved"].double()
    assert moved["relative_difference"] == pytest.approx(float((b - a).norm() / a.norm()))
    assert moved["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    assert moved["max_difference"] == pytest.approx(0.1, rel=1e-5)
    assert moved["difference_stable_rank"] == pytest.approx(1, rel=1e-5)  # 0.1 everywhere: rank one
    assert result.targets[0].summary == {
        "against": str(tmp_path / "b.safetensors"), "equal": 1, "different": 6,
        "statuses": {"equal": 1, "differs": 2, "other dtype": 1, "other shape": 1, "only here": 1, "only there": 1},
    }  # fmt: skip


def test_names_with_another_prefix_are_compared(tmp_path: Path) -> None:
    state = {f"layers.{i}.w": torch.full((2, 2), float(i)) for i in range(3)}
    save_file(state, tmp_path / "a.safetensors")
    save_file({f"model.{name}": tensor.clone() for name, tensor in state.items()}, tmp_path / "b.safetensors")
    result = frodctl.inspect(str(tmp_path / "a.safetensors"), against=str(tmp_path / "b.safetensors"))
    assert result.targets[0].summary["equal"] == 3


# Headers


def test_headers_of_a_checkpoint(example: Path) -> None:
    result = frodctl.inspect(str(example)).targets[0]
    state = {n: t for file in example.glob("*.safetensors") for n, t in load_file(file).items()}
    assert result.kind == "checkpoint"
    assert {row.values["name"]: row.values["shape"] for row in result.rows} == {
        n: list(t.shape) for n, t in state.items()
    }
    summary = result.summary
    assert summary["bytes"] == sum(t.nbytes for t in state.values())
    assert (summary["tensors"], summary["shards"], summary["architecture"]) == (len(state), 3, "LlamaForCausalLM")
    assert sum(role["parameters"] for role in summary["roles"]) == summary["parameters"]
    assert sum(category["layers"] for category in summary["decompose"]["categories"]) == 16


def test_selection_and_order(example: Path) -> None:
    found = rows(
        example, spectrum=True, include=("*q_proj*", "*k_proj*"), exclude=("*.0.*",), sort="-stable_rank", top=5
    )
    ranks = [row["stable_rank"] for row in found.values()]
    assert len(ranks) == 5
    assert ranks == sorted(ranks)
    assert all(("q_proj" in name or "k_proj" in name) and ".0." not in name for name in found)
    everything = rows(example, spectrum=True, include=("*q_proj*", "*k_proj*"), exclude=("*.0.*",))
    assert ranks == sorted(row["stable_rank"] for row in everything.values())[:5]
    assert list(rows(example, sort="name", top=2)) == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
    ]
    assert next(iter(rows(example, sort="parameters").values()))["parameters"] == 131072


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"spectrum": True, "estimate": True}, "exclude each other"),
        ({"sort": "beauty"}, "^`sort` beauty: no such column; there are: name, shape"),
        ({"sort": "stable_rank"}, "^`sort` stable_rank: no such column without `spectrum`; there are: name"),
        ({"sort": "-above_edge"}, "no such column without `spectrum`"),
        ({"sort": "delta_stable_rank"}, "which is of an adapter with its `base`"),
        ({"sort": "difference_stable_rank"}, "which is of a checkpoint `against` another, with `spectrum`"),
        (
            {"include": "*q_prj*"},
            r"^`include` \*q_prj\*: matches no name in .*tiny-llama; names there are model.embed_",
        ),
        ({"include": ["*q_proj*", "nothing", "*prj"]}, r"^`include` nothing, \*prj: matches no name"),
        ({"include": "*q_prj*", "spectrum": True}, "matches no name"),
        ({"top": 0}, "must be positive"),
        ({"base": "x"}, "goes with a basis or an adapter"),
        ({"spectrum": True, "device": "tpu"}, "not a device"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], text: str, example: Path) -> None:
    with pytest.raises(UsageError, match=text):
        rows(example, **options)


def test_what_is_included_must_be_somewhere(example: Path, tmp_path: Path) -> None:
    """In one of the targets, whatever their kind; and it is known before any row is computed."""
    save_file({"experts.up": torch.ones(2, 4, 4), "norm": torch.ones(4)}, tmp_path / "other.safetensors")
    frodctl.decompose(str(example), tmp_path / "basis.safetensors", target_modules="q_proj")
    other, basis = tmp_path / "other.safetensors", tmp_path / "basis.safetensors"
    counts = {
        ("*q_proj*", "norm"): [8, 0, 10],
        ("experts.up*",): [0, 2, 0],
        ("experts.up[[]1]",): [0, 1, 0],
        ("tau.*", "experts.up"): [0, 0, 1],  # the tensor is there, and its matrices have names of their own
    }
    for include, expected in counts.items():
        found = frodctl.inspect(example, other, basis, include=include, spectrum=True)
        assert [len(target.rows) for target in found.targets] == expected
    save_file({"broken": torch.full((4, 4), torch.nan)}, tmp_path / "broken.safetensors")
    with pytest.raises(UsageError, match=r"`include` \*x: matches no name in .*broken.safetensors"):
        frodctl.inspect(tmp_path / "broken.safetensors", other, include=["b*", "*x"], spectrum=True)
    compared = frodctl.inspect(other, against=example, include="*embed*").targets[0]
    assert [row.values["status"] for row in compared.rows] == ["only there"]
    with pytest.raises(UsageError, match="matches no name"):
        frodctl.inspect(other, against=example, include="*prj*")


@pytest.mark.parametrize("spectrum", [True, False])
def test_what_is_excluded_must_be_somewhere(spectrum: bool, example: Path, tmp_path: Path) -> None:
    save_file({"experts.up": torch.ones(2, 4, 4), "norm": torch.ones(4)}, tmp_path / "other.safetensors")
    other = tmp_path / "other.safetensors"
    assert frodctl.inspect(other, exclude="*", spectrum=spectrum).targets[0].rows == ()
    found = frodctl.inspect(other, example, exclude=["norm", "*q_proj*"], spectrum=spectrum)
    assert not [row for target in found.targets for row in target.rows if row.values["name"] == "norm"]
    frodctl.inspect(other, include="norm", exclude="*up*", spectrum=spectrum)  # there, though not included
    with pytest.raises(UsageError, match=r"`exclude` \*prj\*: matches no name in .*; names there are experts"):
        frodctl.inspect(other, exclude=["norm", "*prj*"], spectrum=spectrum)


def test_targets_are_taken_one_by_one_or_as_a_list(example: Path) -> None:
    expected = frodctl.inspect(example, str(example)).as_dict()
    assert (
        frodctl.inspect([example, example]).as_dict() == frodctl.inspect((example, str(example))).as_dict() == expected
    )
    for wrong in ((), ([],), (None,), (3,), ([example, None],)):
        with pytest.raises(UsageError, match="`targets`"):
            frodctl.inspect(*wrong)


def test_targets_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no weights here"):
        rows(tmp_path / "empty")
    with pytest.raises(FrodctlError, match="no such file"):
        rows(tmp_path / "missing")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InvalidInput, match="not a valid safetensors file"):
        rows(tmp_path / "x.safetensors")
