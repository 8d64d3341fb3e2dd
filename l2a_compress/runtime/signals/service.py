"""The service itself: who waits, how fast text comes, and how much of the machine it seems to get."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import MappingProxyType

from l2a_compress.runtime.costs import CostTable
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.signals.reading import Source, each


class Service(Source):
    """Queue and pace of an engine.

    Readings: ``queue.depth``, the requests that wait and can still be in time; ``queue.oldest_seconds``, since the
    first of them came that has not begun; ``queue.late``, those that cannot be done by their deadline any more;
    ``service.ttft_seconds``, from a request's coming to its first token, and ``service.tpot_seconds``, from token to
    token, the medians of the last requests that ended; ``service.contention``, the share of the last second's time
    that others took: 1 less what decoding should have taken by the cost table, at its rows and contexts, over what it
    did.

    Args:
        engine: that is read. In the thread that steps it.
        table: what its budgets cost.
    """

    units = MappingProxyType(
        {
            "queue.depth": "count",
            "queue.oldest_seconds": "seconds",
            "queue.late": "count",
            "service.ttft_seconds": "seconds",
            "service.tpot_seconds": "seconds",
            "service.contention": "share",
        }
    )
    _SECONDS, _LEAST = 1.0, 4  # the window, and how many steps it must hold

    def __init__(self, engine: Engine, table: CostTable) -> None:
        self._engine, self._table = engine, table

    def _values(self) -> dict[str, float | str]:
        return each(
            {
                "queue.depth": lambda: float(len(self._engine.waiting)),
                "queue.oldest_seconds": self._oldest,
                "queue.late": lambda: float(len(self._engine.hopeless)),
                "service.ttft_seconds": self._ttft,
                "service.tpot_seconds": self._tpot,
                "service.contention": self._contention,
            }
        )

    def _oldest(self) -> float:
        fresh = (request for request in self._engine.waiting if request.started is None)
        first = next(fresh, None)  # one that was interrupted has had its turn, however long ago it came
        return 0.0 if first is None else self._engine.clock() - first.submitted

    def _ttft(self) -> float:
        return _median([each.started - each.submitted for each in self._engine.ended if each.started is not None])

    def _tpot(self) -> float:
        ended = ((each, each.started, each.ended) for each in self._engine.ended)
        spent = [(each, end - start) for each, start, end in ended if start is not None and end is not None]
        return _median([seconds / max(1, len(each.written) - 1) for each, seconds in spent])

    def _contention(self) -> float:
        now, count, expected, taken = self._engine.clock(), 0, 0.0, 0.0
        for done in reversed(self._engine.steps):
            if done.ended < now - self._SECONDS:
                break
            expected += self._table.step_seconds(done.budget, done.rows, done.context)
            taken += done.seconds
            count += 1
        if count < self._LEAST or not taken:
            raise ValueError("too little has run lately")
        return max(0.0, 1 - expected / taken)


def _median(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no request has ended yet")
    return statistics.median(values)
