"""`python -m candle_phi`."""

import sys

from .cli import main

sys.exit(main())
