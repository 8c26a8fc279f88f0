"""``python -m frodctl``."""

import sys

from frodctl.cli.main import main

sys.exit(main())
