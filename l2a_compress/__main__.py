"""``python -m l2a_compress`` is ``l2a``."""

import sys

from l2a_compress._cli import main

sys.exit(main())
