"""frodctl merge --as lora against PEFT's conversion of a LoHa adapter to LoRA, as whole processes in turns.

    python tests/bench/lora.py [--layers 30] [--rank 64] [--repeats 3]

A checkpoint with SmolLM2-135M's shapes and random bfloat16 weights, an adapter of frodctl's for all of its linear
layers, and in the other process a LoHa adapter of r = 8 for the same: PEFT has no conversion of FRoD's. Both load the
model and write a LoRA adapter. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from checkpoints import SMOLLM2_135M, make_llama, make_own_adapter
from machine import description
from process import in_turns

import frodctl

PEFT = """
import sys, torch
sys.modules.update(torchao=None, bitsandbytes=None)  # nothing here needs them; where they are PEFT takes a second more
from peft import LoHaConfig, get_peft_model, save_as_lora
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = get_peft_model(model, LoHaConfig(r=8, target_modules="all-linear", init_weights=False))
save_as_lora(sys.argv[2], model, rank=int(sys.argv[3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_llama(work / "model", SMOLLM2_135M | {"num_hidden_layers": arguments.layers})
        basis = work / "basis.safetensors"
        frodctl.decompose(str(model), basis, target_modules="all-linear")
        own = make_own_adapter(work / "own", model, basis)
        merge = [sys.executable, "-m", "frodctl", "merge", model, own, work / "ours", "--as", "lora", "-q", "--force"]
        commands = {
            "frodctl": [*map(str, merge), "--rank", str(arguments.rank), "--basis", str(basis)],
            "PEFT": [sys.executable, "-c", PEFT, str(model), str(work / "peft"), str(arguments.rank)],
        }
        rows = in_turns(commands, arguments.repeats)
    print(f"{description()}\n\n| command | wall-clock | CPU | peak memory |\n|---|---|---|---|")
    for row in rows:
        if row.error:
            print(f"| {row.command} | {row.error} | | |")
            continue
        figures = [
            statistics.median(getattr(run, key) for run in row.runs) for key in ("seconds", "cpu_seconds", "peak_mb")
        ]
        print("| {} | {:.1f} s | {:.1f} s | {:.0f} MB |".format(row.command, *figures))


if __name__ == "__main__":
    main()
