"""How a command ends: its exit code, and one line on stderr for what a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from l2a_compress._cli.extras import optional_packages
from l2a_compress.errors import L2AError


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit code.

    An error of the library becomes one line on stderr and exit code 2; ``L2A_DEBUG=1`` shows the traceback instead.
    So does the lack of a package that an extra installs. Ctrl-C is 130.
    """
    try:
        with optional_packages():
            command()
    except SystemExit as ended:  # how a command line ends by itself
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except L2AError as error:
        if os.environ.get("L2A_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
