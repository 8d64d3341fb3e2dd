"""``l2a-lm-eval``: the command of lm-evaluation-harness with the model ``l2a``; it imports neither before it is run."""

from __future__ import annotations

from importlib.util import find_spec

from l2a_compress._cli.outcome import exit_code
from l2a_compress.errors import ConfigError


def main() -> int:
    """Run it with the arguments of this process and return its exit code."""
    return exit_code(_evaluate)


def _evaluate() -> None:
    if find_spec("lm_eval") is None:  # one line that names both extras, in the place of one for each
        raise ConfigError("lm-eval is not installed: pip install 'l2a-compress[train,lm-eval]'")
    from l2a_compress.evaluation.lm_eval_adapter import main as evaluate

    evaluate()
