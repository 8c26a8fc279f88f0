"""``frodctl decompose`` as a process: what it prints where, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import frodctl as package
from tests import forked
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint

COMMAND = [sys.executable, "-m", "frodctl", "decompose"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)


def one_error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error, after checking that it is one or two lines on stderr and nothing is on stdout."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Error: "))
    assert len(lines) - start <= 2
    assert "Traceback" not in result.stderr
    return "\n".join(lines[start:])


def test_help_is_examples_first(frodctl: Run) -> None:
    for flag in ("-h", "--help"):
        assert "decompose" in frodctl(flag).stdout
        text = frodctl("decompose", flag).stdout
        assert text.index("Examples:") < text.index("Options:")


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from frodctl.cli.main import main\n"
        "assert main(['--help']) == main(['decompose', '--help']) == 0\n"
        "assert 'frodctl.cli.decompose' in sys.modules\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_a_wrong_flag_does_not_import_torch() -> None:
    program = (
        "import sys; from frodctl.cli.main import main\n"
        "for command in ('decompose', 'merge', 'inspect'):\n"
        "    assert main([command, 'a', 'b', 'c', '--typo']) == main([command]) == 2\n"
        "    assert f'frodctl.cli.{command}' in sys.modules\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("No such option '--typo'") == 3


def test_dry_run_reads_headers_only(frodctl: Run, example: Path, tmp_path: Path) -> None:
    result = frodctl("decompose", example, "--dry-run")
    assert result.returncode == 0
    rows = list(csv.DictReader(io.StringIO(result.stdout), delimiter="\t"))
    assert [row["category"] for row in rows] == ["self_attn_q_proj", "self_attn_v_proj"]
    assert "Left out:" in result.stderr
    assert "not a default target" in result.stderr
    program = (
        "import sys; from frodctl.cli.main import main\n"
        f"assert main(['decompose', {str(example)!r}, '--dry-run', '--json']) == 0\n"
        "assert 'frodctl.jobs.decompose.plan' in sys.modules\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    damaged = {name: torch.full_like(weight, torch.nan) for name, weight in llama_layers(2).items()}
    save_checkpoint(tmp_path / "damaged", damaged, LLAMA_CONFIG)
    for arguments, code in ((["--dry-run"], 0), ([], 3)):
        assert frodctl("decompose", "damaged", "--target-modules", "all-linear", *arguments).returncode == code


def test_dry_run_and_run_agree_and_write_only_when_asked(frodctl: Run, model: Path, tmp_path: Path) -> None:
    plan = json.loads(frodctl("decompose", model, "--dry-run", "--json").stdout)
    assert not list(tmp_path.glob("*.frod*"))
    done = json.loads(frodctl("decompose", model, "--json").stdout)
    assert (tmp_path / "model.frod.safetensors").stat().st_size == plan["output_bytes"] == done["output_bytes"]
    assert plan["schema_version"] == done["schema_version"] == 1
    for key in ("parameters", "trainable_parameters", "trainable_share", "modules", "left_out", "peft_loadable"):
        assert plan[key] == done[key]
    assert {row["category"] for row in done["categories"]} == {row["category"] for row in plan["categories"]}


def test_every_format(frodctl: Run, model: Path) -> None:
    def run(*arguments: str) -> str:
        result = frodctl("decompose", model, "--target-modules", "all-linear", "--dry-run", *arguments)
        assert result.returncode == 0
        return result.stdout

    expected = [row["category"] for row in json.loads(run("--json"))["categories"]]
    measured = {"seconds_estimate": None}  # anew in each run
    assert json.loads(run("--format", "json")) | measured == json.loads(run("--json")) | measured
    assert [json.loads(line)["category"] for line in run("--format", "jsonl").splitlines()] == expected
    assert [row["category"] for row in csv.DictReader(io.StringIO(run("--format", "csv")))] == expected
    tsv = run()
    assert tsv == run("--format", "tsv")
    assert [line.split("\t")[0] for line in tsv.splitlines()] == ["category", *expected]
    human = run("--format", "human")
    assert all(category in human for category in expected)
    assert "\x1b" not in human


def test_quiet_leaves_stderr_empty(frodctl: Run, model: Path) -> None:
    result = frodctl("decompose", model, "-q")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("category\t")


def test_without_a_terminal_progress_is_plain_lines(frodctl: Run, model: Path) -> None:
    result = frodctl("decompose", model)
    assert "\x1b" not in result.stderr
    assert "\r" not in result.stderr
    assert "self_attn_q_proj" in result.stderr
    assert "Wrote model.frod.safetensors" in result.stderr


def test_a_closed_pipe_ends_quietly(model: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m frodctl decompose {model} --target-modules all-linear --dry-run -q | head -1"
    result = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    header, status = result.stdout.splitlines()
    assert header.startswith("category\t")
    assert (status, result.stderr) == ("0", "")


@pytest.mark.parametrize("arguments", ["--help", "decompose MODEL --json -q", "decompose MODEL --dry-run -q"])
def test_stdout_closed_before_anything_is_written(arguments: str, model: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = arguments.replace("MODEL", str(model)).split()
    result = subprocess.run(
        [sys.executable, "-m", "frodctl", *words], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
    shut = subprocess.run(["bash", "-c", f"{sys.executable} -m frodctl {' '.join(words)} --force >&-"], cwd=tmp_path,
                          capture_output=True, check=False) if "decompose" in words else None  # fmt: skip
    assert shut is None or shut.returncode == 0


def test_a_closed_stderr_does_not_stop_the_work(model: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, model, "-o", "b.safetensors"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, cwd=tmp_path, check=False)
    os.close(writer)
    assert result.returncode == 0
    package.open_basis(str(tmp_path / "b.safetensors")).verify()


def test_a_full_stdout_is_said_to_be_that(frodctl: Run, model: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "frodctl", "decompose", str(model), "-o", "b.safetensors", "-q"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (4, "Error: stdout: No space left on device\n")


def test_existing_output_needs_force(frodctl: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_text("precious")
    assert "exists" in one_error(frodctl("decompose", model, "-o", "b.safetensors"), 2)
    assert (tmp_path / "b.safetensors").read_text() == "precious"
    assert frodctl("decompose", model, "-o", "b.safetensors", "--force").returncode == 0
    package.open_basis(tmp_path / "b.safetensors").verify()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["model", "--target-modules", "c_attn"], 2, "down_proj, k_proj, q_proj, up_proj"),
        (["model", "--target-modules", "q_proj,k_prj"], 2, "nothing is called k_prj (did you mean k_proj?)"),
        (
            ["model", "--target-modules", "q_proj|k_proj"],
            2,
            "must match the whole path, as '.*\\.(q_proj|k_proj)' does",
        ),
        (["model", "--target-modules", "(("], 2, "regular expression"),
        (["model", "--layers", "7-9"], 2, "there is no block 7-9; the model has blocks 0-2"),
        (["model", "--layers", "0,99"], 2, "there is no block 99; the model has blocks 0-2"),
        (["model", "--layers", "x"], 2, "block numbers"),
        (["model", "--exclude-modules", "qproj"], 2, "nothing is called qproj (did you mean q_proj?)"),
        (["model", "--sparsity", "2"], 2, "--sparsity 2: must lie between 0 and 1"),
        (["model", "--budget", "0.001%"], 2, "the scales alone take"),
        (["model", "--budget", "lots"], 2, "expected a number such as 0.5, or per cent"),
        (["model", "--budget", "1%", "--sparsity", "0.1"], 2, "exclude each other"),
        (["model", "--allocate", "spectrum"], 2, "--allocate spectrum: needs a --budget"),
        (["model", "--alpha", "0"], 2, "positive"),
        (["model", "--device", "abacus"], 2, "not a device"),
        (["model", "--device", "meta"], 2, "float64"),
        (["model", "--cache-size", "much"], 2, "expected a size"),
        (["model", "--nonsense"], 2, "No such option"),
        (["model", "-o", "nowhere/b.safetensors"], 2, "no such folder"),
        (["model", "-o", "."], 2, "is a folder"),
        (["model", "-o", "b.st"], 2, "must end in .safetensors"),
        (["model", "-o", "b.bin", "--dry-run"], 2, "must end in .safetensors"),
        (["./missing"], 1, "no such file or folder"),
        (["model/config.json"], 3, "not a checkpoint"),
        (["model/model.safetensors", "--offline", "--subfolder", ""], 0, ""),
    ],
)
def test_bad_input(frodctl: Run, model: Path, arguments: list[str], code: int, text: str, tmp_path: Path) -> None:
    assert model == tmp_path / "model"
    result = frodctl("decompose", *arguments)
    if code == 0:
        assert result.returncode == 0
        return
    assert text in one_error(result, code)
    assert not list(tmp_path.glob("*.frod*"))


def test_default_needs_a_known_model_type(frodctl: Run, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "bare", llama_layers(2))
    assert "no config.json" in one_error(frodctl("decompose", "bare/model.safetensors"), 2)


def test_a_nan_is_named(frodctl: Run, tmp_path: Path) -> None:
    tensors = llama_layers(2)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_checkpoint(tmp_path / "model", tensors, LLAMA_CONFIG)
    error = one_error(frodctl("decompose", "model", "--target-modules", "all-linear"), 3)
    assert "model.layers.1.self_attn.q_proj.weight" in error
    assert not (tmp_path / "model.frod.safetensors").exists()


def test_a_quantized_checkpoint_is_refused(frodctl: Run, tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    save_checkpoint(tmp_path / "model", llama_layers(2), config)
    assert "full-precision" in one_error(frodctl("decompose", "model"), 3)


def test_a_truncated_shard(frodctl: Run, model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    error = one_error(frodctl("decompose", model), 3)
    assert "model.safetensors" in error
    assert "truncated" in error


@pytest.mark.parametrize("shard", ["missing.safetensors", "../outside.safetensors", "/etc/passwd"])
def test_an_index_that_names_what_is_not_there(frodctl: Run, model: Path, shard: str) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(llama_layers(3), shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    error = one_error(frodctl("decompose", model), 3)
    assert shard in error


@contextmanager
def short_files() -> Iterator[None]:
    """Files end at 4000 bytes, as a disk that fills up would have it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(frodctl: Run, model: Path, tmp_path: Path) -> None:
    with short_files():
        result = frodctl("decompose", model, "-o", "b.safetensors")
    one_error(result, 4)
    assert not (tmp_path / "b.safetensors").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert frodctl("decompose", model, "-o", "b.safetensors").returncode == 0
    assert not (tmp_path / "b.safetensors.partial").exists()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own at ``folder``, where mounting is allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_known_to_be_too_small(tmp_path: Path, frodctl: Run, model: Path) -> None:
    with mounted(tmp_path / "small", "size=16k") as disk:
        error = one_error(
            frodctl("decompose", model, "--target-modules", "all-linear", "-o", disk / "b.safetensors"), 4
        )
        assert "free" in error
        assert not list(disk.iterdir())


