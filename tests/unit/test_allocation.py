"""Allocations: validation, derived figures, nesting and the round trip."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress import Allocation, AllocationError
from strategies import allocations

THREE = Allocation(num_groups=4, groups=((0, 1, 2, 3), (), (1, 3)), think_tokens=None)


@given(allocations())
def test_json_round_trip_is_exact(allocation: Allocation) -> None:
    again = Allocation.from_json(json.loads(json.dumps(allocation.to_json())))
    assert again == allocation
    assert hash(again) == hash(allocation)
    assert again.key == allocation.key


@given(allocations())
def test_sparsities_are_shares_and_agree_with_the_counts(allocation: Allocation) -> None:
    kept = len(allocation.layers)
    assert allocation.layer_sparsity == pytest.approx(1 - kept / allocation.num_layers)
    assert 0.0 <= allocation.head_sparsity < 1.0
    assert (allocation.head_sparsity == 0.0) == (allocation.num_kept_groups == kept * allocation.num_groups)


def test_figures_of_a_known_allocation() -> None:
    assert THREE.layers == (0, 2)
    assert THREE.layer_sparsity == pytest.approx(1 / 3)
    assert THREE.head_sparsity == pytest.approx(2 / 8)
    assert str(THREE) == "2/3 layers, 6/8 groups"


def test_dense_runs_everything() -> None:
    dense = Allocation.dense(12, 4, think_tokens=9)
    assert dense.layers == tuple(range(12))
    assert (dense.layer_sparsity, dense.head_sparsity) == (0.0, 0.0)
    assert str(dense) == "12/12 layers, 48/48 groups, <= 9 think tokens"


def test_nothing_kept_has_no_pruned_heads() -> None:
    nothing = Allocation(num_groups=2, groups=((), ()))
    assert (nothing.layer_sparsity, nothing.head_sparsity) == (1.0, 0.0)


@given(st.data())
def test_a_subset_is_one_whose_groups_are_all_in_the_other(data: st.DataObject) -> None:
    small = data.draw(allocations(num_layers=3, num_groups=3))
    large = data.draw(allocations(num_layers=3, num_groups=3))
    expected = {(i, g) for i, kept in enumerate(small.groups) for g in kept} <= {
        (i, g) for i, kept in enumerate(large.groups) for g in kept
    }
    assert small.is_subset(large) == expected
    assert small.is_subset(Allocation.dense(3, 3))


def test_models_of_other_shapes_cannot_be_compared() -> None:
    with pytest.raises(AllocationError, match="3 layers with 4 groups against 3 layers with 2"):
        THREE.is_subset(Allocation.dense(3, 2))


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ((), "at least one layer"),
        (((4,),), "beyond 3"),
        (((-1,),), "at least 0"),
        (((1, 1),), "without repeats"),
        (((2, 1),), "ascending"),
        (((True,),), "integer"),
        (((1.0,),), "integer"),
        ((3,), "list of KV groups"),
        ("ab", "at least one layer"),
    ],
)
def test_bad_groups_are_refused(groups: object, found: str) -> None:
    with pytest.raises(AllocationError, match=found):
        Allocation(num_groups=4, groups=groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"num_groups": 0}, {"think_tokens": -1}, {"think_tokens": True}, {"extra": 1}])
def test_bad_fields_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(AllocationError, match=next(iter(change))):
        Allocation.from_json(THREE.to_json() | change)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(AllocationError, match="layer 12 does not exist: the model has layers 0 to 11"):
        Allocation.of_layers([0, 12], 12, 4)


@given(st.lists(allocations(num_layers=2, num_groups=2), max_size=6))
def test_keys_sort_whether_or_not_thinking_is_limited(several: list[Allocation]) -> None:
    ordered = sorted(several, key=lambda allocation: allocation.key)
    assert [a.key for a in ordered] == sorted(a.key for a in several)
