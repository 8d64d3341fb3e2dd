"""Calibrated prices of the ``mean`` contract: p(b) such that the mean realized cost of a stream is b."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from l2a_compress.budget import Budget
from l2a_compress.modeling.budgets import BudgetBatch, batch_budgets, minimum_compute
from l2a_compress.modeling.deciders import GateRequest
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import SCORE_LIMIT
from l2a_compress.modeling.projection import effective_scores

Prompts = Sequence[tuple[Tensor, Tensor]]  # (input_ids, attention_mask), left-padded, ending in <think>


def price_grid(gated: GatedModel) -> list[float]:
    """Budgets to calibrate, from just above the stem's cost to 1, close enough to interpolate between.

    Of inline gates, where every price that is tried takes a forward of the whole model, they are fewer.
    """
    count = 33 if gated.gate_config.mode == "stem" else 9
    least = minimum_compute(gated.cost, gated.gate_config) + 0.5 / gated.shape.num_layers
    step = (1 - least) / (count - 1)
    # Near 1 the price falls steeply, to the lowest score of any prompt.
    return [
        round(budget, 4) for budget in (*(least + step * i for i in range(count - 1)), 1 - step / 2, 1 - step / 4, 1)
    ]


@torch.no_grad()
def calibrate_prices(gated: GatedModel, prompts: Prompts, budgets: Sequence[float]) -> list[tuple[float, float]]:
    """For each budget the price at which the mean realized cost over ``prompts`` is that budget, by bisection."""
    was_training = gated.training
    gated.eval()
    table = []
    for budget in budgets:
        if gated.gate_config.mode == "stem":
            scores = [_scores(gated, ids, mask, budget) for ids, mask in prompts]
            layers, groups = (torch.cat(part) for part in zip(*scores, strict=True))
            table.append((budget, _bisect(partial(_stem_cost, gated, layers, groups), budget)))
        else:
            cost = partial(_inline_cost, gated, prompts, budget)
            table.append((budget, _bisect(cost, budget, rounds=14)))
    gated.train(was_training)
    return table


def _bisect(mean_cost: Callable[[float], float], budget: float, *, rounds: int = 30) -> float:
    low, high = -1.5 * SCORE_LIMIT, 1.5 * SCORE_LIMIT
    for _ in range(rounds):
        middle = (low + high) / 2
        if mean_cost(middle) >= budget:  # at budget 1 the highest price at which everything runs, not the lowest
            low = middle
        else:
            high = middle
    return high


def _scores(gated: GatedModel, ids: Tensor, mask: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    request = GateRequest(_priced(gated, len(ids), budget, 0.0).to(ids.device), mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    gates = gated(ids, mask, request=request, position_ids=positions, probe=True).gates
    gated.state.reset()
    assert gates is not None
    return gates.layer_scores, gates.group_scores


def _priced(gated: GatedModel, rows: int, budget: float, price: float) -> BudgetBatch:
    """A ``mean`` batch at one budget and a price that is not yet in the table."""
    batch = batch_budgets([Budget()] * rows, gated.cost, gated.gate_config)
    limits = replace(batch.limits, price=torch.full((rows,), price))
    return BudgetBatch(compute=torch.full((rows,), budget), think=batch.think, limits=limits)


def _stem_cost(gated: GatedModel, layers: Tensor, groups: Tensor, price: float) -> float:
    """With no other limit the projection keeps exactly what exceeds the price."""
    least = gated.gate_config.min_groups if gated.gate_config.heads else gated.shape.num_groups
    kept = layers > price
    offered = (effective_scores(layers, groups) > price) | (torch.arange(groups.shape[-1]) < least)
    return _mean_fraction(gated, kept, offered & kept[..., None])


def _inline_cost(gated: GatedModel, prompts: Prompts, budget: float, price: float) -> float:
    kept = []
    for ids, mask in prompts:
        request = GateRequest(_priced(gated, len(ids), budget, price).to(ids.device), mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        gates = gated(ids, mask, request=request, position_ids=positions).gates
        gated.state.reset()
        assert gates is not None
        kept.append((gates.layers, gates.groups))
    layers, groups = (torch.cat(part) for part in zip(*kept, strict=True))
    return _mean_fraction(gated, layers, groups)


def _mean_fraction(gated: GatedModel, layers: Tensor, groups: Tensor) -> float:
    cost = gated.cost
    units = layers.sum(1) * cost.layer_units + groups.sum((1, 2)) * cost.group_units
    stem = cost.dense_units * gated.gate_config.stem_layers // gated.shape.num_layers
    return float((units + stem).double().mean()) / cost.dense_units
