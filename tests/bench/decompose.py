"""frodctl decompose against PEFT's own initialisation, as whole processes on the same checkpoint, in turns.

    python tests/bench/decompose.py [--model DIR] [--repeats 3]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made. PEFT's process
loads the model (in bfloat16 as stored, or in float32), calls get_peft_model with an all-linear FrodConfig and
saves the adapter with its projections.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoints import make_llama
from machine import description
from process import Row, in_turns, table

PEFT = """
import sys, torch
sys.modules.update(torchao=None, bitsandbytes=None)  # nothing here needs them; where they are PEFT takes a second more
from peft import FrodConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
config = FrodConfig(task_type="CAUSAL_LM", target_modules="all-linear", sparse_rate=0.01, progressbar=False)
get_peft_model(model, config).save_pretrained(sys.argv[3])
"""


def measure(
    model: Path, work: Path, repeats: int, *, dtypes: Sequence[str] = ("bfloat16",), warm_up: bool = True
) -> list[Row]:
    """Both on the checkpoint; ``dtypes`` are those in which PEFT's process loads it."""
    basis = work / "basis.safetensors"
    ours = [sys.executable, "-m", "frodctl", "decompose", str(model), "--target-modules", "all-linear"]
    commands = {"frodctl decompose": [*ours, "--force", "-q", "-o", str(basis)]}
    for dtype in dtypes:
        commands[f"PEFT, {dtype}"] = [sys.executable, "-c", PEFT, str(model), dtype, str(work / f"peft-{dtype}")]
    return in_turns(commands, repeats, warm_up=warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = arguments.model or make_llama(work / "model")
        rows = measure(model, work, arguments.repeats, dtypes=("bfloat16", "float32"))
    print(f"{description()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
