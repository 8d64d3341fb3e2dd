"""Which answers count as equal, and the statistics over them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress.evaluation.answers import matches, normalized
from l2a_compress.evaluation.statistics import check_frontier, clustered, paired, wilson
from l2a_compress.evaluation.values import Point


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("72", "72"),
        (" 72.", "72"),
        ("72.00", "72"),
        ("$1,250.50", "1250.5"),
        ("1,2", "1,2"),
        ("12,345,678", "12345678"),
        ("1,2345", "1,2345"),
        ("2,000", "2000"),
        ("0.0", "0"),
        ("-0", "0"),
        ("+5", "5"),
        (".5", "0.50"),
        ("3 4", "3  4"),
        ("Ann .", "Ann"),
    ],
)
def test_equal_answers(found: str, expected: str) -> None:
    assert matches(found, expected)
    assert matches(expected, found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [("", ""), (" ", "0"), ("12", "1 2"), ("3", "4"), ("ann", "Ann"), ("1e3", "1000"), ("nan", "0"), ("7 apples", "7")],
)
def test_different_answers(found: str, expected: str) -> None:
    assert not matches(found, expected)


def test_long_numbers_are_compared_to_their_last_digit() -> None:
    long = "123456789012345678901234567890"
    assert matches(f"{long}.0", long)
    assert not matches(long[:-1] + "1", long)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_normalized_once_and_for_all(value: object) -> None:
    once = normalized(str(value))
    assert normalized(once) == once
    assert float(once) == float(str(value))


# From scipy.stats.binomtest(hits, trials).proportion_ci(method="wilson").
GOLDEN = [
    (8, 10, 0.490162471537, 0.943317848546),
    (0, 10, 0.000000000000, 0.277532799863),
    (10, 10, 0.722467200137, 1.000000000000),
    (1, 3, 0.061491944720, 0.792340399198),
    (485, 500, 0.951096333164, 0.981736786802),
]


@pytest.mark.parametrize(("hits", "trials", "low", "high"), GOLDEN)
def test_wilson_golden(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-9)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilson_contains_the_share(trials: int, share: float) -> None:
    hits = math.floor(share * trials)
    low, high = wilson(hits, trials)
    assert 0.0 <= low <= hits / trials <= high <= 1.0


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson(hits, trials)


POINT = Point(
    name="l2a",
    budget=1.0,
    contract="cap",
    accuracy=0.5,
    accuracy_low=0.4,
    accuracy_high=0.6,
    layer_sparsity=0.0,
    head_sparsity=0.0,
    think_tokens=3.0,
    cost=1.0,
    over_budget=0,
    n=10,
    seed=0,
)


def frontier(*points: tuple[float, float]) -> list[Point]:
    """Points of (budget, accuracy) with intervals of 0.05 to each side."""
    return [
        dataclasses.replace(POINT, budget=b, accuracy=a, accuracy_low=a - 0.05, accuracy_high=a + 0.05)
        for b, a in points
    ]


def test_a_frontier_that_grows_is_monotone() -> None:
    check = check_frontier(frontier((1.0, 0.9), (0.5, 0.6), (0.7, 0.8)))
    assert (check.monotone, check.largest_inversion, check.between) == (True, 0.0, ())


def test_an_inversion_within_the_interval_is_forgiven_and_reported() -> None:
    check = check_frontier(frontier((1.0, 0.80), (0.7, 0.88), (0.5, 0.6)))
    assert check.monotone
    assert check.largest_inversion == pytest.approx(0.08)
    assert check.between == (0.7, 1.0)


def test_an_inversion_beyond_the_interval_is_not() -> None:
    # No two neighbours are apart, but the ends are.
    check = check_frontier(frontier((1.0, 0.74), (0.7, 0.80), (0.5, 0.86)))
    assert not check.monotone
    assert check.between == (0.5, 1.0)


def with_outcomes(*points: tuple[float, str]) -> list[Point]:
    """Points of (budget, outcomes) whose own intervals overlap."""
    return [
        dataclasses.replace(POINT, budget=b, accuracy=o.count("1") / len(o), n=len(o), outcomes=o) for b, o in points
    ]


def test_points_of_the_same_problems_are_compared_problem_by_problem() -> None:
    # 20 of 1000 are lost and none is won, far within what two separate intervals tell apart.
    less, more = "1" * 800 + "0" * 200, "0" * 20 + "1" * 780 + "0" * 200
    assert not check_frontier(with_outcomes((1.0, more), (0.5, less))).monotone
    assert check_frontier(with_outcomes((1.0, less), (0.5, more))).monotone
    other = [
        dataclasses.replace(point, seed=seed) for seed, point in enumerate(with_outcomes((1.0, more), (0.5, less)))
    ]
    assert check_frontier(other).monotone  # other problems: nothing to pair


def test_of_many_pairs_one_that_is_apart_by_chance_is_forgiven() -> None:
    # 5 lost, none won: beyond the 95 % interval of one comparison, but not of 15.
    less, more = "1" * 100, "0" * 5 + "1" * 95
    assert not check_frontier(with_outcomes((1.0, more), (0.5, less))).monotone
    six = with_outcomes((1.0, less), (0.9, more), (0.8, less), (0.7, less), (0.6, less), (0.5, less))
    assert check_frontier(six).monotone


def test_agreement_is_compared_problem_by_problem_too() -> None:
    shares = tuple(0.5 + 0.001 * (place % 7) for place in range(50))
    low, high = (
        dataclasses.replace(
            POINT, budget=b, accuracy=0.5 + shift, n=50, agreement_by_problem=tuple(s + shift for s in shares)
        )
        for b, shift in ((0.5, 0.02), (1.0, 0.0))
    )
    assert not check_frontier([low, high]).monotone


def test_a_single_point_is_monotone() -> None:
    assert check_frontier(frontier((1.0, 0.5))).monotone


def test_one_trial_a_cluster_is_wilson() -> None:
    assert clustered([1, 0, 1, 1], [1] * 4) == wilson(3, 4)


@pytest.mark.parametrize("hits", [[0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 0, 0]])
def test_trials_that_repeat_each_other_tell_no_more_than_one(hits: list[int]) -> None:
    low, high = clustered(hits, [3] * 4)
    once = wilson(sum(hits) // 3, 4)
    assert (low, high) == pytest.approx(once, abs=0.05)  # of 4 clusters Kish's effect is 3 times 11 / 9
    assert low <= once[0] + 1e-9
    assert high >= once[1] - 1e-9


def test_independent_trials_count_in_full() -> None:
    hits = [2, 1, 2, 1, 2, 1]  # spread no wider than chance
    assert clustered(hits, [3] * 6) == pytest.approx(wilson(9, 18))


def test_a_paired_difference_and_its_interval() -> None:
    mean, low, high = paired("1101", "0111")
    assert mean == 0
    assert -low == high == pytest.approx(1.959964 * (2 / 3) ** 0.5 / 2)
    assert paired("110" * 50, "110" * 50) == (0, 0, 0)  # equal outcomes leave no doubt
    assert paired("1" * 10, "0" * 10)[0] == 1
    assert paired((1.5, 0.5), (1.0, 0.25)) == pytest.approx((0.375, 0.13, 0.62), abs=1e-5)
    with pytest.raises(ValueError, match="of 2 and 3 problems"):
        paired("11", "111")
