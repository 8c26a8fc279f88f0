"""frodctl inspect --spectrum against WeightWatcher, as whole processes on the same matrices, in turns.

    python -m venv ww
    ww/bin/pip install torch==2.13.0 weightwatcher==0.7.7 safetensors
    python tests/bench/inspect_spectrum.py --weightwatcher-python ww/bin/python [--model DIR] [--repeats 3]

Without --model, a checkpoint with SmolLM2-135M's shapes and random bfloat16 weights is made; its 210 projections
are measured. WeightWatcher's process loads the same ones into linear layers, in the dtype they are stored in, and
calls analyze() with its defaults: exact SVDs on the CPU, power-law fits with its own code, no Marchenko-Pastur fit, no
randomised matrices, no plots. Both print their figures as JSON. Its SVDs run on all cores by default, which is
slower than on one at these sizes, and much slower where other work shares the cores: so both are measured.

This file is not called inspect.py: a script's folder comes first on Python's path, and that name would hide the
standard library's module from every benchmark here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from checkpoints import make_llama
from machine import cores, description
from process import Row, in_turns, table

INCLUDE = "*_proj*"
WEIGHTWATCHER = """
import fnmatch, pathlib, sys, torch, weightwatcher
from safetensors.torch import load_file
layers = torch.nn.ModuleDict()
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    for name, weight in load_file(file).items():
        if weight.ndim == 2 and fnmatch.fnmatch(name, sys.argv[2]):
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight)
            layers[name.removesuffix(".weight").replace(".", "/")] = layer
details = weightwatcher.WeightWatcher(model=layers).analyze()
assert len(details) == len(layers) > 0
print(details.to_json(orient="records"))
"""


def measure(
    model: Path, repeats: int, weightwatcher: Path | None, *, include: str = INCLUDE, warm_up: bool = True
) -> list[Row]:
    """Both on the checkpoint's matrices; frodctl alone where there is no Python that has WeightWatcher."""
    ours = [sys.executable, "-m", "frodctl", "inspect", str(model), "--spectrum", "--include", include]
    commands = {"frodctl inspect": [*ours, "--json", "-q"]}
    if weightwatcher:
        theirs = [str(weightwatcher), "-c", WEIGHTWATCHER, str(model), include]
        for threads in sorted({1, cores()}):
            commands[f"WeightWatcher, threads: {threads}"] = ["env", f"OMP_NUM_THREADS={threads}", *theirs]
    return in_turns(commands, repeats, warm_up=warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weightwatcher-python", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or make_llama(Path(work, "model"))
        rows = measure(model, arguments.repeats, arguments.weightwatcher_python)
    print(f"{description()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
