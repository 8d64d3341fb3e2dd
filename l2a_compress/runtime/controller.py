"""Steers an engine by the machine: reads the signals, asks the selector, and changes what requests may spend.

signals, engine --readings--> select --decision--> budgets of the requests that have a tier
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from l2a_compress.budget import Budget
from l2a_compress.errors import BundleError, L2AError, OutOfMemoryError
from l2a_compress.runtime.costs import CostTable
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.policy import Policy
from l2a_compress.runtime.request import TAGS, Request
from l2a_compress.runtime.selector import Decision, State, Work, admits, select
from l2a_compress.runtime.signals.reading import Reading, Signals, Source
from l2a_compress.runtime.signals.service import Service

log = logging.getLogger(__name__)
_SLOW = 0.05  # weight of the newest request in what the next ones are expected to write


@dataclass
class _Tier:
    """What is in force for a tier, since when, and when the selector was last asked for it."""

    decision: Decision
    budget: Budget
    since: float
    seen: float


class Controller:
    """Calls :func:`~l2a_compress.runtime.selector.select` every ``seconds`` and applies what it says.

    A request with a tier never gets more than it asked for. Lower budgets take effect at its next token, higher ones
    as the policy's dwell allows.

    Args:
        engine: whose requests are steered, from the thread that steps it.
        table: what budgets cost here.
        policy: None for the default one.
        sources: of the machine; the engine's own queue and pace come besides.
        seconds: between two decisions.

    Attributes:
        switches: How often the budget of the tier ``default`` has changed.
        readings: The last ones.

    Raises:
        BundleError: the bundle was exported without the router graph, which decides for another budget.
    """

    def __init__(
        self,
        engine: Engine,
        table: CostTable,
        policy: Policy | None = None,
        sources: Sequence[Source] = (),
        *,
        seconds: float = 0.1,
    ) -> None:
        if engine.serve == "if" and all(graph.kind != "router" for graph in engine.bundle.graphs):
            raise BundleError(f"{engine.folder}: has no router graph to steer requests with; export it again")
        self.engine, self.table, self.policy = engine, table, policy or Policy()
        self.signals = Signals([*sources, Service(engine, table)])
        self.readings: dict[str, Reading] = {}
        self.switches = 0
        self._seconds, self._last = seconds, float("-inf")
        self._tiers: dict[str, _Tier] = {}
        self._short_since: float | None = None  # when memory was last found to be short, while it is
        self._think = float(engine.bundle.gates["think_reference"])  # tokens that a request is expected to write
        self._new, self._prompt = self._think + TAGS, 0.0
        self._seen: Request | None = None

    @property
    def decisions(self) -> dict[str, Decision]:
        """The last decision for each tier that was asked for."""
        return {name: tier.decision for name, tier in self._tiers.items()}

    @property
    def decision(self) -> Decision | None:
        """The last decision for the tier ``default``."""
        return self.decisions.get("default")

    def budget(self, tier: str = "default") -> Budget:
        """What requests of a tier may spend now.

        Raises:
            ConfigError: the policy has no such tier.
        """
        self.policy.tier(tier)
        if tier not in self._tiers or self.engine.clock() - self._tiers[tier].seen >= self._seconds:
            self.update(tiers=(tier,), force=True)
        return self._tiers[tier].budget

    def update(self, tiers: Sequence[str] = (), *, force: bool = False) -> None:
        """Decides and applies, if the last time is long enough ago."""
        now = self.engine.clock()
        if not force and now - self._last < self._seconds:
            return
        self._last = now
        self._learn()
        self.readings = self.signals.read()
        values = self._values()
        engine, policy = self.engine, self.policy
        known = [*engine.running, *itertools.islice(engine.queued, engine.max_rows)]
        found = {"default", *tiers, *(request.tier for request in known if request.tier is not None)}
        for name in sorted(found):
            requests = [request for request in known if request.tier == name]
            self._decide(name, requests, values, now)
            for request in requests:
                self._apply(request, partial(self._give, budget=self._tiers[name].budget))
        default = self._tiers["default"].decision
        waiting = [request for request in known if request.tier == "default"]
        more = replace(self._work(waiting), rows=min(engine.max_rows, engine.rows + 1))
        engine.paused = not admits(self.table.steps, values, more, policy)
        if not engine.paused:
            self._short_since = None
            return
        since = self._short_since = now if self._short_since is None else self._short_since
        first = next((request for request in engine.queued if request.started is None), None)
        if first is not None and now - max(since, first.submitted) > policy.patience_seconds:
            reason = next((term.reason for term in default.terms if term.name == "memory"), "no row more fits")
            engine.cancel(first, OutOfMemoryError(f"no memory for {policy.patience_seconds:g} s: {reason}"))

    def apply(self, request: Request) -> None:
        """Gives a request the least of what it asked for and what its tier may spend now.

        A cap on reasoning is for requests that have not begun, which are told it at ``<think>`` and write tersely; one
        that runs would be cut off. It is, where the machine ends.
        """
        self._apply(request, self.enforce)

    def enforce(self, request: Request) -> None:
        """As :meth:`apply`, for a caller that wants to know why it cannot be.

        Raises:
            L2AError: the request cannot get that budget; the old one stays.
        """
        if request.tier is not None:
            self._give(request, self.budget(request.tier))

    def _apply(self, request: Request, action: Callable[[Request], None]) -> None:
        try:
            action(request)
        except L2AError as error:  # it stays as it is until the next decision, and the others go on
            log.warning("request %d keeps its budget: %s", request.number, error)

    def _give(self, request: Request, budget: Budget) -> None:
        ends = request.tier is not None and self._ends(request.tier)
        if request.started is not None and not (budget.think_tokens is not None and ends):
            budget = replace(budget, think_tokens=request.budget.think_tokens)
        budget = request.ceiling.tighter(budget)
        if budget != request.budget:
            self.engine.set_budget(request, budget)

    def _ends(self, tier: str) -> bool:
        """Whether the machine's end leaves too little time."""
        return any(term.short for term in self._tiers[tier].decision.terms if term.name == "spot")

    def _values(self) -> dict[str, float | None]:
        """Readings that are not stale. What the loaded graph holds would be free for another one."""
        now, policy = self.engine.clock(), self.policy
        values = {
            name: reading.value if now - reading.at <= policy.stale_seconds else None
            for name, reading in self.readings.items()
        }
        loaded = self.engine.loaded_budgets
        left = values.get("spot.seconds_left")
        if left is not None:  # time has gone on since it was read
            values["spot.seconds_left"] = max(0.0, left - max(0.0, now - self.readings["spot.seconds_left"].at))
        held = max((step.memory_bytes for step in self.table.steps if step.budget in loaded), default=0.0)
        for name in policy.memories:
            value = values.get(name)
            if value is not None:
                caches = 0 if name.startswith("gpu.") else self.engine.resident_bytes  # the host has them
                values[name] = value + held + caches
        return values

    def _decide(self, name: str, requests: Sequence[Request], values: Mapping[str, float | None], now: float) -> None:
        before = self._tiers.get(name)
        work = self._work(requests)
        urgent, left = self._urgent(requests, work, now)
        readings = values if left is None else {**values, "request.seconds_left": left}
        state = State() if before is None else before.decision.state
        decision = select(self.table.steps, readings, work, self.policy, state, now=now, tier=name, urgent=urgent)
        wanted = decision.budget
        if wanted.think_tokens is not None:  # of what models are trained with, not of what is expected at the moment
            reference = float(self.engine.bundle.gates["think_reference"])
            wanted = replace(wanted, think_tokens=math.floor(reference * self.policy.short_share))
        if before is not None and wanted != before.budget:
            eased = wanted.compute == before.budget.compute and before.budget.tighter(wanted) == before.budget
            if eased and now - before.since < self.policy.dwell_seconds:  # a cap that comes and goes
                before.decision, before.seen = decision, now
                return
            self.switches += name == "default"
        self._tiers[name] = _Tier(decision, wanted, now, now)

    def _work(self, requests: Sequence[Request]) -> Work:
        """What a request that waits is expected to need."""
        engine = self.engine
        rows = max(1, min(engine.max_rows, engine.rows + len(engine.waiting)))
        waiting = next((request for request in requests if request.started is None), None)
        prompt = self._prompt if waiting is None else len(waiting.prompt)
        return Work(prompt_tokens=round(prompt), new_tokens=self._new, think_tokens=self._think, rows=rows)

    def _urgent(self, requests: Sequence[Request], work: Work, now: float) -> tuple[Work | None, float | None]:
        """What is left of the request whose deadline is first, and how long it has.

        Those that cannot be in time whatever they get do not count: they would hold all others at the least.
        """
        late = set(self.engine.hopeless)
        timely = [request for request in requests if request not in late]
        ahead = ((request.deadline, request) for request in timely if request.deadline is not None)
        for deadline, request in sorted(ahead, key=lambda pair: pair[0]):
            left, rest = deadline - now, self._rest(request, work)
            least = rest.new_tokens - rest.think_tokens * (1 - self.policy.short_share)
            if self.table.steps[-1].seconds(replace(rest, new_tokens=least)) <= left:
                return rest, left
        return None, None

    @staticmethod
    def _rest(request: Request, work: Work) -> Work:
        """What is left to do of a request."""
        if request.started is None:
            return replace(work, prompt_tokens=len(request.prompt))
        new = max(1.0, work.new_tokens - len(request.written))  # its reasoning is as long as it is: it has been told
        return replace(work, prompt_tokens=0, new_tokens=new, think_tokens=0.0)

    def _learn(self) -> None:
        """Slow means of what requests write whose reasoning is not cut short."""
        fresh = list(itertools.takewhile(lambda request: request is not self._seen, reversed(self.engine.ended)))
        for request in reversed(fresh):
            self._prompt += _SLOW * (len(request.prompt) - self._prompt)
            if request.budget.think_tokens is None:
                self._new += _SLOW * (len(request.written) - self._new)
                self._think += _SLOW * (len(request.reasoning.think) - self._think)
        if fresh:
            self._seen = fresh[0]
