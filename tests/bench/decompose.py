"""frodctl decompose against PEFT's own initialisation, as whole processes on the same checkpoint, in turns.

    python tests/bench/decompose.py [--model DIR] [--repeats 3]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. PEFT's process
loads the model (in bfloat16 as stored, or in float32), calls get_peft_model with an all-linear FrodConfig and
saves the adapter with its projections.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path

import torch
from checkpoints import make_llama
from process import in_turns, print_table

PEFT = """
import sys, torch
from peft import FrodConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
config = FrodConfig(task_type="CAUSAL_LM", target_modules="all-linear", sparse_rate=0.01, progressbar=False)
get_peft_model(model, config).save_pretrained(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or make_llama(Path(work, "model"))
        ours = [sys.executable, "-m", "frodctl", "decompose", str(model), "--target-modules", "all-linear"]
        theirs = [sys.executable, "-c", PEFT, str(model)]
        commands = {
            "frodctl decompose": [*ours, "--force", "-q", "-o", f"{work}/basis.safetensors"],
            "PEFT, bfloat16": [*theirs, "bfloat16", f"{work}/peft16"],
            "PEFT, float32": [*theirs, "float32", f"{work}/peft32"],
        }
        results = in_turns(commands, arguments.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print_table(results, "frodctl decompose")


if __name__ == "__main__":
    main()
