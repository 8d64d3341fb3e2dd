"""The ``l2a`` command. Each command makes one library call; heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from l2a_compress._cli.app import app
from l2a_compress._cli.extras import optional_packages
from l2a_compress.errors import L2AError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    An error of the library becomes one line on stderr and exit code 2; ``L2A_DEBUG=1`` shows the traceback instead.
    So does the lack of a package that an extra installs.
    Wrong usage is 2 as well, and Ctrl-C is 130.
    """
    try:
        with optional_packages():
            app(args=None if argv is None else list(argv), prog_name="l2a")
    except SystemExit as ended:  # how the app ends by itself
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except L2AError as error:
        if os.environ.get("L2A_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
