"""``python -m frodctl``, which torchrun starts several of. (The script ``frodctl`` is always one process.)"""

import os
import sys

from frodctl.cli.main import main

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a page of addresses for ranks that do not meet
sys.exit(main(environ=os.environ))
