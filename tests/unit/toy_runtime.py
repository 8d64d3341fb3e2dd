"""What tests of the runtime share: prompts, a clock and signals that a test sets, and a controller over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from l2a_compress.runtime import Limits, Policy
from l2a_compress.runtime.controller import Controller
from l2a_compress.runtime.costs import CostTable
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.selector import Step
from l2a_compress.runtime.signals import Source
from toy_models import prompts

LIMITS = Limits(max_think_tokens=9, max_answer_tokens=4, tau_threshold=None)


def texts(count: int) -> list[list[int]]:
    ids, mask = prompts(count, 12, seed=3)
    return [row[held.bool()].tolist() for row, held in zip(ids, mask, strict=True)]


def finish(engine: Engine, before: Callable[[int], object] = lambda _: None) -> int:
    for step in range(500):
        if not engine.busy:
            return step
        before(step)
        engine.step()
    raise AssertionError("requests do not end")


class Told(Source):
    """Readings that a test sets."""

    units = MappingProxyType(
        {"pressure.cpu_some": "share", "host.memory_available": "bytes", "spot.seconds_left": "seconds"}
    )

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def _values(self) -> dict[str, float | str]:
        return dict(self.values)


def table(*budgets: float, serve: str = "if") -> CostTable:
    steps = tuple(
        Step(
            budget=budget,
            layers=round(6 * budget),
            heads=round(12 * budget),
            prefill_seconds=1e-3 * budget,
            decode_seconds=1e-2 * budget,
            memory_bytes=1e6 * budget,
            cache_bytes=10,
        )
        for budget in budgets
    )
    return CostTable(device="d", threads=1, serve=serve, rows=4, steps=steps, context_seconds=0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steered(folder: Path, policy: Policy) -> tuple[Controller, Told, Clock]:
    clock, told = Clock(), Told()
    engine = Engine(folder, max_rows=4, threads=1, clock=clock)
    return Controller(engine, table(1.0, 0.7, 0.45), policy, [told]), told, clock
