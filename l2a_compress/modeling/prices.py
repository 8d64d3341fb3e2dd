"""Calibrated prices of the ``mean`` contract: p(b) such that the mean realized cost of a stream is b."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.modeling.budgets import BudgetBatch, batch_budgets, minimum_compute
from l2a_compress.modeling.deciders import GateRequest, decide
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import SCORE_LIMIT
from l2a_compress.modeling.projection import effective_scores

MeanCost = Callable[[float], float]  # price -> mean realized cost, as a fraction
TOLERANCE = 0.004  # of the realized cost at an interpolated price
FINEST = 0.004  # budgets closer than this are not told apart
Prompts = Sequence[tuple[Tensor, Tensor]]  # (input_ids, attention_mask), left-padded, ending in <think>


def price_grid(gated: GatedModel) -> list[float]:
    """Budgets to calibrate, from the least an input gets to 1, close enough to interpolate between.

    Of inline gates, where every price that is tried takes a forward of the whole model, they are fewer.
    """
    count = 33 if gated.gate_config.mode == "stem" else 9
    least = minimum_compute(gated.cost, gated.gate_config) + 0.5 / gated.shape.num_layers
    if gated.gate_config.has_demand:
        least = max(least, gated.gate_config.least_compute)
    step = (1 - least) / (count - 1)
    # Near 1 the price falls steeply, to the lowest score of any prompt.
    return [
        round(budget, 4) for budget in (*(least + step * i for i in range(count - 1)), 1 - step / 2, 1 - step / 4, 1)
    ]


@torch.no_grad()
def calibrate_prices(gated: GatedModel, prompts: Prompts, budgets: Sequence[float]) -> list[tuple[float, float]]:
    """For each budget the price at which the mean realized cost over ``prompts`` is that budget, by bisection.

    Where inputs have like scores, the price jumps at the budgets where a layer falls out: stem gates, whose decisions
    are cheap, get more points there, so that a price interpolated between two of them keeps to its budget too.
    """
    was_training = gated.training
    gated.eval()
    if gated.gate_config.mode == "stem":
        cost_at = _stem_costs(gated, prompts)
        table = [(budget, _bisect(cost_at(budget), budget)) for budget in budgets]
        for left, right in pairwise(tuple(table)):
            table += _between(cost_at, left, right)
    else:
        table = [
            (budget, _bisect(partial(_inline_cost, gated, prompts, budget), budget, rounds=14)) for budget in budgets
        ]
    gated.train(was_training)
    return sorted(table)


def _between(
    cost_at: Callable[[float], MeanCost], left: tuple[float, float], right: tuple[float, float]
) -> list[tuple[float, float]]:
    """The points that are needed between two (budget, price) pairs for interpolated prices to be close enough."""
    middle = round((left[0] + right[0]) / 2, 4)
    if right[0] - left[0] < FINEST:
        return []
    mean_cost = cost_at(middle)
    if abs(mean_cost((left[1] + right[1]) / 2) - middle) <= TOLERANCE:
        return []
    point = (middle, _bisect(mean_cost, middle))
    return [*_between(cost_at, left, point), point, *_between(cost_at, point, right)]


def _bisect(mean_cost: MeanCost, budget: float, *, rounds: int = 30) -> float:
    low, high = -1.5 * SCORE_LIMIT, 1.5 * SCORE_LIMIT
    for _ in range(rounds):
        middle = (low + high) / 2
        if mean_cost(middle) >= budget:  # at budget 1 the highest price at which everything runs, not the lowest
            low = middle
        else:
            high = middle
    return high


def _stem_costs(gated: GatedModel, prompts: Prompts) -> Callable[[float], MeanCost]:
    """For a budget that gates are told, the mean cost as a function of the price."""
    read = [StemReader(gated, ids, mask) for ids, mask in prompts]

    def cost_at(budget: float) -> MeanCost:
        summaries = torch.cat([part.summaries(budget) for part in read])
        if gated.allocator.demand is not None:
            return _demanded_cost(gated, summaries)
        told = _budgets(gated, len(summaries), budget).to(summaries.device).features
        layers, groups = gated.allocator.scores(gated.allocator.features(summaries, told))
        return partial(_scored_cost, gated, layers, groups)

    return cost_at


def _demanded_cost(gated: GatedModel, summaries: Tensor) -> MeanCost:
    """That of inputs each of which gets the level that is worth its price. What one takes at a level is kept."""
    demand, rows = gated.allocator.demand, len(summaries)
    assert demand is not None
    failure = demand.failure(summaries, _budgets(gated, rows, 1.0).think.to(summaries.device))
    known = torch.full((rows, len(demand.levels)), torch.nan, dtype=torch.float64, device=summaries.device)

    def mean_cost(price: float) -> float:
        chosen = demand.worth(failure, demand.levels.new_full((rows,), price))
        new = known[range(rows), chosen].isnan().nonzero().squeeze(1)
        if len(new):
            priced = _budgets(gated, len(new), 1.0, price).to(summaries.device)
            hard = decide(gated.allocator, gated.cost, summaries[new], priced).hard
            known[new, chosen[new]] = _units(gated, hard.layers, hard.groups)
        return _mean(gated, known[range(rows), chosen])

    return mean_cost


class StemReader:
    """A batch of prompts behind the stem, told any budget.

    The network sees its budget at ``<think>``, where prompts end: what is before the first one is read once, with what
    the stem keeps of it for the tokens that follow.
    """

    def __init__(self, gated: GatedModel, ids: Tensor, mask: Tensor) -> None:
        self.gated, self.ids, self.mask, self.cache = gated, ids, mask, DynamicCache()
        told = [] if gated.think_id is None else torch.eq(ids, gated.think_id).any(0).nonzero().flatten().tolist()
        self.common = told[0] if told and gated.gate_config.tokens else ids.shape[1]
        self.hidden = self._read(0, self.common)
        # Where no token is told a budget there is one summary for all of them.
        self.untold = gated.allocator.summarize(self.hidden, mask) if self.common == ids.shape[1] else None

    def summaries(self, budget: float) -> Tensor:
        """What the gates see of each prompt: [prompts, 2 * width]."""
        if self.untold is not None:
            return self.untold
        rest = self._read(self.common, self.ids.shape[1], budget)
        self.cache.crop(-rest.shape[1])
        return self.gated.allocator.summarize(torch.cat([self.hidden, rest], dim=1), self.mask)

    def _read(self, start: int, end: int, budget: float = 1.0) -> Tensor:
        """States behind the stem of the tokens from ``start`` to ``end``: [prompts, tokens, width]."""
        gated, ids, mask = self.gated, self.ids[:, start:end], self.mask[:, :end]
        stem, found = gated.gate_config.stem_layers, list[Tensor]()
        if start == end:
            return ids.new_empty(*ids.shape, gated.shape.hidden_size, dtype=gated.model.dtype)

        def catch(index: int, hidden: Tensor) -> None:
            if index == stem:
                found.append(hidden)

        with gated.forced([Allocation.of_layers(range(stem), gated.shape.num_layers, gated.shape.num_groups)]):
            gated.state.hook = catch
            gated.state.offset = gated.think_offset(ids, _budgets(gated, len(ids), budget).to(ids.device).features)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
            gated(ids, mask, position_ids=positions, cache=self.cache)
        return found[0]


def _budgets(gated: GatedModel, rows: int, budget: float, price: float = -torch.inf) -> BudgetBatch:
    """Rows that are told a budget and held to nothing, but to pay a price that is not yet in the table."""
    batch = batch_budgets([Budget()] * rows, gated.cost, gated.gate_config)
    limits = replace(batch.limits, price=torch.full((rows,), price))
    return BudgetBatch(compute=torch.full((rows,), budget), think=batch.think, limits=limits)


def _scored_cost(gated: GatedModel, layers: Tensor, groups: Tensor, price: float) -> float:
    """With no other limit the projection keeps exactly what exceeds the price."""
    least = gated.gate_config.min_groups if gated.gate_config.heads else gated.shape.num_groups
    kept = layers > price
    first = torch.arange(groups.shape[-1], device=groups.device) < least
    offered = (effective_scores(layers, groups) > price) | first
    return _mean(gated, _units(gated, kept, offered & kept[..., None]))


def _inline_cost(gated: GatedModel, prompts: Prompts, budget: float, price: float) -> float:
    found = list[Tensor]()
    for ids, mask in prompts:
        request = GateRequest(_budgets(gated, len(ids), budget, price).to(ids.device), mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        gates = gated(ids, mask, request=request, position_ids=positions).gates
        gated.state.reset()
        found.append(_units(gated, gates.layers, gates.groups))
    return _mean(gated, torch.cat(found))


def _units(gated: GatedModel, layers: Tensor, groups: Tensor) -> Tensor:
    """What decisions [prompts, gated layers], [prompts, gated layers, groups] cost with the stem: [prompts]."""
    cost = gated.cost
    stem = cost.dense_units * gated.gate_config.stem_layers // gated.shape.num_layers
    return (layers.sum(1) * cost.layer_units + groups.sum((1, 2)) * cost.group_units + stem).double()


def _mean(gated: GatedModel, units: Tensor) -> float:
    """As a share of dense; divided last, so that a mean that is a budget exactly is not above or below it."""
    return float(units.mean()) / gated.cost.dense_units
