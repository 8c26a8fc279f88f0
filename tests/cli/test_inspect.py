"""``frodctl inspect`` as a command: in pipes, on terminals of any width, over the Hub, and as pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import frodctl as api
from tests import peft_models
from tests.conftest import Run, on_a_terminal
from tests.hub_server import HubServer


def pipeline(command: str, example: Path, **env: str) -> str:
    """What a shell prints; the checkpoint is $MODEL, the command ``frodctl``."""
    python = f'frodctl() {{ "{sys.executable}" -m frodctl "$@"; }}; set -o pipefail; {command}'
    done = subprocess.run(
        ["bash", "-c", python], env={**os.environ, "MODEL": str(example), **env}, capture_output=True, text=True,
        timeout=600, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.stdout


def test_pipelines(example: Path) -> None:
    assert pipeline("frodctl inspect $MODEL | head -1", example).startswith("name\tshape\tdtype\tparameters\t")
    ordered = pipeline("frodctl inspect $MODEL --spectrum -q | tail -n +2 | sort -t$'\\t' -k5 -g | cut -f1,5", example)
    norms = [float(line.split("\t")[1]) for line in ordered.splitlines()]
    assert len(norms) == 57
    assert norms == sorted(norms)
    exact = {
        r.values["name"]: r.values["spectral_norm"] for r in api.inspect(str(example), spectrum=True).targets[0].rows
    }
    assert norms == pytest.approx(sorted(exact.values()), rel=1e-8)


def test_json_is_as_promised(example: Path, frodctl: Run) -> None:
    document = json.loads(frodctl("inspect", example, "--spectrum", "--json", "--top", "3").stdout)
    assert set(document) == {"schema_version", "targets"}
    (target,) = document["targets"]
    assert set(target) == {"target", "kind", "tensors", "summary"}
    wanted = ["name", "shape", "dtype", "parameters", "spectral_norm", "frobenius_norm", "nuclear_norm", "stable_rank",
              "effective_rank", "numerical_rank", "condition_number"]  # fmt: skip
    assert list(target["tensors"][0])[: len(wanted)] == wanted


def test_rows_in_every_format(example: Path, frodctl: Run) -> None:
    arguments = ("inspect", example, example, "--spectrum", "--include", "*q_proj*", "-q")
    lines = [json.loads(line) for line in frodctl(*arguments, "--format", "jsonl").stdout.splitlines()]
    assert len(lines) == 16
    table = list(csv.DictReader(io.StringIO(frodctl(*arguments, "--format", "csv").stdout)))
    assert [row["name"] for row in table] == [row["name"] for row in lines]
    assert [float(row["nuclear_norm"]) for row in table] == pytest.approx([row["nuclear_norm"] for row in lines])
    assert {row["target"] for row in table} == {str(example)}
    assert {row["shape"] for row in table} == {"128x128"}


def test_a_table_fits_the_terminal(example: Path) -> None:
    wide = on_a_terminal("inspect", example, "--spectrum", "-q", columns=140, NO_COLOR="1")
    assert "▁" in wide or "▂" in wide
    assert "cond" in wide
    narrow = on_a_terminal("inspect", example, "--spectrum", "--top", "4", columns=60, NO_COLOR="1")
    table = [line for line in narrow.splitlines() if "─" in line or ("proj" in line and ":" not in line)]
    assert table
    assert all(len(line) <= 60 for line in table)
    assert "No room for:" in narrow
    assert "\x1b[1m" in on_a_terminal("inspect", example)
    assert "\x1b[3" not in wide


def test_the_first_screen_says_what_it_is(example: Path, tmp_path: Path, frodctl: Run) -> None:
    shown = frodctl("inspect", example, "--format", "human").stdout
    assert "checkpoint, LlamaForCausalLM, 74 tensors, 1.51 M parameters, 3.0 MB (BF16) in 3 files" in shown
    assert "would take 16 weights" in shown
    basis = tmp_path / "basis.safetensors"
    api.decompose(str(example), basis, target_modules="q_proj")
    shown = frodctl("inspect", basis, "--format", "human", "--base", example).stdout
    assert "shared basis of" in shown
    assert "same" in shown
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    peft_models.trained_adapter(tmp_path / "adapter", "llama", base)
    shown = frodctl("inspect", tmp_path / "adapter", "--format", "human").stdout
    assert "written by PEFT" in shown
    shown = frodctl("inspect", tmp_path / "adapter", "--base", base, "--format", "human", env={"COLUMNS": "150"}).stdout
    assert "‖ΔW‖/‖W‖" in shown


def test_check_exits_with_5_if_anything_differs(example: Path, tmp_path: Path, frodctl: Run) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    for format_ in ("tsv", "json", "human"):
        assert (
            frodctl(
                "inspect", "one.safetensors", "--against", "two.safetensors", "--check", "--format", format_
            ).returncode
            == 5
        )
        assert (
            frodctl(
                "inspect", "one.safetensors", "--against", "one.safetensors", "--check", "--format", format_
            ).returncode
            == 0
        )
    assert frodctl("inspect", "one.safetensors", "--against", "two.safetensors").returncode == 0
    assert frodctl("inspect", "one.safetensors", "--check").returncode == 2


def large(folder: Path, shards: int = 20, tensors: int = 50) -> Path:
    """1,000 tensors in 20 shards of 13 MB, without a byte written of most of them."""
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"model.layers.{shard * tensors + i}.mlp.up_proj.weight" for i in range(tensors)]
        entries = {
            name: {"dtype": "BF16", "shape": [260, 512], "data_offsets": [i * 266240, (i + 1) * 266240]}
            for i, name in enumerate(names)
        }
        header = json.dumps(entries).encode()
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + tensors * 266240)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def test_headers_alone_need_no_torch(tmp_path: Path) -> None:
    folder = large(tmp_path / "large")
    program = (
        "import sys; from frodctl.cli.main import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'huggingface_hub'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(folder), "--json"], capture_output=True, text=True, check=True
    )
    (target,) = json.loads(done.stdout)["targets"]
    assert (target["summary"]["tensors"], target["summary"]["shards"]) == (1000, 20)


def test_remote_headers_are_a_hundredth_of_the_weights(tmp_path: Path, frodctl: Run) -> None:
    folder = large(tmp_path / "large")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 250e6
    with HubServer({"org/large": folder}) as hub:
        env = hub.env(tmp_path / "home", HF_HUB_OFFLINE="0")
        done = frodctl("inspect", "org/large", "--json", env=env)
        assert done.returncode == 0, done.stderr
        assert hub.bytes_sent < 0.01 * size
    (target,) = json.loads(done.stdout)["targets"]
    assert target["summary"]["tensors"] == 1000
    assert target["summary"]["revision"]


def test_an_adapter_on_the_hub(tmp_path: Path, frodctl: Run) -> None:
    base = peft_models.save_base(tmp_path / "base", "llama", torch.float32)
    peft_models.trained_adapter(tmp_path / "adapter", "llama", base)
    with HubServer({"org/adapter": tmp_path / "adapter", "org/base": base}) as hub:
        env = hub.env(tmp_path / "home", HF_HUB_OFFLINE="0")
        headers = frodctl("inspect", "org/adapter", "--json", env=env)
        assert json.loads(headers.stdout)["targets"][0]["kind"] == "adapter", headers.stderr
        whole = frodctl("inspect", "org/adapter", "--base", "org/base", "--json", env=env)
    local = frodctl("inspect", tmp_path / "adapter", "--base", base, "--json")
    tensors = [json.loads(done.stdout)["targets"][0]["tensors"] for done in (whole, local)]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_pictures(suffix: str, example: Path, tmp_path: Path, frodctl: Run) -> None:
    done = frodctl("inspect", example, "--plot", f"picture.{suffix}", "--exclude", "*embed*", "-q")
    assert done.returncode == 0, done.stderr
    data = (tmp_path / f"picture.{suffix}").read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
        return
    text = data.decode()
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    ET.fromstring(svg)
    assert "http" not in "".join(part for part in text.split('"') if part.endswith((".js", ".css")))
    # seven roles, a curve for each of eight layers, and the panel of ranks
    assert svg.count("<!-- mlp.") >= 3
    assert svg.count('id="axes_') == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--plot", "x.gif"], "must end with"),
        (["--plot", "missing/x.png"], "no such folder"),
        (["--plot", "x.png", "--estimate"], "--estimate does not have"),
        (["--plot", "x.png", "--include", "*norm*"], "nothing to draw"),
        (["--sort", "beauty"], "no such column"),
    ],
)
def test_pictures_that_cannot_be_drawn(
    arguments: list[str], text: str, example: Path, tmp_path: Path, frodctl: Run
) -> None:
    done = frodctl("inspect", example, *arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_replaced_by_force_only(example: Path, tmp_path: Path, frodctl: Run) -> None:
    (tmp_path / "x.svg").write_text("precious")
    arguments = ("inspect", example, "--include", "*q_proj*", "-q", "--plot", "x.svg")
    assert frodctl(*arguments).returncode == 2
    assert (tmp_path / "x.svg").read_text() == "precious"
    assert frodctl(*arguments, "--force").returncode == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_names_cannot_command_the_terminal_and_any_encoding_will_do(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    save_file({"evil\x1b[2Jname": torch.ones(4, 4)}, model)
    shown = pipeline("frodctl inspect $MODEL --spectrum --format human", model, PYTHONIOENCODING="ascii")
    assert "\x1b" not in shown
    assert r"evil\x1b[2Jname" in shown
