"""Budgets as tensors, and the calibrated prices of the ``mean`` contract."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.errors import BudgetError, ConfigError
from l2a_compress.limits import price_of, think_share
from l2a_compress.modeling.budgets import batch_budgets, minimum_compute
from l2a_compress.modeling.deciders import GateRequest
from l2a_compress.modeling.families import shape_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.prices import StemReader, calibrate_prices, price_grid
from toy_models import GROUPS, LAYERS, new_gated, new_model, positions, prompts

CONFIG = GateConfig(stem_layers=2, think_reference=100)
COST = CostModel(shape=shape_of(new_model().config))
PRICES = [(0.4, 3.0), (0.6, 1.0), (1.0, -5.0)]


def test_the_stem_is_taken_off_every_limit() -> None:
    batch = batch_budgets([Budget(), Budget(compute=0.5, layers=4, heads=7, think_tokens=25)], COST, CONFIG)
    stem = COST.dense_units // 3
    assert batch.limits.units.tolist() == [COST.dense_units - stem, COST.dense_units // 2 - stem]
    assert batch.limits.layers.tolist() == [LAYERS - 2, 2]
    assert batch.limits.heads.tolist() == [(LAYERS - 2) * GROUPS, 3]
    assert batch.limits.price.tolist() == [-math.inf] * 2
    assert batch.features.tolist() == [[1.0, 1.0], [0.5, 0.25]]


def test_under_mean_a_row_pays_a_price_and_only_caps_limit_it() -> None:
    batch = batch_budgets([Budget(compute=0.5, layers=4)], COST, CONFIG, contract="mean", prices=PRICES)
    assert batch.limits.price.tolist() == [2.0]
    assert batch.limits.units.tolist() == [COST.dense_units * 2 // 3]
    assert batch.limits.layers.tolist() == [2]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(compute=0.33), "compute budget 0.33 is below 0.3333, what the 2 always-on layers cost"),
        (Budget(layers=1), "layer cap 1 is below the 2 always-on layers"),
        (Budget(heads=3), "head cap 3 is below the 4 KV groups of the always-on layers"),
    ],
)
def test_less_than_the_stem_is_a_budget_error(budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        batch_budgets([Budget(), budget], COST, CONFIG)
    ids, mask = prompts(2)
    with pytest.raises(BudgetError, match=message):
        new_gated(stem_layers=2).allocate(ids, mask, [Budget(), budget])


def test_exactly_the_stem_is_enough() -> None:
    budget = Budget(compute=minimum_compute(COST, CONFIG), layers=2, heads=4)
    batch = batch_budgets([budget], COST, CONFIG)
    assert [value.item() for value in (batch.limits.units, batch.limits.layers, batch.limits.heads)] == [0, 0, 0]


@pytest.mark.parametrize(("tokens", "share"), [(None, 1.0), (0, 0.0), (25, 0.25), (500, 1.0)])
def test_the_think_share(tokens: int | None, share: float) -> None:
    assert think_share(Budget(think_tokens=tokens), CONFIG.think_reference) == share


@pytest.mark.parametrize(
    ("compute", "price"), [(0.4, 3.0), (0.5, 2.0), (0.6, 1.0), (0.8, -2.0), (0.9999999, -5.0), (1.0, -1e9)]
)
def test_prices_are_interpolated(compute: float, price: float) -> None:
    assert price_of(compute, PRICES) == pytest.approx(price, abs=1e-5)


def test_a_table_of_one_price() -> None:
    assert price_of(0.5, [(0.5, 2.0)]) == 2.0
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        price_of(0.6, [(0.5, 2.0)])


def test_no_price_or_none_for_this_budget_is_an_error() -> None:
    with pytest.raises(BudgetError, match="needs calibrated prices"):
        price_of(0.5, [])
    with pytest.raises(BudgetError, match=r"budget 0.3 lies outside the calibrated range 0.4..1.0"):
        price_of(0.3, PRICES)
    ids, mask = prompts(1)
    with pytest.raises(BudgetError, match="needs calibrated prices"):
        new_gated().allocate(ids, mask, [Budget(compute=0.5)], contract="mean")


def test_the_grid_runs_from_above_the_stem_to_one() -> None:
    for gated, least in ((new_gated(demand=False), 1.5 / LAYERS), (new_gated(least_compute=0.35), 0.35)):
        grid = price_grid(gated)
        assert grid[0] == pytest.approx(least, abs=1e-4)
        assert grid[-1] == 1.0
        assert grid == sorted(set(grid))


def mean_cost(gated: GatedModel, budget: float, ids: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and deviation of what prompts take under the ``mean`` contract."""
    found = gated.allocate(ids, mask, [Budget(compute=budget)] * len(ids), contract="mean")
    costs = torch.tensor([gated.cost.fraction(allocation) for allocation in found], dtype=torch.float64)
    return costs.mean().item(), costs.std().item()


