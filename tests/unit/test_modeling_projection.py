"""The projection against a slow reference, and compliance: no budget is ever exceeded."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.modeling.deciders import GateResult
from l2a_compress.modeling.projection import Decision, Limits, moving_threshold, project, straight_through
from toy_models import GROUPS, LAYERS, new_gated, prompts, scramble

INF = float("inf")
NOTHING = torch.zeros(0)


def limits(units: int, layers: int = 99, heads: int = 999, price: float = -INF) -> Limits:
    """The limits of one row."""
    return Limits(torch.tensor([units]), torch.tensor([layers]), torch.tensor([heads]), torch.tensor([price]))


def greedy(
    layer_scores: list[float],
    group_scores: list[list[float]],
    room: tuple[int, int, int, float],
    layer_units: int,
    group_units: int,
    least: int,
) -> dict[int, set[int]]:
    """Kept layers and their groups, item by item in plain Python: what :func:`project` must do for one row."""
    units, layers, heads, price = room
    items: list[tuple[float, int, int, int]] = []  # (-score, kind, layer, group): layers before groups among equals
    for layer, scores in enumerate(group_scores):
        items.append((-layer_scores[layer], 0, layer, -1))
        items += [(-min(layer_scores[layer], *scores[: g + 1]), 1, layer, g) for g in range(least, len(scores))]
    kept: dict[int, set[int]] = {}
    for negative, kind, layer, group in sorted(items):
        if -negative <= price:
            continue
        if kind == 0:
            cost = layer_units + least * group_units
            if cost <= units and layers > 0 and heads >= least:
                kept[layer] = set(range(least))
                units, layers, heads = units - cost, layers - 1, heads - least
        elif layer in kept and group_units <= units and heads > 0:
            kept[layer].add(group)
            units, heads = units - group_units, heads - 1
    return kept


def kept_of(decision: Decision, row: int = 0) -> dict[int, set[int]]:
    """The same form from a decision."""
    return {
        layer: set(decision.groups[row, layer].nonzero().flatten().tolist())
        for layer in decision.layers[row].nonzero().flatten().tolist()
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[list[float]], tuple[int, int, int, float], int, int, int]:
    layers, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    # A few coarse values make ties likely.
    score = st.floats(-4, 4, width=32) | st.sampled_from([-1.0, 0.0, 1.0])
    layer_scores = draw(st.lists(score, min_size=layers, max_size=layers))
    row = st.lists(score, min_size=groups, max_size=groups)
    group_scores = draw(st.lists(row, min_size=layers, max_size=layers))
    layer_units, group_units = draw(st.integers(1, 50)), draw(st.integers(1, 20))
    dense = layers * (layer_units + groups * group_units)
    room = (
        draw(st.integers(0, dense)),
        draw(st.integers(0, layers)),
        draw(st.integers(0, layers * groups)),
        draw(st.just(-INF) | score),
    )
    return layer_scores, group_scores, room, layer_units, group_units, draw(st.integers(1, groups))


@settings(max_examples=400)
@given(cases())
def test_projection_is_the_greedy_choice(
    case: tuple[list[float], list[list[float]], tuple[int, int, int, float], int, int, int],
) -> None:
    layer_scores, group_scores, room, layer_units, group_units, least = case
    decision = project(
        torch.tensor([layer_scores]),
        torch.tensor([group_scores]),
        limits(*room),
        layer_units=layer_units,
        group_units=group_units,
        min_groups=least,
    )
    expected = greedy(layer_scores, group_scores, room, layer_units, group_units, least)
    found = kept_of(decision)
    assert found == expected
    assert all(groups == set(range(len(groups))) for groups in found.values())  # a prefix of the order
    assert not (decision.groups & ~decision.layers[..., None]).any()
    assert all(len(groups) >= least for groups in found.values())
    assert sum(layer_units + len(groups) * group_units for groups in found.values()) <= room[0]
    assert len(found) <= room[1]
    assert sum(map(len, found.values())) <= room[2]


def test_the_threshold_separates_what_is_kept() -> None:
    decision = project(
        torch.tensor([[3.0, 1.0, 2.0]]),
        torch.zeros(1, 3, 1),
        limits(20),
        layer_units=9,
        group_units=1,
        min_groups=1,
    )
    assert decision.layers.tolist() == [[True, False, True]]
    assert decision.threshold.tolist() == [1.5]
    priced = project(
        torch.tensor([[3.0, 1.0, 2.0]]),
        torch.zeros(1, 3, 1),
        limits(30, price=2.5),
        layer_units=9,
        group_units=1,
        min_groups=1,
    )
    assert priced.layers.tolist() == [[True, False, False]]
    assert priced.threshold.tolist() == [2.5]


def test_a_group_whose_layer_does_not_run_takes_nothing_from_the_others() -> None:
    # Layer 1 stands behind the cap of one layer; its second group outranks that of layer 0 but must not be paid for.
    decision = project(
        torch.tensor([[3.0, 2.0]]),
        torch.tensor([[[5.0, 0.5], [5.0, 1.0]]]),
        limits(11, layers=1),
        layer_units=9,
        group_units=1,
        min_groups=1,
    )
    assert kept_of(decision) == {0: {0, 1}}


def test_rows_are_projected_independently() -> None:
    generator = torch.Generator().manual_seed(0)
    layer_scores, group_scores = torch.randn(20, 5, generator=generator), torch.randn(20, 5, 3, generator=generator)
    room = Limits(
        torch.randint(0, 100, (20,), generator=generator),
        torch.randint(0, 6, (20,), generator=generator),
        torch.randint(0, 16, (20,), generator=generator),
        torch.randn(20, generator=generator),
    )
    sizes = {"layer_units": 11, "group_units": 3, "min_groups": 1}
    together = project(layer_scores, group_scores, room, **sizes)
    for row in range(20):
        one = Limits(*(value[row : row + 1] for value in vars(room).values()))
        alone = project(layer_scores[row : row + 1], group_scores[row : row + 1], one, **sizes)
        assert kept_of(alone) == kept_of(together, row)


def test_a_straight_through_gate_is_hard_in_value_and_soft_in_gradient() -> None:
    scores = torch.tensor([2.0, -1.0], requires_grad=True)
    hard = torch.tensor([True, False])
    value = straight_through(hard, scores, torch.tensor(0.5), 0.5)
    assert value.tolist() == [1.0, 0.0]
    value.sum().backward()
    soft = torch.sigmoid((scores.detach() - 0.5) / 0.5)
    torch.testing.assert_close(scores.grad, soft * (1 - soft) / 0.5)


def random_budget(draw: random.Random) -> Budget:
    """Any budget that the one-layer stem keeps to."""
    compute = draw.choice([1.0, draw.uniform(1 / LAYERS + 1e-9, 1.0), draw.uniform(1 / LAYERS + 1e-9, 1.0)])
    return Budget(
        compute=compute,
        layers=draw.choice([None, draw.randint(1, LAYERS)]),
        heads=draw.choice([None, draw.randint(GROUPS, LAYERS * GROUPS)]),
        think_tokens=draw.choice([None, draw.randint(0, 20)]),
    )


@pytest.mark.parametrize(("mode", "contract"), [("stem", "cap"), ("inline", "cap"), ("stem", "mean")])
def test_no_allocation_of_10000_exceeds_its_budget(mode: str, contract: str) -> None:
    draw = random.Random(1)
    gated = new_gated(mode=mode)
    gated.prices = [(0.1, 2.0), (1.0, -2.0)]
    seen: set[Allocation] = set()
    for batch in range(10):
        scramble(gated, batch)
        ids, mask = prompts(1000, 4, seed=batch)
        budgets = [random_budget(draw) for _ in range(1000)]
        found = gated.allocate(ids, mask, budgets, contract=contract)  # type: ignore[arg-type]
        for allocation, budget in zip(found, budgets, strict=True):
            held = (
                budget
                if contract == "cap"
                else Budget(layers=budget.layers, heads=budget.heads, think_tokens=budget.think_tokens)
            )
            assert gated.cost.fits(allocation, held), (allocation, budget)
            assert allocation.groups[0] == (0, 1)  # the stem runs whole
            if budget.compute == 1.0 and budget.layers is budget.heads is None:
                assert len(allocation.layers) == LAYERS
                assert allocation.head_sparsity == 0
        seen.update(found)
    assert len(seen) > 200


def test_the_result_of_a_forward_is_what_is_allocated() -> None:
    gated = new_gated()
    result = GateResult(torch.tensor([[True, False]]), torch.tensor([[[True, False], [False, False]]]), *[NOTHING] * 4)
    (found,) = gated.allocations_of(result, [Budget(think_tokens=7)])
    assert found == Allocation(num_groups=2, groups=((0, 1), (0,), ()), think_tokens=7)


def random_scores(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 5, GROUPS, generator=generator)


def test_more_budget_never_costs_less_under_mean() -> None:
    layer_scores, group_scores = random_scores(200)
    before = torch.zeros(200, dtype=torch.long)
    for price in (3.0, 1.0, 0.0, -1.0, -3.0):
        room = limits(10_000, price=price)
        room = Limits(*(value.expand(200) for value in vars(room).values()))
        decision = project(layer_scores, group_scores, room, layer_units=9, group_units=2, min_groups=1)
        count = decision.layers.sum(1) + decision.groups.sum((1, 2))
        assert (count >= before).all()
        before = count
    assert (before > 10).all()


def test_the_threshold_moves_as_a_filled_budget_makes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(3, 4, generator=generator).double().requires_grad_()
    optional = torch.randn(3, 4, 2, generator=generator).double().requires_grad_()
    threshold, costs, heat = torch.tensor([0.1, -0.4, 0.8], dtype=torch.double), (9, 2), 0.5
    decision = Decision(layers=layers > 0, groups=optional > 0, threshold=threshold)
    moved = moving_threshold(layers, optional, decision, costs=costs, temperature=heat)
    assert torch.equal(moved, threshold)
    found = torch.autograd.grad(moved.sum(), (layers, optional))

    def spent(layers: torch.Tensor, optional: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        soft_layers = torch.sigmoid((layers - at[:, None]) / heat)
        soft_groups = torch.sigmoid((optional - at[:, None, None]) / heat)
        return costs[0] * soft_layers.sum(1) + costs[1] * soft_groups.sum((1, 2))

    step, before = 1e-5, spent(layers, optional, threshold)
    slope = (spent(layers, optional, threshold + step) - spent(layers, optional, threshold - step)) / (2 * step)
    for layer in range(4):  # implicit differentiation: nudge a score, and see how far the threshold must follow
        nudged = layers.detach().clone()
        nudged[:, layer] += step
        follow = -(spent(nudged, optional, threshold) - before) / slope / step
        assert torch.allclose(follow, found[0][:, layer], atol=1e-4)
    total = found[0].sum(1) + found[1].sum((1, 2))
    assert torch.allclose(total, torch.ones_like(total))  # when all scores rise alike, so does the threshold
