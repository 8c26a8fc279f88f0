"""frodctl merge against PEFT's load, merge_and_unload and save_pretrained, as whole processes in turns.

    python tests/bench/merge.py [--model DIR] [--repeats 3] [--large]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. The adapter is
all-linear at sparsity 0.01, made by PEFT, its numbers changed at random. --large also measures the peak memory of
merging a checkpoint of 2 GB shards, at two depths.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path

import torch
from checkpoints import make_adapter, make_llama, make_sharded_llama
from process import in_turns, print_table, run

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or make_llama(Path(work, "model"))
        adapter = make_adapter(Path(work, "adapter"), model)
        commands = {
            "frodctl merge": [*_merge(model, adapter, f"{work}/ours"), "--force"],
            "PEFT": [sys.executable, "-c", PEFT, str(model), str(adapter), f"{work}/theirs"],
        }
        results = in_turns(commands, arguments.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print_table(results, "frodctl merge")
    if arguments.large:
        _print_large()


def _merge(model: Path, adapter: Path, out: str) -> list[str]:
    return [sys.executable, "-m", "frodctl", "merge", str(model), str(adapter), out, "-q"]


def _print_large() -> None:
    print("\n| checkpoint of 2 GB shards | size | wall-clock | peak memory |\n|---|---|---|---|")
    for layers in (12, 36):
        with tempfile.TemporaryDirectory() as work:
            model = make_sharded_llama(Path(work, "model"), layers)
            adapter = make_adapter(Path(work, "adapter"), model, targets=["q_proj", "v_proj", "gate_proj"])
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            measured = run(_merge(model, adapter, f"{work}/out"))
        print(f"| {layers} layers | {size / 1e9:.1f} GB | {measured.seconds:.0f} s | {measured.peak_mb:.0f} MB |")


if __name__ == "__main__":
    main()
