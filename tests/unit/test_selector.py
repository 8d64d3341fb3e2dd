"""The selector: the golden cases that every implementation passes, its speed, and bad policies."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress.errors import ConfigError
from l2a_compress.runtime.policy import Policy, Tier
from l2a_compress.runtime.selector import Decision, State, Step, Work, select

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "selection_cases.json").read_text())
TABLES = {name: [Step(**step) for step in steps] for name, steps in GOLDEN["steps"].items()}
STEPS = TABLES["variants"]
POLICIES = {name: Policy.from_json(policy) for name, policy in GOLDEN["policies"].items()}
WORK = Work(prompt_tokens=10, new_tokens=10, think_tokens=5)


def decide(case: dict[str, Any]) -> Decision:
    readings = {name: math.inf if value == "inf" else value for name, value in case["readings"].items()}
    state, work = State(**case["state"]), Work(**case["work"])
    steps = TABLES[case["steps"]]
    return select(steps, readings, work, POLICIES[case["policy"]], state, now=case["now"], tier=case["tier"])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden(case: dict[str, Any]) -> None:
    found = decide(case)
    assert {
        "budget": found.budget.compute,
        "layers": found.budget.layers,
        "heads": found.budget.heads,
        "think_tokens": found.budget.think_tokens,
        "admit": found.admit,
        "binding": found.binding.name,
        "since": found.state.since,
    } == case["expect"]
    assert TABLES[case["steps"]][found.step].budget == found.budget.compute == found.state.budget
    assert all(term.reason for term in found.terms)


def test_there_are_enough_cases_and_each_binding_is_among_them() -> None:
    cases = GOLDEN["cases"]
    assert len(cases) >= 60
    assert {case["expect"]["binding"] for case in cases} == {
        *("policy", "time", "spot", "queue", "pace", "pressure", "memory", "dwell")
    }


READINGS = st.dictionaries(
    st.sampled_from(["request.seconds_left", "spot.seconds_left", "queue.depth", "queue.oldest_seconds"])
    | st.sampled_from(["host.memory_available", "gpu.memory_free", "pressure.cpu_some", "gpu.throttled"]),
    st.none() | st.floats(min_value=0, max_value=1e4) | st.just(math.inf),
)


@given(readings=READINGS, policy=st.sampled_from(sorted(POLICIES)), before=st.sampled_from([None, 0.4, 0.6, 0.8, 1.0]))
def test_no_decision_is_above_what_every_term_allows(
    readings: dict[str, float | None], policy: str, before: float | None
) -> None:
    state = State(budget=before)
    found = select(STEPS, readings, WORK, POLICIES[policy], state, now=10.0)
    assert found.budget.compute <= min(term.budget for term in found.terms)
    step = STEPS[found.step]
    assert (found.budget.layers is None) or found.budget.layers >= step.layers
    memories = [readings.get(name) for name in POLICIES[policy].memories]
    rooms = [room for room in memories if room is not None]
    if rooms and found.admit:
        left = min(rooms) - POLICIES[policy].memory_reserve_bytes
        assert step.memory_bytes + 20 * step.cache_bytes <= left


def test_a_signal_that_jumps_every_tenth_of_a_second_makes_few_switches() -> None:
    state, budgets = State(), []
    for tick in range(600):  # a minute
        found = select(STEPS, {"pressure.cpu_some": float(tick % 2)}, WORK, POLICIES["dwell"], state, now=tick / 10)
        state = found.state
        budgets.append(found.budget.compute)
    assert sum(a != b for a, b in itertools.pairwise(budgets)) <= 30
    calm = [select(STEPS, {}, WORK, POLICIES["dwell"], State(budget=0.4, since=0.0), now=4.0).budget.compute]
    assert calm == [0.6]


def test_a_decision_costs_little() -> None:
    """Against a loop of plain Python, as machines differ: 1.2 to 1.6 of it. Benchmarks tell microseconds."""
    readings = {"request.seconds_left": 0.9, "queue.depth": 3.0, "host.memory_available": 1e9, "pressure.cpu_some": 0.3}

    def decision() -> None:
        select(STEPS, readings, WORK, POLICIES["min"], State(budget=0.6), now=1.0)

    def loop() -> None:
        found: dict[int, int] = {}
        for number in range(200):
            found[number % 7] = found.get(number % 7, 0) + len(str(number))

    def seconds(work: Callable[[], None]) -> float:
        began = time.process_time()
        for _ in range(300):
            work()
        return time.process_time() - began

    rounds = [(seconds(decision), seconds(loop)) for _ in range(15)]
    ours, plain = (min(side) for side in zip(*rounds, strict=True))
    assert ours < 2.2 * plain


def test_a_policy_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('kind = "slack"\ndwell_seconds = 2\n[tiers.flex]\nceiling = 0.5\n')
    policy = Policy.load(path)
    assert (policy.kind, policy.dwell_seconds) == ("slack", 2.0)
    assert policy.tier("flex") == Tier(ceiling=0.5)
    assert policy.tier("default") == Tier()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kind = "best"', "policy.kind"),
        ("time_margin = 1.0", "policy.time_margin must be from 0 to 0.99"),
        ("dwell_seconds = -1", "policy.dwell_seconds must be at least 0"),
        ("dwell_seconds = nan", "policy.dwell_seconds"),
        ("dwell_seconds = true", "must be a number"),
        ("pressure_low = 0.9", "must be below pressure_high"),
        ("buckets = 0", "policy.buckets"),
        ("speed = 1", "unknown key 'speed'"),
        ("pressures = 3", "policy.pressures"),
        ("tiers = 3", "policy.tiers"),
        ("[tiers.flex]\nfloor = 0.9\nceiling = 0.5", "ceiling"),
        ("[tiers.flex]\nweight = 1", "unknown key 'weight'"),
        ("kind = ", "policy.toml"),
    ],
)
def test_a_bad_policy_is_refused_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_policy_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        Policy.load(tmp_path / "none.toml")


def test_bad_tables_and_tiers_are_refused() -> None:
    for steps in ([], STEPS[::-1], [STEPS[0], STEPS[0]]):
        with pytest.raises(ConfigError, match="fall"):
            select(steps, {}, WORK, Policy(), State(), now=0.0)
    with pytest.raises(ConfigError, match="tier 'gold': the policy has default"):
        select(STEPS, {}, WORK, Policy(), State(), now=0.0, tier="gold")
