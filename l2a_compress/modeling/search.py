"""Static allocations by search: the best fixed configuration that calibration data finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import drop_losses, mean_loss

Batch = Mapping[str, Any]
Groups = tuple[tuple[int, ...], ...]


@torch.no_grad()
def greedy_path(gated: GatedModel, batches: Sequence[Batch], least: float) -> list[Allocation]:
    """Allocations from dense down to a cost of at least ``least``, each the one before with a layer or group less.

    What goes is what raises the loss least for what it saves, measured anew on ``batches`` at every step: any layer
    behind the stem, or of any such layer the group that mattered least when it was dropped alone.

    Args:
        gated: the model; adapters count unless the caller turned them off.
        batches: of input_ids, attention_mask and labels (-100: not counted), all [batch, length].
        least: share of the dense cost.
    """
    _, importance = drop_losses(gated, batches)
    states = [gated.model.get_input_embeddings()(batch["input_ids"]) for batch in batches]
    shape, cost = gated.shape, gated.cost
    path = [Allocation.dense(shape.num_layers, shape.num_groups)]
    loss = mean_loss(gated, batches, states, path[0].groups)
    while True:
        best: tuple[float, float, Allocation] | None = None
        for kept in _smaller(path[-1].groups, gated, importance):
            allocation = Allocation(num_groups=shape.num_groups, groups=kept)
            if cost.fraction(allocation) < least - 1e-9:
                continue
            found = mean_loss(gated, batches, states, kept)
            price = (found - loss) / (cost.units(path[-1]) - cost.units(allocation))
            if best is None or price < best[0]:
                best = price, found, allocation
        if best is None:
            return path
        loss = best[1]
        path.append(best[2])


@torch.no_grad()
def layer_order(gated: GatedModel, batches: Sequence[Batch]) -> list[int]:
    """The layers behind the stem in the order in which they are given up, each the one that is missed least then.

    The loss is measured anew on ``batches`` after every layer, with all groups of the others: n (n + 1) / 2 times for n
    layers. To be called on a model that has met many allocations: what a layer is worth to a network that never
    missed one says little of what it is worth to one that can make up for it.

    Args:
        gated: the model; adapters count unless the caller turned them off.
        batches: of input_ids, attention_mask and labels (-100: not counted), all [batch, length].
    """
    states = [gated.model.get_input_embeddings()(batch["input_ids"]) for batch in batches]
    every = tuple(range(gated.shape.num_groups))
    left = list(range(gated.gate_config.stem_layers, gated.shape.num_layers))
    order: list[int] = []

    def loss(layer: int) -> float:
        kept = [() if index in (*order, layer) else every for index in range(gated.shape.num_layers)]
        return mean_loss(gated, batches, states, kept)

    while left:
        order.append(min(left, key=loss))
        left.remove(order[-1])
    return order


def _smaller(groups: Groups, gated: GatedModel, importance: Tensor) -> list[Groups]:
    stem, least = gated.gate_config.stem_layers, gated.gate_config.min_groups
    found = []
    for layer in range(stem, len(groups)):
        kept = groups[layer]
        if kept:
            found.append((*groups[:layer], (), *groups[layer + 1 :]))
        if gated.gate_config.heads and len(kept) > least:
            worst = min(kept, key=lambda group: float(importance[layer - stem, group]))
            rest = tuple(group for group in kept if group != worst)
            found.append((*groups[:layer], rest, *groups[layer + 1 :]))
    return found
