"""The embedded task as a map-style sequence of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from l2a_compress.embedded import task
from l2a_compress.errors import ConfigError
from l2a_compress.training.examples import Example, Split, Style, position
from l2a_compress.training.mixture import MapStyle

__all__ = ["EmbeddedExamples"]

_TRAIN_SIZE = 1_000_000
_OTHER_SIZE = 2_000
_CALIBRATION_SHARE = 0.25  # of the prompts that the task holds out
_STEPS = {"easy": (0, 1), "medium": (2, 3), "hard": (4, task.MAX_STEPS)}


class EmbeddedExamples(MapStyle[Example]):
    """Generated problems; problem ``i`` depends only on the split, the seed, the subset and ``i``.

    The task itself keeps one prompt in eight away from training; a quarter of those are for calibration and the rest
    is ``heldout``, so that the split does not depend on the shares of a config.
    """

    def __init__(self, *, split: Split, seed: int, limit: int | None = None, subset: str | None = None) -> None:
        """Plans the problems.

        Args:
            split: ``train``, ``heldout`` or ``calibration``; no two share a prompt.
            seed: At least 0.
            limit: How many; by default 1,000,000 to train on and 2,000 of the other splits.
            subset: A family, a wording, a difficulty, or ``crowded``: more distractors than are trained on. By default
                all of them, except the unseen wording and ``crowded``.

        Raises:
            ConfigError: The subset is not known.
        """
        self._split = split
        self._seed = seed
        self._size = limit if limit is not None else (_TRAIN_SIZE if split == "train" else _OTHER_SIZE)
        self._options = _options(subset)

    def __len__(self) -> int:
        return self._size

    def problem(self, index: int) -> task.Problem:
        """The generated problem behind example ``index``."""
        digest = hashlib.blake2b(f"{self._split}:{self._seed}:{index}".encode(), digest_size=8).digest()
        wanted: task.Split = "train" if self._split == "train" else "heldout"
        stream = task.problems(seed=int.from_bytes(digest, "big"), split=wanted, **self._options)
        return next(problem for problem in stream if self._is_mine(problem.prompt))

    def _is_mine(self, prompt: str) -> bool:
        return self._split == "train" or (self._split == "calibration") == (position(prompt) < _CALIBRATION_SHARE)

    def _item(self, index: int) -> Example:
        problem = self.problem(index)
        traces: dict[Style, str] = {"long": problem.long, "short": problem.short, "brief": problem.brief}
        meta: dict[str, str | int] = {
            "source": "embedded",
            "family": problem.family,
            "wording": problem.wording,
            "difficulty": problem.difficulty,
            "steps": problem.steps,
            "distractors": problem.distractors,
        }
        return Example(
            prompt=problem.prompt,
            traces=traces,
            answer=problem.answer,
            kind="reasoning",
            meta=meta,
            names_style=True,
        )


def _options(subset: str | None) -> Mapping[str, Any]:
    if subset is None:
        return {}
    wordings = (*task.WORDINGS, task.UNSEEN_WORDING)
    if subset in task.FAMILIES:
        return {"families": (subset,)}
    if subset in wordings:
        return {"wordings": (subset,)}
    if subset in _STEPS:
        return {"steps": _STEPS[subset]}
    if subset == "crowded":
        return {"distractors": task.UNSEEN_DISTRACTORS}
    known = ", ".join([*task.FAMILIES, *wordings, *_STEPS, "crowded"])
    raise ConfigError(f"data.subset of the embedded task must be one of {known}; found {subset!r}")
