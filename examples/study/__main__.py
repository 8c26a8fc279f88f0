"""Runs a part of the study, or goes on with it.

    pip install 'frodctl[test]' && python -m examples.study --part methods --output study.jsonl

Each run is a line of the output. What is there already is not run again, so that a part may be stopped at any time, and
several parts go into one file. `python -m examples.study.report study.jsonl` makes the tables and plots.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import transformers

from .parts import PARTS, Lab
from .tasks import Sizes, checkpoints

SHORT = Sizes(train=24, held_out=8, tokens=10, batch=4)
SHORTER: dict[str, Any] = {"rated": [], "few": ["tagging"], "multiples": [1]}  # of `Lab`


class Stopped(Exception):
    """The time is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="by default all, one after the other")
    parser.add_argument("--output", type=Path, default=Path("study.jsonl"), help="file of all runs")
    parser.add_argument("--folder", type=Path, help="for checkpoints and bases; by default one that is taken away")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="little of everything, two layers: does it run?")
    parser.add_argument("--seconds", type=float, help="stop after the run that exceeds them; start again to go on")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.monotonic()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if arguments.seconds and time.monotonic() - started > arguments.seconds:
            raise Stopped

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        made = checkpoints(folder, 2 if arguments.short else None)
        lab = Lab(arguments.output, made, Sizes(), arguments.steps, range(arguments.seeds), say)
        if arguments.short:
            lab = Lab(arguments.output, made, SHORT, 2, range(1), say, **SHORTER)
        try:
            for part in [arguments.part] if arguments.part else PARTS:
                PARTS[part](lab)
        except Stopped:
            sys.exit("stopped; start again to go on")


if __name__ == "__main__":
    main()
