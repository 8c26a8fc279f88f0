"""frodctl merge against PEFT's load, merge_and_unload and save_pretrained, as whole processes in turns.

    python tests/bench/merge.py [--model DIR] [--repeats 3] [--large]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. The adapters are
all-linear at sparsity 0.01, their numbers changed at random: one in PEFT's layout, which both merge, and one of
frodctl's, which PEFT cannot. --large also measures the peak memory of merging a checkpoint of 2 GB shards, at two
depths.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from checkpoints import make_adapter, make_llama, make_own_adapter, make_sharded_llama
from machine import description
from process import Row, in_turns, run, table

import frodctl

PEFT = """
import sys, torch
sys.modules.update(torchao=None, bitsandbytes=None)  # nothing here needs them; where they are PEFT takes a second more
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def measure(model: Path, work: Path, repeats: int, *, warm_up: bool = True) -> list[Row]:
    """Both on PEFT's adapter, and frodctl on one of its own, over one basis that is decomposed before."""
    basis = work / "basis.safetensors"
    frodctl.decompose(str(model), basis, target_modules="all-linear", force=True)
    adapter, own = make_adapter(work / "adapter", model, basis), make_own_adapter(work / "own", model, basis)
    commands = {
        "frodctl merge, PEFT's adapter": [*_merge(model, adapter, work / "merged"), "--force"],
        "frodctl merge, its own": [*_merge(model, own, work / "own-merged"), "--basis", str(basis), "--force"],
        "PEFT": [sys.executable, "-c", PEFT, str(model), str(adapter), str(work / "peft-merged")],
    }
    return in_turns(commands, repeats, warm_up=warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = measure(arguments.model or make_llama(work / "model"), work, arguments.repeats)
    print(f"{description()}\n\n{table(rows)}")
    if arguments.large:
        _print_large()


def _merge(model: Path, adapter: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "frodctl", "merge", str(model), str(adapter), str(out), "-q"]


def _print_large() -> None:
    print("\n| checkpoint of 2 GB shards | size | wall-clock | peak memory |\n|---|---|---|---|")
    for layers in (12, 36):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            model, basis = make_sharded_llama(work / "model", layers), work / "basis.safetensors"
            frodctl.decompose(str(model), basis, target_modules="q_proj,v_proj,gate_proj")
            adapter = make_adapter(work / "adapter", model, basis)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            measured = run(_merge(model, adapter, work / "out"))
        print(f"| {layers} layers | {size / 1e9:.1f} GB | {measured.seconds:.0f} s | {measured.peak_mb:.0f} MB |")


if __name__ == "__main__":
    main()
