"""PEFT's FRoD model built by PEFT, and from a basis file: get_peft_model, and a first forward pass of 8 tokens.

    python tests/bench/bridge.py [--model DIR] [--repeats 3] [--dtypes bfloat16 float32]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. Every linear layer is
targeted, at sparsity 0.01. PEFT decomposes the model, once for every build; frodctl.training.peft reads V from a file,
which `frodctl decompose` made before, and PEFT's own code does the rest; U is derived in the first forward pass.
A process loads the model, then builds once.
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
model(torch.arange(8)[None])  # so that the threads are there
began = time.perf_counter()
if method == "PEFT":
    config = peft.FrodConfig(target_modules="all-linear", sparse_rate=0.01, progressbar=False)
    model = peft.get_peft_model(model, config)
else:
    model = get_peft_model(model, basis)
built = time.perf_counter()
model(torch.arange(8)[None])
print(json.dumps([built - began, time.perf_counter() - began]))
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
    print(f"| base | built | get_peft_model, median (min–max) | time / {OURS} | with a forward pass | time / {OURS} |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        model, basis = arguments.model or make_llama(Path(work, "model")), Path(work, "basis.safetensors")
        frodctl.decompose(str(model), basis, target_modules="all-linear")
        for dtype in arguments.dtypes:
            cases = {method: [method, str(model), str(basis), dtype] for method in METHODS}
            found = printed_in_turns(BUILD, cases, arguments.repeats)
            for method in METHODS:
                cells = []
                for i in range(2):
                    seconds = [run[i] for run in found[method]]
                    ratios = [theirs[i] / ours[i] for theirs, ours in zip(found[method], found[OURS], strict=True)]
                    cells.append(f"{statistics.median(seconds):.1f} s ({min(seconds):.1f}–{max(seconds):.1f})")
                    cells.append(f"{statistics.median(ratios):.1f}×")
                print(f"| {dtype} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
