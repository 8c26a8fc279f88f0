"""How soon frodctl starts: its help, and inspect from headers alone, beside imports and Python itself.

python tests/bench/start.py [--model DIR] [--repeats 15]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from checkpoints import make_llama
from machine import description
from process import Row, in_turns, table


def measure(model: Path, repeats: int) -> list[Row]:
    """The starts in turns."""
    ours, python = [sys.executable, "-m", "frodctl"], [sys.executable, "-c"]
    commands = {
        "frodctl --help": [*ours, "--help"],
        "frodctl inspect, headers": [*ours, "inspect", str(model), "--json", "-q"],
        "python, nothing": [*python, "pass"],
        "python, numpy and scipy.linalg": [*python, "import numpy, scipy.linalg"],
        "python, torch": [*python, "import torch"],
    }
    return in_turns(commands, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(arguments.model or make_llama(Path(work, "model")), arguments.repeats)
    print(f"{description()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
