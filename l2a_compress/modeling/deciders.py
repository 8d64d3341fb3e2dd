"""Deciders: called before each layer of a forward, they turn gate scores into the plans of the layers to come.

:class:`StemDecider` decides everything once, behind the stem. :class:`InlineDecider` is the paper's form: each gate
reads its own layer's input and spends what the layers before it left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.modeling.budgets import BudgetBatch
from l2a_compress.modeling.gates import Allocator, GateConfig, demand_levels
from l2a_compress.modeling.layers import GateState, LayerPlan, plan_from_masks
from l2a_compress.modeling.projection import (
    Decision,
    effective_scores,
    moving_threshold,
    project,
    straight_through,
)


@dataclass
class GateRequest:
    """What a forward is asked to decide.

    Attributes:
        budgets: one per row.
        prompt_mask: [batch, length], 1 on the tokens that the gates may see.
        temperature: of the gates.
        noise: added to layer and group scores (by rank) while exploring: [batch, gated layers, 1 + groups], or None.
        after: a second set of budgets that holds from position ``switch`` [batch] on (a budget change in mid-sequence).
    """

    budgets: BudgetBatch
    prompt_mask: Tensor
    temperature: float = 1.0
    noise: Tensor | None = None
    after: BudgetBatch | None = None
    switch: Tensor | None = None


@dataclass
class GateResult:
    """What was decided: hard ``layers`` [batch, gated], ``groups`` [batch, gated, groups]; the soft cost is [batch].

    ``layer_scores`` and, by rank, ``group_scores`` are shaped like them. ``compute`` [batch] is the budget that the
    gates were told, and ``summary`` [batch, 2 * width] what they saw of the prompt (stem gates).
    """

    layers: Tensor
    groups: Tensor
    soft_cost: Tensor
    layer_scores: Tensor
    group_scores: Tensor
    compute: Tensor
    summary: Tensor | None = None


class StemDecider:
    """Runs all gates at the first gated layer."""

    def __init__(
        self, request: GateRequest, allocator: Allocator, cost: CostModel, state: GateState, *, probe: bool = False
    ) -> None:
        self.request, self.allocator, self.cost, self.state, self.probe = request, allocator, cost, state, probe
        self.config = allocator.config
        self.result: GateResult | None = None

    def __call__(self, index: int, hidden: Tensor) -> None:
        """Decides when ``index`` is the first gated layer; ``hidden`` is [batch, length, width]."""
        if index != self.config.stem_layers:
            return
        request = self.request
        self.result, masks = self._decide(hidden, request.budgets)
        if request.after is not None and request.switch is not None:
            later = torch.arange(hidden.shape[1], device=hidden.device) >= request.switch[:, None]
            _, after = self._decide(hidden, request.after)
            masks = [_merge(later, first, second) for first, second in zip(masks, after, strict=True)]
        exact = not torch.is_grad_enabled()
        for offset, (layer, groups) in enumerate(masks):
            plan = LayerPlan(skip=True) if self.probe else plan_from_masks(layer, groups, exact=exact)
            self.state.plans[index + offset] = plan

    def _decide(self, hidden: Tensor, budgets: BudgetBatch) -> tuple[GateResult, list[tuple[Tensor, Tensor]]]:
        request, allocator, heat = self.request, self.allocator, self.request.temperature
        summary = allocator.summarize(hidden, request.prompt_mask)
        found = decide(allocator, self.cost, summary, budgets, request.noise)
        hard, layer_scores, group_scores = found.hard, found.layer_scores, found.group_scores
        quiet = layer_scores, group_scores
        if request.noise is not None:
            quiet = layer_scores - request.noise[..., 0], group_scores - request.noise[..., 1:]
        soft_cost = soft_fraction(*quiet, self.cost, self.config.heads, heat)
        groups = allocator.by_group(hard.groups)
        result = GateResult(hard.layers, groups, soft_cost, layer_scores, group_scores, found.budgets.compute, summary)
        if not torch.is_grad_enabled():
            layer_masks, group_masks = hard.layers.float(), groups.float()
        else:
            effective, least = effective_scores(layer_scores, group_scores), allocator.min_groups
            costs = (self.cost.layer_units + least * self.cost.group_units, self.cost.group_units)
            filled = moving_threshold(layer_scores, effective[..., least:], hard, costs=costs, temperature=heat)
            priced = torch.isfinite(
                found.budgets.limits.price
            )  # a price stands still: the budget term moves the scores
            threshold = torch.where(priced, hard.threshold, filled)[:, None]
            layer_masks = straight_through(hard.layers, layer_scores, threshold, heat)
            opened = _opened(hard.layers, hard.groups, allocator)
            group_masks = allocator.by_group(opened).float()
            if self.config.heads:
                group_masks = allocator.by_group(straight_through(opened, effective, threshold[..., None], heat))
        pairs = zip(layer_masks.unbind(1), group_masks.unbind(1), strict=True)
        return result, [(layer[:, None], groups[:, None]) for layer, groups in pairs]


@dataclass
class Decided:
    """Scores, with noise where there is some, the budgets that rows were held to, and what was kept, by rank."""

    layer_scores: Tensor
    group_scores: Tensor
    budgets: BudgetBatch
    hard: Decision


def decide(
    allocator: Allocator, cost: CostModel, summary: Tensor, budgets: BudgetBatch, noise: Tensor | None = None
) -> Decided:
    """What stem gates keep for prompts of these summaries [batch, 2 * width]."""
    budgets = demanded(allocator, cost, summary, budgets)
    layer_scores, group_scores = allocator.scores(allocator.features(summary, budgets.features))
    if noise is not None:
        layer_scores, group_scores = layer_scores + noise[..., 0], group_scores + noise[..., 1:]
    hard = project(
        layer_scores,
        group_scores,
        budgets.limits,
        layer_units=cost.layer_units,
        group_units=cost.group_units,
        min_groups=allocator.min_groups,
    )
    return Decided(layer_scores, group_scores, budgets, hard)


def demanded(allocator: Allocator, cost: CostModel, summary: Tensor, budgets: BudgetBatch) -> BudgetBatch:
    """Where a row pays a price, the budget that is worth it to this prompt, as a cap in the place of the price."""
    demand, limits = allocator.demand, budgets.limits
    priced = torch.isfinite(limits.price)
    if demand is None or not bool(priced.any()):
        return budgets
    chosen = demand.worth(demand.failure(summary, budgets.think), limits.price)
    units = torch.tensor(level_units(allocator.config, cost), device=chosen.device)[chosen]
    return replace(
        budgets,
        compute=torch.where(priced, demand.levels[chosen], budgets.compute),
        limits=replace(
            limits,
            units=torch.where(priced, torch.minimum(limits.units, units), limits.units),
            price=torch.where(priced, -torch.inf, limits.price),
        ),
    )


class InlineDecider:
    """Runs the gate of each layer on that layer's own input, and spends what is left of the budget as it goes."""

    def __init__(
        self, request: GateRequest, allocator: Allocator, cost: CostModel, state: GateState, *, probe: bool = False
    ) -> None:
        self.request, self.allocator, self.cost, self.state = request, allocator, cost, state
        self.config = allocator.config
        limits = request.budgets.limits
        self.units, self.layers_left, self.heads_left = limits.units, limits.layers, limits.heads
        self.decided: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @property
    def result(self) -> GateResult | None:
        """All layers' decisions, once the last layer was reached."""
        if not self.decided:
            return None
        layers, groups, layer_scores, group_scores = (
            torch.stack(list(part), 1) for part in zip(*self.decided, strict=True)
        )
        soft = soft_fraction(layer_scores, group_scores, self.cost, self.config.heads, self.request.temperature)
        return GateResult(layers, groups, soft, layer_scores, group_scores, self.request.budgets.compute)

    def __call__(self, index: int, hidden: Tensor) -> None:
        """Decides layer ``index`` from its input [batch, length, width]."""
        gate = index - self.config.stem_layers
        if gate < 0:
            return
        request, price = self.request, self.request.budgets.limits.price
        summary = self.allocator.summarize(hidden, request.prompt_mask)
        features = self.allocator.features(summary, request.budgets.features)
        layer_score, group_score = self.allocator.scores_at(gate, features)
        noisy_layer, noisy_group = layer_score, group_score
        if request.noise is not None:
            noisy_layer = layer_score + request.noise[:, gate, 0]
            noisy_group = group_score + request.noise[:, gate, 1:]
        threshold = torch.where(torch.isfinite(price), price, torch.zeros_like(price))
        full = request.budgets.compute >= 1.0  # the whole budget forces every gate open
        noisy_group = noisy_group.cummin(-1).values
        keep, ranks = self._spend(noisy_layer, noisy_group, threshold, full)
        groups = self.allocator.by_group(ranks, gate)
        self.decided.append((keep, groups, layer_score, group_score))
        exact = not torch.is_grad_enabled()
        layer_mask, group_mask = keep.float(), groups.float()
        if not exact:
            layer_mask = straight_through(keep, noisy_layer, threshold, request.temperature)
            opened = _opened(keep, ranks, self.allocator)
            group_mask = self.allocator.by_group(opened, gate).float()
            if self.config.heads:
                mask = straight_through(opened, noisy_group, threshold[:, None], request.temperature)
                group_mask = self.allocator.by_group(mask, gate)
        self.state.plans[index] = plan_from_masks(layer_mask[:, None], group_mask[:, None], exact=exact)

    @torch.no_grad()
    def _spend(self, layer: Tensor, group: Tensor, threshold: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
        """Hard decisions for one layer, [batch] and [batch, groups] scores by rank -> bool masks; spends their cost."""
        cost, total = self.cost, group.shape[-1]
        least = self.config.min_groups if self.config.heads else total
        rank = torch.arange(total, device=group.device)
        wanted = (rank < least) | (group > threshold[:, None]) | full[:, None]
        affordable = torch.div(self.units - cost.layer_units, cost.group_units, rounding_mode="floor")
        affordable = torch.minimum(affordable, self.heads_left)
        keep = ((layer > threshold) | full) & (affordable >= least) & (self.layers_left > 0)
        groups = wanted & (rank < affordable[:, None]) & keep[:, None]
        count = groups.sum(-1)
        self.units = self.units - keep * cost.layer_units - count * cost.group_units
        self.layers_left, self.heads_left = self.layers_left - keep.long(), self.heads_left - count
        return keep, groups


def _opened(layers: Tensor, groups: Tensor, allocator: Allocator) -> Tensor:
    """Groups [..., groups] by rank, where a closed layer has the least that it would run with.

    The gradient of its mask is what the layer would change. Without a group that is what its MLP alone would, which no
    layer that is kept ever runs as. Its output is multiplied by 0, so neither a value nor another gradient changes.
    Gates that do not learn have no use for it, and compute what they always did.
    """
    if not allocator.learns_order:
        return groups
    least = torch.arange(groups.shape[-1], device=groups.device) < allocator.min_groups
    return groups | (~layers[..., None] & least)


@functools.cache
def level_units(config: GateConfig, cost: CostModel) -> tuple[int, ...]:
    """What each of :func:`demand_levels` leaves to spend behind the stem, in units of the cost model."""
    stem = config.stem_layers * (cost.layer_units + cost.shape.num_groups * cost.group_units)
    return tuple(cost.limit(Budget(compute=round(level, 4))) - stem for level in demand_levels(config).tolist())


def soft_fraction(layer: Tensor, group: Tensor, cost: CostModel, heads: bool, temperature: float) -> Tensor:
    """C(b) of the paper for each row: gate values times normalized cost, the always-on stem included.

    Args:
        layer: scores [batch, gated layers].
        group: scores [batch, gated layers, groups].
        cost: of the model.
        heads: whether groups are gated; else a layer has them all.
        temperature: of the gates.
    """
    alpha = torch.sigmoid(layer / temperature)
    groups = torch.sigmoid(group / temperature).sum(-1) if heads else torch.full_like(alpha, group.shape[-1])
    gated = (alpha * (cost.layer_units + groups * cost.group_units)).sum(-1)
    stem = cost.dense_units * (1 - layer.shape[1] / cost.shape.num_layers)
    return (gated + stem) / cost.dense_units


def _merge(later: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per-position masks: ``first`` before the switch, ``second`` from it on. ``later`` is [batch, length], bool."""
    layer = torch.where(later, second[0], first[0])
    groups = torch.where(later[..., None], second[1], first[1])
    return layer, groups
