"""Files that earlier versions wrote are read as they were then."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frodctl
from frodctl.checkpoint.records import Location
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import open_adapter
from frodctl.jobs.progress import Progress
from frodctl.training import peft as bridge
from frodctl.training.attached import updates_of
from tests import peft_models

VERSIONS = sorted(path for path in (Path(__file__).parent / "corpus").iterdir() if path.is_dir())
KINDS = ("lean", "self-contained", "selected")
NOTE = "parts have no digest"


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What one version wrote, in a folder that nothing else is in."""
    return Path(shutil.copytree(request.param, tmp_path / "corpus"))


def expected(corpus: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((corpus / "expected.json").read_text())
    return value


def model(example: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(example, dtype="auto")


def state(live: Any) -> dict[str, str]:
    return {
        f"{path}.adapters.default.{kind}": hashlib.sha256(getattr(update, kind).detach().numpy().tobytes()).hexdigest()
        for path, update in updates_of(live, "default").items()
        for kind in ("delta", "values")
    }


@pytest.mark.parametrize("given", [True, False], ids=["basis given", "basis found"])
@pytest.mark.parametrize("kind", KINDS)
def test_loading(kind: str, given: bool, corpus: Path, example: Path) -> None:
    options = {"basis": corpus / "basis.safetensors"} if given else {}
    with pytest.warns(UserWarning, match=NOTE) as record:
        live = frodctl.load_adapter(model(example), corpus / kind, **options)
    assert len([w for w in record if NOTE in str(w.message)]) == 1
    assert state(live) == expected(corpus)["loaded"][kind]


def test_attaching(corpus: Path, example: Path) -> None:
    with pytest.warns(UserWarning, match=NOTE) as record:
        live = frodctl.attach(model(example), corpus / "basis.safetensors")
    assert len([w for w in record if NOTE in str(w.message)]) == 1
    assert torch.equal(peft_models.logits(live), peft_models.logits(model(example)))


@pytest.mark.parametrize("kind", ["basis", *KINDS])
def test_inspecting(kind: str, corpus: Path) -> None:
    said: list[Progress] = []
    target = corpus / ("basis.safetensors" if kind == "basis" else kind)
    result = frodctl.inspect(target, spectrum=True, progress=said.append).targets[0]
    assert len([report for report in said if NOTE in report.text]) == 1
    wanted = expected(corpus)["inspected"][kind]
    assert result.kind == wanted["kind"]
    found = {row.values["name"]: row.values for row in result.rows}
    assert len(found) == len(wanted["rows"])
    for row in wanted["rows"]:
        assert found[row["name"]].keys() >= row.keys()
        for key, value in row.items():
            close = pytest.approx(value, rel=1e-6, abs=1e-12) if isinstance(value, float) else value
            assert found[row["name"]][key] == close, (row["name"], key)


def exact(corpus: Path, kind: str, base: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """W + W D diag(1/λ) M Vᵀ in float64 from the files, with V and D rounded as they were in training."""
    basis = load_file(corpus / "basis.safetensors")
    adapter = load_file(corpus / kind / "adapter_model.safetensors")
    own = json.loads((corpus / kind / "adapter_config.json").read_text())["frodctl"]
    stored = load_file(corpus / "self-contained" / "adapter_model.safetensors")
    for key, scales in adapter.items():
        if not key.endswith(".frod_lambda_l"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".frod_lambda_l")
        category = "_".join(module.split(".")[-2:])
        V = basis[f"V.{category}"].double()
        D = torch.linalg.inv(V).T
        if category in own["dtype"]:
            assert own["dtype"][category] == "BF16"
            V, D = V.bfloat16().double(), D.bfloat16().double()
        start = basis[f"lambda.{module}"].double()
        M = torch.diag(scales.double() - start)
        positions = adapter.get(f"base_model.indices.{category}", stored[f"base_model.frod_s_indices.{category}"])
        M[positions[0], positions[1]] += adapter[key.replace("lambda_l", "lambda_s_values")].double()
        W = base[f"{module}.weight"].double()
        yield f"{module}.weight", W + W @ D @ torch.diag(1 / start) @ M @ V.T


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind: str, corpus: Path, example: Path, tmp_path: Path) -> None:
    """Each weight rounded once; all others byte for byte the base's."""
    result = frodctl.merge(example, corpus / kind, tmp_path / "out")
    assert len([text for text in result.plan.warnings if NOTE in text]) == 1
    base = {name: t for file in example.glob("*.safetensors") for name, t in load_file(file).items()}
    found = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert found.keys() == base.keys()
    merged = dict(exact(corpus, kind, base))
    assert len(merged) == 16
    for name, W in merged.items():
        # exact values this close to the middle between two bfloat16 numbers may go to either: the change is computed in
        # float32, and may nearly cancel the weight
        slip = 1e-5 * W.abs() + 1e-6 * base[name].double().abs()
        assert ((W - slip).bfloat16() <= found[name]).all(), name
        assert ((W + slip).bfloat16() >= found[name]).all(), name
        assert (found[name] == W.bfloat16()).double().mean() > 0.9995, name
        assert (found[name] != base[name]).double().mean() > 0.2
    for name in base.keys() - merged.keys():
        assert torch.equal(found[name].view(torch.uint8), base[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_bridge(kind: str, corpus: Path, example: Path) -> None:
    loaded = bridge.load(model(example).float(), corpus / kind)
    live = frodctl.load_adapter(model(example).float(), corpus / kind)
    wanted, found = peft_models.logits(live.eval()), peft_models.logits(loaded)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_adapter(kind: str, corpus: Path, example: Path, tmp_path: Path) -> None:
    """Of a format that this version does not know."""
    file = corpus / kind / "adapter_config.json"
    config = json.loads(file.read_text())
    config["frodctl"]["version"] = 99
    file.write_text(json.dumps(config))
    for read in (
        lambda: frodctl.load_adapter(model(example), corpus / kind),
        lambda: frodctl.merge(example, corpus / kind, tmp_path / "out"),
        lambda: frodctl.inspect(corpus / kind),
        lambda: bridge.load(model(example), corpus / kind),
    ):
        with pytest.raises(InvalidInput, match=r"adapter format 99.*update frodctl") as error:
            read()
        assert error.value.exit_code == 3


def test_saving_one_again_records_the_digests(corpus: Path, example: Path, tmp_path: Path) -> None:
    """What was loaded and saved is in today's form: nothing to be said of it."""
    with pytest.warns(UserWarning, match=NOTE):
        live = frodctl.load_adapter(model(example), corpus / "self-contained")
    frodctl.save_adapter(live, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = frodctl.load_adapter(model(example), tmp_path / "again")
    assert state(again) == state(live)
    adapter = open_adapter(Location(str(tmp_path / "again")))
    assert not adapter.lacking
