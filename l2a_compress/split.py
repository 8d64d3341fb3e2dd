"""One number for a whole request: how its work is split between compute a token and reasoning tokens.

The work of a request is its generated tokens, each weighted by the share of the dense compute that it takes, over what
the dense model's request takes. Half of it can be had with half of the layers, with half of the tokens, or with some of
both, and which is best depends on the model. So a few splits are measured (``l2a compress split``), and those that no
other beats are kept in the artifact, to be asked for by one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from l2a_compress import _validate
from l2a_compress.budget import Budget
from l2a_compress.errors import ArtifactError, BudgetError, L2AError

__all__ = ["Split", "SplitPoint"]


@dataclass(frozen=True, kw_only=True)
class SplitPoint:
    """One way to spend, as measured on calibration problems.

    Attributes:
        compute: Share of the dense compute of a token, in (0, 1].
        think_tokens: Most reasoning tokens, or None.
        work: Mean work of a request over that of the dense model.
        accuracy: Share of the answers that were right.
    """

    compute: float
    think_tokens: int | None
    work: float
    accuracy: float

    @property
    def budget(self) -> Budget:
        """What to ask for."""
        return Budget(compute=self.compute, think_tokens=self.think_tokens)


@dataclass(frozen=True)
class Split:
    """The splits that no other beats: ``points`` by ascending work, each more accurate than those before it."""

    points: tuple[SplitPoint, ...]

    @classmethod
    def best_of(cls, points: Iterable[SplitPoint]) -> Split:
        """Of what was measured those than which nothing is both as cheap and as accurate."""
        kept: list[SplitPoint] = []
        for point in sorted(points, key=lambda point: (point.work, -point.accuracy)):
            if not kept or point.accuracy > kept[-1].accuracy:
                kept.append(point)
        return cls(tuple(kept))

    def at(self, work: float) -> SplitPoint:
        """The most accurate split that takes no more than ``work``, as a share of the dense model's.

        Work is a mean over the calibration problems: what single requests take differs.

        Raises:
            BudgetError: no split takes so little.
        """
        within = [point for point in self.points if point.work <= work]
        if not within:
            least = f"{self.points[0].work:.3f}" if self.points else "none"
            raise BudgetError(f"work {work:g}: the least that was measured is {least}; ask for more")
        return within[-1]

    def to_json(self) -> list[dict[str, float | int | None]]:
        """A JSON array that :meth:`from_json` turns back into an equal split."""
        return [asdict(point) for point in self.points]

    @classmethod
    def from_json(cls, data: object, *, where: str = "metrics.split", error: type[L2AError] = ArtifactError) -> Split:
        """Reads a split.

        Args:
            data: as :meth:`to_json` gives it.
            where: what messages call it.
            error: what is raised.

        Raises:
            L2AError: it is no split; of the type ``error``.
        """
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise error(f"{where} must be a list, found {_validate.shown(data)}")
        return cls.best_of(_point(entry, f"{where}[{at}]", error) for at, entry in enumerate(data))


def _point(data: object, where: str, error: type[L2AError]) -> SplitPoint:
    try:
        values = _validate.keywords(SplitPoint, data, error, optional=frozenset())
    except L2AError as problem:
        raise error(f"{where}: {problem}") from None
    shares = {name: _validate.number(values[name], f"{where}.{name}", error) for name in ("work", "accuracy")}
    try:
        budget = Budget(compute=values["compute"], think_tokens=values["think_tokens"])
    except BudgetError as problem:
        raise error(f"{where}: {problem}") from None
    return SplitPoint(compute=budget.compute, think_tokens=budget.think_tokens, **shares)
