"""What to run now: a pure function of the readings, the cost table, the policy and the state before.

    readings, work  --terms-->  one budget of the ladder for each signal, with its reason
                    --min---->  the budget that all of them allow
                    --dwell-->  down at once, up one step after a while

The same rules are written down in docs/selector.md and checked by tests/golden/selection_cases.json, which every
implementation passes. Nothing here reads a clock, a file or a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.runtime.policy import Policy

Readings = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A row of the cost table: what one budget of the ladder costs on this machine.

    Attributes:
        budget: Share of the dense compute.
        layers: Kept layers.
        heads: Kept KV groups, summed over the layers.
        prefill_seconds: Of one token of a prompt.
        decode_seconds: Of one token after it, of one row alone.
        row_seconds: What each more row adds to that step.
        memory_bytes: To run at all, caches not counted.
        cache_bytes: Of one token of one sequence.
    """

    budget: float
    layers: int
    heads: int
    prefill_seconds: float
    decode_seconds: float
    memory_bytes: float
    cache_bytes: float
    row_seconds: float = 0.0

    def step_seconds(self, rows: int) -> float:
        """Of one token of each of so many rows."""
        return self.decode_seconds + (rows - 1) * self.row_seconds

    def seconds(self, work: Work) -> float:
        """From a request's first token to its last, beside the other rows."""
        return work.prompt_tokens * self.prefill_seconds + work.new_tokens * self.step_seconds(work.rows)

    def busy_seconds(self, work: Work) -> float:
        """That a request costs the machine: its share of the steps that it runs in."""
        return work.prompt_tokens * self.prefill_seconds + work.new_tokens * self.step_seconds(work.rows) / work.rows


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for: the request that is next, or the one whose deadline is first.

    Attributes:
        prompt_tokens: Not computed yet.
        new_tokens: Expected, reasoning included.
        think_tokens: Expected reasoning among them.
        rows: That run together with it, itself among them.
    """

    prompt_tokens: int
    new_tokens: float
    think_tokens: float = 0
    rows: int = 1

    def short(self, share: float) -> Work:
        """The same work with that share of its reasoning."""
        return replace(self, new_tokens=self.new_tokens - self.think_tokens * (1 - share))


@dataclass(frozen=True, kw_only=True)
class State:
    """What the selector remembers.

    Attributes:
        budget: Of the last decision; None before the first.
        since: When all signals began to allow more than that, in seconds; None while they do not.
    """

    budget: float | None = None
    since: float | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one signal allows.

    Attributes:
        name: ``policy``, ``memory``, ``time``, ``spot``, ``queue``, ``pace``, ``pressure`` or ``dwell``.
        budget: Of the ladder.
        reason: The numbers behind it.
        short: Whether that is with short reasoning.
    """

    name: str
    budget: float
    reason: str
    short: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to run, and why.

    Attributes:
        budget: Compute, and caps of the axes that are squeezed.
        step: Its place in the cost table.
        admit: False where no step fits into memory: wait, or refuse.
        terms: All that was weighed. See ``binding``.
        state: For the next decision.
    """

    budget: Budget
    step: int
    admit: bool
    terms: tuple[Term, ...]
    state: State

    @property
    def binding(self) -> Term:
        """The first of the terms that allow least; with short reasoning is less than without."""
        return min(self.terms, key=lambda term: (term.budget, not term.short))


def select(
    steps: Sequence[Step],
    readings: Readings,
    work: Work,
    policy: Policy,
    state: State,
    *,
    now: float,
    tier: str = "default",
    urgent: Work | None = None,
) -> Decision:
    """Picks a step of the cost table.

    Args:
        steps: The cost table, from the largest budget to the smallest.
        readings: By the names of the signals; what is missing, None or stale decides nothing.
        work: What a request that waits is expected to need.
        policy: The rules.
        state: Of the decision before.
        now: Seconds, on any clock that only goes forward.
        tier: Of the request.
        urgent: What is left of the request that has ``request.seconds_left``; None: all of ``work``.

    Raises:
        ConfigError: no steps, steps that do not fall, or a tier that the policy does not have.
    """
    if not steps or any(a.budget <= b.budget for a, b in itertools.pairwise(steps)):
        raise ConfigError(
            "a cost table needs steps whose budgets fall from one to the next; calibrate the bundle again"
        )
    rule = policy.tier(tier)
    ceiling = _below(steps, rule.ceiling).budget
    floor = min(ceiling, _above(steps, rule.floor).budget)
    terms = [Term(name="policy", budget=ceiling, reason=f"ceiling {rule.ceiling:g}")]
    for term in _terms(steps, readings, work, urgent or work, policy, ceiling, floor):
        terms.append(term if term.budget >= floor else replace(term, budget=floor))
    memory, admit = _memory(steps, readings, work, policy)
    terms += [] if memory is None else [memory]
    allowed = min(term.budget for term in terms)
    budget, since = allowed, None
    if state.budget is not None and allowed > state.budget and policy.dwell_seconds > 0:
        since = now if state.since is None else state.since
        budget = state.budget
        if now - since >= policy.dwell_seconds:
            budget = min(step.budget for step in steps if step.budget > state.budget)
            since = now if budget < allowed else None
        if budget < allowed:
            reason = f"{allowed:g} is allowed for {now - state.since if state.since is not None else 0:g} s"
            terms.append(Term(name="dwell", budget=budget, reason=reason))
    step = next(at for at, step in enumerate(steps) if step.budget <= budget)
    short = any(term.short for term in terms)
    return Decision(
        budget=Budget(
            compute=steps[step].budget,
            layers=_cap(steps, terms, "memory", ceiling, lambda step: step.layers),
            heads=_cap(steps, terms, "pressure", ceiling, lambda step: step.heads),
            think_tokens=math.floor(work.think_tokens * policy.short_share) if short else None,
        ),
        step=step,
        admit=admit,
        terms=tuple(terms),
        state=State(budget=steps[step].budget, since=since),
    )


def _terms(
    steps: Sequence[Step],
    readings: Readings,
    work: Work,
    urgent: Work,
    policy: Policy,
    ceiling: float,
    floor: float,
) -> Iterator[Term]:
    """What each signal but memory allows."""
    if policy.kind == "fixed":
        return
    free = 1 - min(0.99, readings.get("service.contention") or 0.0)  # of the machine; the table was measured with all

    def term(name: str, reason: str, work: Work, room: float, seconds: Callable[[Step, Work], float]) -> Term:
        """The largest step that is done within ``room``: short reasoning comes before less compute."""
        found, short = _largest(steps, lambda step: seconds(step, work), room), False
        if found < ceiling and policy.short_share < 1 and work.think_tokens:
            brief = work.short(policy.short_share)
            found, short = _largest(steps, lambda step: seconds(step, brief), room), True
        return Term(name=name, budget=found, reason=reason, short=short)

    for name, signal, asked, grace in (
        ("time", "request.seconds_left", urgent, 0.0),
        ("spot", "spot.seconds_left", work, policy.spot_grace_seconds),
    ):
        left = readings.get(signal)
        if left is not None and left < math.inf:
            room = max(0.0, left - grace) * (1 - policy.time_margin) * free
            if policy.kind == "slack" and name == "time":
                room = _bucket(steps, asked, room, policy.buckets)
            yield term(name, f"{left:g} s are left", asked, room, Step.seconds)
    depth, oldest = readings.get("queue.depth"), readings.get("queue.oldest_seconds") or 0.0
    if depth is not None:
        # The last one must be done within the target, and the first one, whose time has run for a while.
        def cleared(step: Step, work: Work) -> float:
            busy = step.busy_seconds(work)
            return max((work.rows + depth) * busy, work.rows * busy + oldest * free)

        reason = f"{depth:g} wait, the oldest for {oldest:g} s"
        yield term("queue", reason, work, policy.target_seconds * free, cleared)
    if policy.tpot_seconds:
        found = _largest(steps, lambda step: step.step_seconds(work.rows), policy.tpot_seconds * free)
        yield Term(name="pace", budget=found, reason=f"{work.rows} rows, a token in {policy.tpot_seconds:g} s each")
    if policy.kind == "slack":
        return
    busy = {name: readings.get(name) for name in policy.pressures}
    known = {name: value for name, value in busy.items() if value is not None}
    if known:
        name = max(known, key=lambda key: known[key])
        low, high = policy.pressure_low, policy.pressure_high
        share = min(1.0, max(0.0, (known[name] - low) / (high - low)))
        wanted = steps[0].budget - share * (steps[0].budget - floor)
        yield Term(name="pressure", budget=_below(steps, wanted).budget, reason=f"{name} is {known[name]:g}")


def admits(steps: Sequence[Step], readings: Readings, work: Work, policy: Policy) -> bool:
    """Whether so many rows fit into memory at some step, or nothing is known of it."""
    return _memory(steps, readings, work, policy)[1]


def _memory(steps: Sequence[Step], readings: Readings, work: Work, policy: Policy) -> tuple[Term | None, bool]:
    """The largest step that fits into what is left, and that one does; None where nothing is known.

    Where none fits it is the largest of those that take least, as going below it saves no memory.
    """
    rooms = [value for name in policy.memories if (value := readings.get(name)) is not None and value < math.inf]
    if not rooms:
        return None, True
    left = min(rooms) - policy.memory_reserve_bytes
    tokens = work.rows * (work.prompt_tokens + work.new_tokens)
    needs = [step.memory_bytes + tokens * step.cache_bytes for step in steps]
    least = min(needs)
    fits = (step.budget for step, need in zip(steps, needs, strict=True) if need <= max(least, left))
    budget = next(fits, steps[-1].budget)  # needs may be no numbers
    return Term(name="memory", budget=budget, reason=f"{min(rooms):g} bytes are left"), least <= left


def _cap(
    steps: Sequence[Step], terms: Sequence[Term], name: str, ceiling: float, count: Callable[[Step], int]
) -> int | None:
    """A squeeze acts on its own axis, memory on layers and contention on heads: what its term's step has of them."""
    allowed = next((term.budget for term in terms if term.name == name), ceiling)
    return count(_below(steps, allowed)) if allowed < ceiling else None


def _below(steps: Sequence[Step], budget: float) -> Step:
    """The largest step of at most ``budget``, else the smallest of all."""
    return next((step for step in steps if step.budget <= budget), steps[-1])


def _above(steps: Sequence[Step], budget: float) -> Step:
    """The smallest step of at least ``budget``, else the largest of all."""
    return next((step for step in reversed(steps) if step.budget >= budget), steps[0])


def _largest(steps: Sequence[Step], seconds: Callable[[Step], float], room: float) -> float:
    """Budget of the largest step that takes no longer than ``room``, else of the smallest of all."""
    return next((step.budget for step in steps if seconds(step) <= room), steps[-1].budget)


def _bucket(steps: Sequence[Step], work: Work, room: float, count: int) -> float:
    """The lower edge of the latency bucket that the slack falls into.

    As in SlackFit of SuperServe (Khare et al., NSDI 2025): equal slacks must not pick unlike steps because of noise, so
    latencies from the smallest to the largest step are cut into ``count`` equal buckets.
    """
    least, most = steps[-1].seconds(work), steps[0].seconds(work)
    if not least < room < most:
        return room
    width = (most - least) / count
    return least + math.floor((room - least) / width) * width
