"""Measures ways to split the work of a request between compute a token and reasoning tokens.

calibration problems -> every pair (compute, cap on think tokens) generated -> work, accuracy -> Split.best_of
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.evaluation.frontier import Progress, bench_of, evaluating, measure_all, think_cap
from l2a_compress.evaluation.points import allocate, dense_run, point_of
from l2a_compress.evaluation.values import Point
from l2a_compress.split import Split, SplitPoint

if TYPE_CHECKING:
    from l2a_compress.training.store import LoadedArtifact

__all__ = ["MeasuredSplit", "measure_split"]


@dataclass(frozen=True)
class MeasuredSplit:
    """All that was measured, the dense model first, and the splits that no other beats."""

    dense: Point
    points: tuple[Point, ...]
    split: Split


def measure_split(
    artifact: LoadedArtifact,
    *,
    computes: Sequence[float],
    think_shares: Sequence[float],
    problems: int = 300,
    seed: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> MeasuredSplit:
    """Measures every pair of a compute budget (a cap) and a cap on think tokens on calibration problems.

    Args:
        artifact: The model.
        computes: Compute budgets, shares of the dense compute of a token.
        think_shares: Caps on think tokens as shares of the gates' ``think_reference``; 1 stands for no cap.
        problems: Of the recipe's calibration split; they are neither trained on nor what ``evaluate`` measures.
        seed: Of generated problems; by default the recipe's.
        batch_size: Most problems that run together.
        progress: Told how far it is.

    Raises:
        ConfigError: there is nothing to measure, or the data has no answers to compare with.
        BudgetError: a budget the model cannot keep to.
    """
    if not computes or not think_shares or problems < 1:
        raise ConfigError("a split needs at least one compute budget, one think share and one problem")
    if wrong := [share for share in think_shares if not 0 < share <= 1]:
        raise ConfigError(f"think share {wrong[0]:g}: must be above 0 and at most 1")
    recipe, seed = artifact.recipe, artifact.recipe.seed if seed is None else seed
    settings = dataclasses.replace(recipe.evaluation, problems=problems)
    bench = bench_of(artifact, settings, recipe.data, "accuracy", seed, batch_size, split="calibration")
    caps = [None if share == 1 else think_cap(bench, share) for share in sorted(set(think_shares), reverse=True)]
    with evaluating(artifact.gated):
        budgets = [
            Budget(compute=compute, think_tokens=cap)
            for compute, cap in product(sorted(set(computes), reverse=True), caps)
        ]
        runs = [dense_run(bench), *(allocate(bench, budget, "cap") for budget in budgets)]
        measured = measure_all(bench, runs, "accuracy", progress)
    cost = artifact.gated.cost
    points = [point_of(run, one, cost, metric="accuracy", seed=seed) for run, one in zip(runs, measured, strict=True)]
    dense, whole = points[0], points[0].work or 1.0
    found = (
        SplitPoint(
            compute=point.budget,
            think_tokens=point.think_cap,
            work=round((point.work or 0.0) / whole, 5),
            accuracy=point.accuracy,
        )
        for point in points[1:]
    )
    return MeasuredSplit(dense, tuple(points[1:]), Split.best_of(found))
