"""The ``l2a`` command. Each command makes one library call; heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Sequence

from l2a_compress._cli.app import app
from l2a_compress._cli.outcome import exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage is 2, as every error that the message explains."""
    return exit_code(lambda: app(args=None if argv is None else list(argv), prog_name="l2a"))
