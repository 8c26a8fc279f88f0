"""``python -m frodctl``, which torchrun starts several of. (The script ``frodctl`` is always one process.)"""

import os
import sys

from frodctl.cli.main import main
from frodctl.jobs.ranks import Launch

sys.exit(main(launch=Launch(os.environ)))
