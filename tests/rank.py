"""One of torchrun's ranks, of which one kills itself at a moment of `tests.forked`'s.

python -m tests.rank RANK NUMBER WORD COMMAND...
"""

from __future__ import annotations

import os
import signal
import sys

from frodctl.cli.main import main
from tests import forked

if __name__ == "__main__":
    rank, number, word, *command = sys.argv[1:]
    if os.environ["RANK"] == rank:
        forked.end_at((int(number), word), signal.SIGKILL)
    sys.exit(main(command, os.environ))