@pytest.mark.parametrize("demand", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_calibrated_prices_hold_on_fresh_prompts(seed: int, demand: bool) -> None:
    gated = new_gated(seed=seed, budget_dim=4, demand=demand)
    if gated.allocator.demand is not None:  # inputs that differ, else all change to another level at one price
        gated.allocator.demand.inner.weight.data[:, -4:] *= 0.3
    grid = price_grid(gated)
    gated.train()
    gated.prices = calibrate_prices(gated, [prompts(1000, 6, seed=10), prompts(1000, 6, seed=11)], grid)
    assert gated.training  # the mode is left as it was
    gated.eval()
    fresh = prompts(2000, 6, seed=12)
    between = [(low + high) / 2 for low, high in itertools.pairwise(grid)]
    for budget in [*grid[::8], *between[1::8], *between[-3:]]:
        mean, deviation = mean_cost(gated, budget, *fresh)
        assert abs(mean - budget) <= (0.02 if demand else 0.01), (budget, mean)  # few levels, untrained: coarse
        assert deviation > 0.02 or not 0.3 < budget < 0.9  # prompts take different amounts


def test_prices_get_more_points_where_they_jump() -> None:
    gated = new_gated(seed=0, budget_dim=4, demand=False)
    with torch.no_grad():  # prompts of almost the same scores, layers of different ones: a jump for every layer
        for gates in (gated.allocator.layer_gates, gated.allocator.head_gates):
            gates.outer.mul_(0.05)
            gates.outer_bias.copy_(torch.linspace(-2, 2, gates.outer_bias.numel()).view_as(gates.outer_bias))
    grid, known = price_grid(gated), [prompts(1000, 6, seed=10)]
    gated.prices = calibrate_prices(gated, known, grid)
    assert len(gated.prices) > len(grid)
    assert [budget for budget, _ in gated.prices] == sorted({budget for budget, _ in gated.prices})
    fresh = prompts(2000, 6, seed=12)
    for low, high in itertools.pairwise(grid):
        budget = low + 0.6 * (high - low)
        assert abs(mean_cost(gated, budget, *fresh)[0] - budget) <= 0.01


@torch.no_grad()
def test_an_input_gets_the_budget_that_is_worth_its_price() -> None:
    gated, (ids, mask) = new_gated(least_compute=0.3), prompts(40, 8)
    gated.think_id = None  # else the stem sees the budget that is told
    demand, price = gated.allocator.demand, 0.15
    assert demand is not None
    gated.prices = ((0.3, price), (0.9, price))
    found = gated.allocate(ids, mask, [Budget(compute=0.5)] * 40, contract="mean")
    summary = gated(ids, mask, request=GateRequest(batch_budgets([Budget()] * 40, gated.cost, gated.gate_config), mask))
    gated.state.reset()
    assert summary.gates is not None
    for row in range(40):
        worth = []
        for level in demand.levels.tolist():
            logit = demand(summary.gates.summary[row], torch.tensor([level, 1.0]))
            worth.append((float(torch.sigmoid(logit)) + price * level, round(level, 4)))
        cap = Budget(compute=min(worth)[1])
        assert gated.allocate(ids[row : row + 1], mask[row : row + 1], [cap]) == [found[row]]
    assert len({gated.cost.units(allocation) for allocation in found}) > 1


def test_the_whole_budget_runs_everything_whatever_an_input_needs() -> None:
    gated, (ids, mask) = new_gated(), prompts(8)
    gated.prices = ((0.4, 1.0), (1.0, -1.0))
    for allocation in gated.allocate(ids, mask, [Budget()] * 8, contract="mean"):
        assert gated.cost.fraction(allocation) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("stem", [1, 3])
def test_prompts_that_are_read_on_from_think_give_what_whole_ones_give(family: str, stem: int) -> None:
    gated, (ids, mask) = new_gated(family, stem_layers=stem), prompts(6)
    ids[:, 2:-1][ids[:, 2:-1] == gated.think_id] = 7
    reader, seen = StemReader(gated, ids, mask), list[Tensor]()
    assert reader.common == ids.shape[1] - 1
    for compute in (0.5, 0.9, 0.5):
        told = batch_budgets([Budget(compute=compute)] * 6, gated.cost, gated.gate_config)
        whole = gated(ids, mask, request=GateRequest(told, mask), position_ids=positions(mask)).gates
        seen.append(reader.summaries(compute))
        torch.testing.assert_close(seen[-1], whole.summary, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])


@torch.no_grad()
def test_a_prompt_with_an_earlier_think_is_read_from_there() -> None:
    gated, (ids, mask) = new_gated(), prompts(6)
    assert gated.think_id is not None
    for place in (0, 4):
        ids[5], mask[5] = 7, 1
        ids[5, place] = gated.think_id
        told = batch_budgets([Budget(compute=0.6)] * 6, gated.cost, gated.gate_config)
        whole = gated(ids, mask, request=GateRequest(told, mask), position_ids=positions(mask)).gates
        reader = StemReader(gated, ids, mask)
        assert reader.common <= place
        torch.testing.assert_close(reader.summaries(0.6), whole.summary, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_that_are_not_told_a_budget_have_one_summary() -> None:
    gated, (ids, mask) = new_gated(tokens=False), prompts(6)
    told = batch_budgets([Budget()] * 6, gated.cost, gated.gate_config)
    whole = gated(ids, mask, request=GateRequest(told, mask), position_ids=positions(mask)).gates
    reader = StemReader(gated, ids, mask)
    torch.testing.assert_close(reader.summaries(0.5), whole.summary, atol=1e-5, rtol=1e-5)
    assert torch.equal(reader.summaries(0.9), reader.summaries(0.5))


def test_calibrated_prices_of_inline_gates_hold_on_fresh_prompts() -> None:
    gated = new_gated(mode="inline")
    gated.prices = calibrate_prices(gated, [prompts(1000, 4, seed=10)], [0.6])
    mean, deviation = mean_cost(gated, 0.6, *prompts(1000, 4, seed=11))
    assert abs(mean - 0.6) <= 0.01
    assert deviation > 0.02


@pytest.mark.parametrize(
    "values", [{"mode": "both"}, {"summary": "max"}, {"stem_layers": 0}, {"hidden": True}, {"min_groups": 1.0}]
)
def test_wrong_gate_settings(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        GateConfig(**values)  # type: ignore[arg-type]


def test_gate_settings_round_trip_and_unknown_ones_are_refused() -> None:
    config = GateConfig(mode="inline", hidden=7, heads=False)
    assert GateConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="stems"):
        GateConfig.from_json({"stems": 1})
