"""PEFT's FRoD model built by PEFT, and from a basis file: the call of get_peft_model alone, in processes of its own.

    python tests/bench/bridge.py [--model DIR] [--repeats 3] [--dtypes bfloat16 float32]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. Every linear layer is
targeted, at sparsity 0.01. PEFT decomposes the model, once for every build; frodctl.training.peft reads V from a file,
which `frodctl decompose` made before, and PEFT's own code does the rest. A process loads the model, then builds once.
The processor's time is the sum over its threads, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from checkpoints import make_llama
from process import printed_in_turns

import frodctl

BUILD = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
method, folder, basis, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
import peft
from frodctl.training.peft import get_peft_model
torch.randn(512, 512) @ torch.randn(512, 512)  # so that the threads are there
began = time.perf_counter(), time.process_time()
if method == "PEFT":
    config = peft.FrodConfig(target_modules="all-linear", sparse_rate=0.01, progressbar=False)
    peft.get_peft_model(model, config)
else:
    get_peft_model(model, basis)
print(json.dumps([time.perf_counter() - began[0], time.process_time() - began[1]]))
"""
OURS = "from a basis file"
METHODS = (OURS, "PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print(f"| base | built | wall-clock, median (min–max) | processor time | time / {OURS} |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        model, basis = arguments.model or make_llama(Path(work, "model")), Path(work, "basis.safetensors")
        frodctl.decompose(str(model), basis, target_modules="all-linear")
        for dtype in arguments.dtypes:
            cases = {method: [method, str(model), str(basis), dtype] for method in METHODS}
            found = printed_in_turns(BUILD, cases, arguments.repeats)
            for method in METHODS:
                wall, busy = ([run[i] for run in found[method]] for i in range(2))
                ratios = [theirs[0] / ours[0] for theirs, ours in zip(found[method], found[OURS], strict=True)]
                print(
                    f"| {dtype} | {method} | {statistics.median(wall):.1f} s ({min(wall):.1f}–{max(wall):.1f}) "
                    f"| {statistics.median(busy):.1f} s | {statistics.median(ratios):.1f}× |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
