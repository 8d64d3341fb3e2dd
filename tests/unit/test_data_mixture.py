"""The interleave depends on the seed and the place alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress.errors import ConfigError, DataError
from l2a_compress.training.mixture import Chain, Mixture

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def parts_of(sizes: list[int]) -> list[Sequence[str]]:
    return [[f"{number}:{item}" for item in range(size)] for number, size in enumerate(sizes)]


def even(sizes: list[int], seed: int, length: int) -> Mixture[str]:
    return Mixture(parts_of(sizes), [1.0] * len(sizes), seed=seed, length=length)


@given(SIZES, st.integers(0, 2**40), st.integers(0, 60), st.integers(0, 60))
def test_a_longer_run_starts_like_a_shorter_one(sizes: list[int], seed: int, first: int, more: int) -> None:
    assert list(even(sizes, seed, first)) == list(even(sizes, seed, first + more))[:first]


@given(SIZES, st.integers(0, 100))
def test_items_repeat_only_after_all_of_their_part_came(sizes: list[int], seed: int) -> None:
    counts = Counter(even(sizes, seed, 80))
    for part in parts_of(sizes):
        seen = [counts[item] for item in part]
        assert max(seen) - min(seen) <= 1


def test_random_access_gives_what_iteration_gives() -> None:
    mixture = even([3, 5], 7, 40)
    whole = list(mixture)
    assert [mixture[index] for index in reversed(range(40))] == whole[::-1]
    assert mixture[-1] == whole[-1]
    assert mixture[5:9] == whole[5:9]
    assert [f"{mixture.part_of(index)}" for index in range(40)] == [item[0] for item in whole]
    with pytest.raises(IndexError, match="index 40 is outside a data set of 40"):
        mixture[40]


def test_seeds_differ_and_rounds_are_shuffled_anew() -> None:
    assert list(even([50], 0, 50)) != list(even([50], 1, 50))
    mixture = even([50], 0, 100)
    assert mixture[:50] != mixture[50:]


def test_shares_follow_the_weights() -> None:
    mixture = Mixture(parts_of([10, 1000]), [3, 1], seed=0, length=20_000)
    share = sum(mixture.part_of(index) == 0 for index in range(len(mixture))) / len(mixture)
    assert share == pytest.approx(0.75, abs=0.01)


def test_the_default_length_is_that_of_the_parts() -> None:
    assert len(Mixture(parts_of([3, 4]), [1, 9], seed=0)) == 7


@given(SIZES)
def test_a_chain_has_each_item_once_in_order(sizes: list[int]) -> None:
    chain = Chain(parts_of(sizes))
    assert len(chain) == sum(sizes)
    assert list(chain) == [item for part in parts_of(sizes) for item in part]
    assert chain[-1] == parts_of(sizes)[-1][-1]


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1], []])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Mixture(parts_of([2, 2]), weights, seed=0)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match="source 2 of the mixture is empty"):
        Mixture([["a"], []], [1, 1], seed=0)
