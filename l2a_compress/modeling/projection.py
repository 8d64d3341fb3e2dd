"""From gate scores to hard decisions that fit a budget.

A layer's KV groups have a fixed order of importance, and what is kept of them is a prefix of it: a narrower layer is
then a byte prefix of a wider one, and how wide is all that the gates decide. Here groups go by their *rank* in that
order. A gated layer offers one *layer item* (its MLP and its first ``min_groups`` groups) and one *group item* for
every other group. A group outranks neither its layer nor a group before it.

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
    """What is kept, as bool: ``layers`` [batch, layers], ``groups`` [batch, layers, groups] by rank.

    ``threshold`` [batch]: the score between what was kept and what was not.
    """

    layers: Tensor
    groups: Tensor
    threshold: Tensor


def effective_scores(layer_scores: Tensor, group_scores: Tensor) -> Tensor:
    """A group's score, never above its layer's nor one of a lower rank.

    [batch, layers], [batch, layers, groups] -> [batch, layers, groups].
    """
    return torch.minimum(group_scores.cummin(-1).values, layer_scores[..., None])


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

    Nothing that was refused can fit later, since all layers cost the same and all groups do. So items are taken up to
    the first that does not fit; if that was a layer, groups of the layers so far may still fit behind it.

    Args:
        layer_scores: [batch, layers] of the gated layers.
        group_scores: [batch, layers, groups], by rank.
        limits: per-row limits.
        layer_units: cost of a kept layer without its groups.
        group_units: cost of one kept KV group.
        min_groups: KV groups that a kept layer has at least.
    """
    batch, layers = layer_scores.shape
    groups = group_scores.shape[-1]
    optional = effective_scores(layer_scores, group_scores)[..., min_groups:]
    scores = torch.cat([layer_scores, optional.flatten(1)], dim=1)
    # A layer's item stands before its groups', and these by rank, so a stable sort keeps them so among equals.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    is_layer = order < layers
    owner = torch.where(is_layer, order, (order - layers).div(max(groups - min_groups, 1), rounding_mode="floor"))
    heads = torch.where(is_layer, min_groups, 1)
    costs = is_layer * layer_units + heads * group_units
    units_left, heads_left = limits.units[:, None], limits.heads[:, None]
    wanted = scores > limits.price[:, None]

    fits = wanted & (costs.cumsum(1) <= units_left) & (heads.cumsum(1) <= heads_left)
    fits &= ~is_layer | (is_layer.cumsum(1) <= limits.layers[:, None])
    taken = fits.long().cumprod(1).bool()
    kept = torch.zeros_like(layer_scores, dtype=torch.long).scatter_add_(1, owner, (taken & is_layer).long()).bool()
    offered = is_layer | kept.gather(1, owner)
    asked = taken | (offered & wanted & ~is_layer)
    taken = asked & ((costs * asked).cumsum(1) <= units_left) & ((heads * asked).cumsum(1) <= heads_left)

    chosen = (
        torch.zeros_like(order)
        .scatter_(1, order, taken.long())
        .bool()[:, layers:]
        .reshape(batch, layers, groups - min_groups)
    )
    first = kept[..., None].expand(batch, layers, min_groups)
    return Decision(
        layers=kept,
        groups=torch.cat([first, chosen], dim=-1),
        threshold=_between(
            scores.masked_fill(~taken, torch.inf).amin(1),
            scores.masked_fill(taken | ~offered, -torch.inf).amax(1),
            limits.price,
        ),
    )


def _between(above: Tensor, below: Tensor, price: Tensor) -> Tensor:
    """The price where there is one, else halfway between the last score kept and the best one left out."""
    middle = (above + torch.minimum(below, above)) / 2
    middle = torch.where(torch.isfinite(above), middle, below)
    middle = torch.where(torch.isfinite(below), middle, above - 1)
    middle = torch.where(torch.isfinite(middle), middle, torch.zeros_like(middle))
    return torch.where(torch.isfinite(price), price, middle)


def moving_threshold(
    layer_scores: Tensor, optional_groups: Tensor, decision: Decision, *, costs: tuple[int, int], temperature: float
) -> Tensor:
    """The threshold of each row with the gradient that a filled budget gives it. [batch].

    While ``sum_i c_i sigmoid((s_i - t) / T)`` stays the same, ``dt / ds_i = c_i g_i / sum_j c_j g_j`` with g the
    sigmoid's slope. So a score only gains on what its cost crowds out. With a threshold that stands still all scores
    rise together, since every layer that runs lowers the loss, until their bound alone holds them.

    Args:
        layer_scores: [batch, layers].
        optional_groups: effective scores of the groups behind the least, [batch, layers, groups].
        decision: what was kept, with its threshold.
        costs: units of a layer item and of a group item.
        temperature: of the gates.
    """
    items = torch.cat([layer_scores, optional_groups.flatten(1)], dim=1)
    units = torch.full_like(items, float(costs[1]))
    units[:, : layer_scores.shape[1]] = float(costs[0])
    soft = torch.sigmoid((items - decision.threshold[:, None]) / temperature).detach()
    weights = units * soft * (1 - soft) + 1e-12
    center = (weights * items).sum(1) / weights.sum(1)
    return decision.threshold + (center - center.detach())


def straight_through(hard: Tensor, scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """``hard`` in value, ``sigmoid((scores - threshold) / temperature)`` in gradient; all of one shape."""
    soft = torch.sigmoid((scores - threshold) / temperature)
    return hard.to(soft.dtype) + soft - soft.detach()
