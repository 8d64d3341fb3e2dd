"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from l2a_compress.errors import ConfigError, SessionError
from l2a_compress.reasoning import Tags

_AT_FIRST, _MORE = 256, 16  # tokens that are sorted, and times as many where these do not do
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: Only that many of the most likely tokens; 0 for all.
        top_p: Only the most likely tokens that have this much probability together, at least one.
        seed: Of the draws of one request; the same seed gives the same text whatever else is in its batch.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0 and finite, found {self.temperature!r}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, found {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], found {self.top_p!r}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, found {self.seed!r}")


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._draw = np.random.default_rng(settings.seed)

    def token(self, logits: Array) -> int:
        """One token from ``logits`` [vocabulary]; minus infinity forbids one.

        Raises:
            SessionError: a logit is not a number.
        """
        settings, best = self.settings, int(logits.argmax())
        if np.isnan(logits[best]):  # which counts as the largest
            raise SessionError("the model's logits are not numbers; export with another precision")
        if settings.temperature == 0:
            return best
        with np.errstate(over="ignore"):
            scaled = logits.astype(np.float64) / settings.temperature
        draw = self._draw.random()
        if not np.isfinite(scaled[best]):  # weights would be no numbers
            return best
        few = settings.top_k > 0
        order = _first(scaled, settings.top_k if few else _AT_FIRST)
        weights = np.exp(scaled[order] - scaled[best])
        whole = weights.sum() if few else np.exp(scaled - scaled[best]).sum()
        reach = settings.top_p if settings.top_p < 1 else draw
        while not few and len(order) < len(scaled) and weights.sum() <= reach * whole:
            order = _first(scaled, _MORE * len(order))
            weights = np.exp(scaled[order] - scaled[best])
        chances = (weights / whole).cumsum()
        if settings.top_p < 1:
            order = order[: int(np.searchsorted(chances, settings.top_p)) + 1]
            chances = chances[: len(order)] / chances[: len(order)][-1]
        return int(order[np.searchsorted(chances, draw, side="right").clip(0, len(order) - 1)])


def _first(values: Array, count: int) -> Array:
    """Places of that many of the largest ``values``, the largest first; of equal ones the first comes first."""
    found = np.arange(len(values))
    if count < len(values):
        found = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return found[np.argsort(-values[found], kind="stable")][:count]


class Endless(Sampler):
    """Takes the most likely token that is no tag."""

    def __init__(self, tags: Tags) -> None:
        super().__init__(Sampling())
        self._tags = [tags.think, tags.end_think, tags.answer, tags.end_answer]

    def token(self, logits: Array) -> int:
        """One token from ``logits`` [vocabulary]."""
        logits = logits.copy()
        logits[self._tags] = -np.inf
        return super().token(logits)
