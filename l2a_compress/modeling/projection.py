"""From gate scores to hard decisions that fit a budget.

A gated layer offers one *layer item* (its MLP and its best ``min_groups`` KV groups) and one *group item* for every
other KV group. A group cannot outrank its layer, so its effective score is ``min(group score, layer score)``.

- ``cap``: items are taken in order of score as long as they fit what is left of the request's budget, so the cost of
  every single request is at most its budget, and so are its layer and head caps.
- ``mean``: items are taken whose score exceeds the price p(b); a budget still caps what one request may take.

Both are one rule with two thresholds: the price, or the score at which the request's own budget ran out. That
threshold is also what the straight-through gradient is centred on (method: "hard projection, straight-through").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What each row may spend, in the integer units of :class:`l2a_compress.cost.CostModel`; each tensor is [batch].

    The always-on stem is already taken off. ``price`` is the score an item must exceed (-inf: no price).
    """

    units: Tensor
    layers: Tensor
    heads: Tensor
    price: Tensor


@dataclass(frozen=True)
class Decision:
    """What is kept, as bool: ``layers`` [batch, layers], ``groups`` [batch, layers, groups] of the gated layers.

    ``threshold`` [batch]: the score between what was kept and what was not.
    """

    layers: Tensor
    groups: Tensor
    threshold: Tensor


def best_groups(group_scores: Tensor, count: int) -> Tensor:
    """True for the ``count`` best-scored KV groups of each layer. [batch, layers, groups] -> same shape, bool."""
    best = torch.zeros_like(group_scores, dtype=torch.bool)
    return best.scatter_(-1, group_scores.topk(count, dim=-1).indices, True)


def effective_scores(layer_scores: Tensor, group_scores: Tensor) -> Tensor:
    """A group's score, never above its layer's. [batch, layers], [batch, layers, groups] -> [batch, layers, groups]."""
    return torch.minimum(group_scores, layer_scores[..., None])


@torch.no_grad()
def project(
    layer_scores: Tensor,
    group_scores: Tensor,
    limits: Limits,
    *,
    layer_units: int,
    group_units: int,
    min_groups: int,
) -> Decision:
    """The best-scored set of layers and KV groups that fits each row's limits (greedy by score).

    Args:
        layer_scores: [batch, layers] of the gated layers.
        group_scores: [batch, layers, groups].
        limits: per-row limits.
        layer_units: cost of a kept layer without its groups.
        group_units: cost of one kept KV group.
        min_groups: KV groups that a kept layer has at least.
    """
    batch, layers = layer_scores.shape
    groups = group_scores.shape[-1]
    first = best_groups(group_scores, min_groups)
    optional = effective_scores(layer_scores, group_scores).masked_fill(first, -torch.inf)
    # A layer's item stands before its groups', so a stable sort keeps it first among equals.
    scores = torch.cat([layer_scores, optional.flatten(1)], dim=1)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    costs = scores.new_full((layers * (1 + groups),), group_units, dtype=torch.long)
    costs[:layers] = layer_units + min_groups * group_units
    owner = torch.cat([torch.arange(layers), torch.arange(layers).repeat_interleave(groups)]).to(scores.device)

    taken = torch.zeros_like(scores, dtype=torch.bool)
    rows = torch.arange(batch, device=scores.device)
    units, layers_left, heads_left = limits.units.clone(), limits.layers.clone(), limits.heads.clone()
    below = torch.full_like(limits.price, -torch.inf)
    above = torch.full_like(limits.price, torch.inf)
    for item in order.unbind(1):
        is_layer = item < layers
        score, cost = scores[rows, item], costs[item]
        heads = torch.where(is_layer, min_groups, 1)
        offered = torch.isfinite(score) & (is_layer | taken[rows, owner[item]])
        fits = (cost <= units) & (heads <= heads_left) & (~is_layer | (layers_left > 0))
        take = offered & fits & (score > limits.price)
        taken[rows, item] |= take
        units -= cost * take
        heads_left -= heads * take
        layers_left -= (take & is_layer).long()
        above = torch.where(take, score, above)
        below = torch.where(offered & ~take, torch.maximum(below, score), below)
    kept = taken[:, :layers]
    decided = Decision(
        layers=kept,
        groups=(taken[:, layers:].view(batch, layers, groups) | first) & kept[..., None],
        threshold=_between(above, below, limits.price),
    )
    return decided


def _between(above: Tensor, below: Tensor, price: Tensor) -> Tensor:
    """The price where there is one, else halfway between the last score kept and the best one left out."""
    middle = (above + torch.minimum(below, above)) / 2
    middle = torch.where(torch.isfinite(above), middle, below)
    middle = torch.where(torch.isfinite(below), middle, above - 1)
    middle = torch.where(torch.isfinite(middle), middle, torch.zeros_like(middle))
    return torch.where(torch.isfinite(price), price, middle)


def straight_through(hard: Tensor, scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """``hard`` in value, ``sigmoid((scores - threshold) / temperature)`` in gradient; all of one shape."""
    soft = torch.sigmoid((scores - threshold) / temperature)
    return hard.to(soft.dtype) + soft - soft.detach()
