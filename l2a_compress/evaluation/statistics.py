"""Intervals and the shape of a frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from l2a_compress.evaluation.values import Point

__all__ = ["FrontierCheck", "check_frontier", "clustered", "paired", "wilson"]

_Z95 = 1.959963984540054  # the 97.5th percentile of the normal distribution


def wilson(hits: float, trials: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927); unlike the normal one it stays in [0, 1]."""
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"wilson: {hits} hits of {trials} trials")
    share, spread = hits / trials, _Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # At the ends the bound is exactly 0 or 1, and rounding must not say otherwise.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == trials else centre + half)


def clustered(hits: Sequence[int], trials: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a share whose trials come in clusters: tokens of a problem, or seeds on the same problem.

    Trials of one cluster are alike, so that they tell less than as many of their own would. Wilson's interval is taken
    at the number of independent trials that has the variance between clusters (Kish's design effect, at least 1; where
    all trials come out alike, the number of clusters). With one trial a cluster it is :func:`wilson`.

    Args:
        hits: Of each cluster.
        trials: Of each cluster, at least 1.
    """
    count, total, right = len(trials), sum(trials), sum(hits)
    if count == total:
        return wilson(right, total)
    share, effective = right / total, float(count)
    if count > 1 and 0 < right < total:
        spread = sum((hit - share * tried) ** 2 for hit, tried in zip(hits, trials, strict=True))
        variance = count / (count - 1) * spread / total**2
        effective = total / max(variance * (total - 1) / (share * (1 - share)), 1.0)
    return wilson(share * effective, effective)


def paired(
    outcomes: Sequence[str | float], others: Sequence[str | float], *, comparisons: int = 1
) -> tuple[float, float, float]:
    """The mean difference of two points on the same problems, with its 95 % interval: (difference, low, high).

    Problems that both get right, or both wrong, say nothing about the difference, so it is known far better than two
    separate accuracies are. The interval is the normal one of the mean of the differences.

    Args:
        outcomes: a digit a problem, 1 for a right answer (:attr:`Point.outcomes`), or a number a problem
            (:attr:`Point.nll_by_problem`).
        others: of what is compared with.
        comparisons: how many are made at a time; the intervals are those that hold together (Bonferroni's).

    Raises:
        ValueError: they are not of the same problems.
    """
    if len(outcomes) != len(others) or not outcomes:
        raise ValueError(f"paired: outcomes of {len(outcomes)} and {len(others)} problems")
    gaps = [float(a) - float(b) for a, b in zip(outcomes, others, strict=True)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1) / len(gaps))
    half = spread * (_Z95 if comparisons == 1 else NormalDist().inv_cdf(1 - 0.025 / comparisons))
    return mean, mean - half, mean + half


@dataclass(frozen=True, kw_only=True)
class FrontierCheck:
    """Whether more budget never means a lower quality than chance explains.

    Attributes:
        monotone: No point lies below one of a smaller budget by more than chance explains: problem by problem, by
            intervals of 95 % for all pairs of points together; of points without outcomes their intervals do not
            overlap.
        largest_inversion: The most by which a smaller budget was better, as a difference of shares; 0 for none.
        between: The two budgets of that inversion, the smaller first; empty for none.
    """

    monotone: bool
    largest_inversion: float
    between: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {**self.__dict__, "between": list(self.between)}


def check_frontier(points: Sequence[Point]) -> FrontierCheck:
    """Compares each two points of one contract."""
    ordered = sorted(points, key=lambda point: point.budget)
    pairs = [(low, high) for at, low in enumerate(ordered) for high in ordered[at + 1 :]]
    worst = max(pairs, key=lambda pair: pair[0].accuracy - pair[1].accuracy, default=None)
    apart = any(_is_below(high, low, len(pairs)) for low, high in pairs)
    if worst is None or worst[0].accuracy <= worst[1].accuracy:
        return FrontierCheck(monotone=not apart, largest_inversion=0.0)
    return FrontierCheck(
        monotone=not apart,
        largest_inversion=worst[0].accuracy - worst[1].accuracy,
        between=(worst[0].budget, worst[1].budget),
    )


def _is_below(point: Point, other: Point, comparisons: int) -> bool:
    """Whether a point is worse than another beyond chance."""
    if point.accuracy >= other.accuracy:
        return False
    ours, theirs = (one.outcomes or one.agreement_by_problem for one in (point, other))
    if (point.seed, point.n, len(ours)) != (other.seed, other.n, len(theirs)) or not ours:
        return point.accuracy_high < other.accuracy_low
    return paired(ours, theirs, comparisons=comparisons)[2] < 0
