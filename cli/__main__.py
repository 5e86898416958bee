"""``python -m nightpress.cli``."""

import sys

from .main import main

sys.exit(main())
