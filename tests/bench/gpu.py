"""What a GPU makes of it: decompose, merge, inspect --spectrum and training steps in the shapes of Llama-3.1-8B.

    python tests/bench/gpu.py                          every figure; where there is no GPU, it says so and ends
    python tests/bench/gpu.py --layers 32              all of the model's layers: 14 GB of weights, and as much disk
    python tests/bench/gpu.py --device cpu --small     tiny matrices, to see that all works

The weights are random, in bfloat16, of all linear layers of the blocks: n = 4096 six times and 14336 once. A command
runs once for its time and its memory, and once more with `profile=True`. "products" are all dense routines of linear
algebra but those that find eigenvalues or singular values, which stand beside them; "of GEMM" is the speed over that of
a large product on the same device, in the same dtype.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from checkpoints import SMOLLM2_135M, make_llama
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import frodctl
from frodctl.method.profile import Step

LLAMA_8B = SMOLLM2_135M | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
}
SMALL = LLAMA_8B | {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
EIGENVALUES = {"syevd", "syevr", "eigvalsh", "svdvals", "svd"}
METHODS = ("full", "input", "weight")


class Device:
    """Where everything is computed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_gpu = torch.device(name).type == "cuda"

    def __str__(self) -> str:
        return torch.cuda.get_device_name(self.name) if self.is_gpu else "the CPU"

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until all of the work is done."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def forget_peak(self) -> None:
        """Have the peak of memory begin anew."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.name)

    def peak(self) -> str:
        """The most memory that torch has held on the GPU."""
        return f"{torch.cuda.max_memory_reserved(self.name) / 1e9:.1f} GB" if self.is_gpu else "–"

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.name)


def training(model: Path, basis: Path, device: Device, tokens: int, steps: int, adapter: Path) -> str:
    """Tokens per second of each method, and the adapter of the last one."""
    rows = []
    for method in METHODS:
        device.forget_peak()
        live: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        live.to(device.name)
        if method != "full":
            frodctl.attach(live, basis, form=method)
        step = _step(live, method, tokens, device)
        device.timed(step)  # to warm up
        seconds = statistics.median(device.timed(step) for _ in range(steps))
        rows.append((method, tokens, f"{tokens / seconds:.0f}", f"{seconds:.3f} s", device.peak()))
    frodctl.save_adapter(live, adapter)
    return table(("method", "tokens a step", "tokens/s", "step", "memory"), rows)


def _step(model: Any, method: str, tokens: int, device: Device) -> Callable[[], None]:
    trained = model.parameters() if method == "full" else frodctl.parameter_groups(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    length = min(tokens, 1024)
    ids = torch.randint(0, 1000, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device.name)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def command(name: str, run: Callable[..., Any], device: Device) -> tuple[tuple[object, ...], str]:
    """The command's line in the table of commands, and a table of its routines."""
    device.forget_peak()
    seconds, memory = device.timed(run), device.peak()
    steps = [step for step in run(profile=True).profile if step.flops]
    products = [step for step in steps if step.name not in EIGENVALUES | {"csrmm"}]
    others = [step for step in steps if step.name in EIGENVALUES]
    row = (name, f"{seconds:.2f} s", memory, *_spent(products), *_spent(others))
    routines = [
        (s.name, s.dtype, s.calls, f"{s.seconds:.3f} s", f"{s.flops / s.seconds / 1e12:.2f}", f"{s.gemm_share:.0%}")
        for s in steps
    ]
    return row, table(("routine", "dtype", "calls", "time", "TFLOP/s", "of GEMM"), routines)


def _spent(steps: Sequence[Step]) -> tuple[str, str]:
    """Their time, and their share of the GEMM peak over that time."""
    seconds = sum(step.seconds for step in steps)
    if not seconds:
        return "–", "–"
    share = sum((step.gemm_share or 0.0) * step.seconds for step in steps) / seconds
    return f"{seconds:.3f} s", f"{share:.0%}"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def measure(work: Path, config: dict[str, Any], device: Device, tokens: int, steps: int) -> None:
    """Make the checkpoint and print the tables."""
    model, basis, adapter = make_llama(work / "model", config), work / "basis.safetensors", work / "adapter"
    rows, routines = [], {}

    def add(name: str, run: Callable[..., Any]) -> None:
        row, routines[name] = command(name, run, device)
        rows.append(row)

    def on(job: Callable[..., Any], *arguments: object, **options: Any) -> Callable[..., Any]:
        return lambda **more: job(*arguments, device=device.name, **options, **more)

    add("decompose", on(frodctl.decompose, model, basis, target_modules="all-linear", force=True))
    trained = training(model, basis, device, tokens, steps, adapter)
    add("merge", on(frodctl.merge, model, adapter, work / "merged", basis=basis, force=True))
    add("inspect --spectrum", on(frodctl.inspect, model, spectrum=True))
    heads = ("command", "time", "memory", "products", "of GEMM", "eigen- and singular values", "of GEMM")
    print(table(heads, rows), end="\n\n")
    print(f"A training step, bfloat16, AdamW:\n\n{trained}", end="\n\n")
    for name, found in routines.items():
        print(f"{name}, routine by routine:\n\n{found}", end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a training step")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = Device(arguments.device)
    if device.is_gpu and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU here: nothing to measure")
        return
    disable_progress_bar()
    config = (SMALL if arguments.small else LLAMA_8B) | {"num_hidden_layers": arguments.layers}
    print(f"{device}; {machine.description()}", end="\n\n")
    print(f"{arguments.layers} layers, n = {config['hidden_size']} and {config['intermediate_size']}", end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), config, device, 64 if arguments.small else arguments.tokens, arguments.steps)


if __name__ == "__main__":
    main()
