"""``python -m tlkernels``."""

import sys

from tlkernels.cli import main

sys.exit(main())
