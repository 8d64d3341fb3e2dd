"""Run ``l2a`` from a checkout: ``python cli.py compress train``."""

from l2a_compress._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
