"""Budgets: what is accepted, what is refused, and the round trip."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given

from l2a_compress import Budget, BudgetError
from strategies import budgets


@given(budgets)
def test_json_round_trip_is_exact(budget: Budget) -> None:
    again = Budget.from_json(json.loads(json.dumps(budget.to_json())))
    assert again == budget
    assert hash(again) == hash(budget)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.5, 1 + 1e-9, float("nan"), float("inf"), True, False, "0.5", None])
def test_bad_compute_is_refused_by_name_and_value(value: object) -> None:
    with pytest.raises(BudgetError, match=r"budget\.compute") as caught:
        Budget(compute=value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["layers", "heads", "think_tokens"])
@pytest.mark.parametrize("value", [-1, 2.0, True, "3", float("nan")])
def test_bad_caps_are_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(BudgetError, match=rf"budget\.{name}") as caught:
        Budget.from_json({name: value})
    assert repr(value) in str(caught.value)


def test_zero_is_a_cap_on_thinking_only() -> None:
    assert Budget(think_tokens=0).think_tokens == 0
    for name in ("layers", "heads"):
        with pytest.raises(BudgetError, match="at least 1"):
            Budget.from_json({name: 0})


def test_numpy_numbers_become_plain_ones() -> None:
    budget = Budget(compute=np.float32(0.5), layers=np.int64(3))
    assert type(budget.compute) is float
    assert type(budget.layers) is int
    assert json.loads(json.dumps(budget.to_json()))["layers"] == 3


def test_an_integer_one_is_the_dense_budget() -> None:
    assert Budget(compute=1) == Budget()


@pytest.mark.parametrize("data", [{"computee": 0.5}, [0.5], 0.5, None, {1: 2}])
def test_foreign_json_is_refused(data: object) -> None:
    with pytest.raises(BudgetError):
        Budget.from_json(data)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget().compute = 0.5  # type: ignore[misc]


def test_short_text_names_the_caps() -> None:
    assert str(Budget(compute=0.6, layers=8, think_tokens=0)) == "0.6, layers <= 8, think_tokens <= 0"