def test_a_target_that_cannot_be_written(frodctl: Run, model: Path) -> None:
    """/proc is there for everyone, and takes no files from anyone."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    error = one_error(frodctl("decompose", model, "-o", "/proc/b.safetensors"), 1)
    assert "/proc" in error


def test_a_read_only_disk(tmp_path: Path, frodctl: Run, model: Path) -> None:
    with mounted(tmp_path / "fixed", "ro") as disk:
        assert "not writable" in one_error(frodctl("decompose", model, "-o", disk / "b.safetensors"), 1)


def test_debug_shows_the_traceback(frodctl: Run) -> None:
    result = frodctl("decompose", "./missing", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, tmp_path: Path) -> None:
    """The finished categories stay for the next run; nothing is under the final name."""
    save_checkpoint(tmp_path / "model", llama_layers(3), LLAMA_CONFIG)
    words = ["decompose", "model", "--target-modules", "all-linear", "-o", "b.safetensors"]
    done = forked.frodctl(words, tmp_path, moment=(1, "mlp_up_proj"), number=number)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b.safetensors").exists()
    assert len(list(tmp_path.glob("b.safetensors.partial/*/*.safetensors"))) == 1


def test_version(frodctl: Run) -> None:
    assert package.__version__ in frodctl("--version").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion(frodctl: Run, shell: str) -> None:
    script = frodctl(env={"_FRODCTL_COMPLETE": f"{shell}_source"})
    assert (script.returncode, script.stderr) == (0, "")
    assert "_FRODCTL_COMPLETE" in script.stdout
    words = {"COMP_WORDS": "frodctl dec", "COMP_CWORD": "1"}
    assert "decompose" in frodctl(env={"_FRODCTL_COMPLETE": f"{shell}_complete", **words}).stdout


def test_a_budget_spread_by_the_spectra(frodctl: Run, model: Path) -> None:
    arguments = ("decompose", model, "--target-modules", "all-linear", "--budget", "20%", "--allocate", "spectrum")
    plan = json.loads(frodctl(*arguments, "--dry-run", "--json").stdout)
    assert {row["nnz"] for row in plan["categories"]} == {None}
    assert "by spectrum" in frodctl(*arguments, "--dry-run", "--format", "human").stdout
    done = json.loads(frodctl(*arguments, "--json").stdout)
    assert 0.19 * done["parameters"] < done["trainable_parameters"] <= plan["trainable_parameters"]
    rates = [row["sparsity"] / row["rms_singular_value"] for row in done["categories"] if row["sparsity"] < 1]
    assert rates == pytest.approx([rates[0]] * len(rates))


def test_one_basis_for_layers_of_one_input(frodctl: Run, example: Path) -> None:
    result = frodctl("decompose", example, "--share-input", "--dry-run", "--json")
    document = json.loads(result.stdout)
    shared = {"self_attn_q_proj_v_proj": ["q_proj", "v_proj"]}
    assert [(row["category"], row["layers"]) for row in document["categories"]] == [(*shared, 16)]
    assert (document["share_input"], document["peft_loadable"]) == (shared, False)
    assert "share a basis (self_attn_q_proj_v_proj), which PEFT cannot load; frodctl can." in result.stderr
    refused = frodctl("decompose", example, "--share-input", "--target-modules", "o_proj,down_proj")
    assert "Error: --share-input: no two of these modules" in one_error(refused, 2)
