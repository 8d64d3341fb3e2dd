"""Static allocations by search: what calibration data can best do without, from the whole model down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import after, inputs_of, mean_loss

Batch = Mapping[str, Any]
Item = tuple[int, tuple[int, ...]]  # a layer and the groups that are left of it


@torch.no_grad()
def greedy_path(
    gated: GatedModel,
    batches: Sequence[Batch],
    importance: Tensor,
    first: Sequence[int] = (),
    *,
    least: float = 0.0,
) -> list[Allocation]:
    """Allocations from dense down to the stem, each the one before with one group, or one narrowest layer, less.

    What comes before the first layer that a step changes is the same for all steps, so it is run once.

    Two kinds of steps of like cost are compared by what they raise the loss for what they save, measured anew on
    ``batches`` each time: giving up a layer, and narrowing the layers that are left by a group each, up to the cost of
    a layer. One group alone is never missed much, so one at a time they would all go first. Within a layer groups go by
    what they were worth when each was dropped alone.

    Args:
        gated: the model; adapters count unless the caller turned them off. A model that has met many allocations says
            more than one that never missed a layer.
        batches: as of :func:`l2a_compress.modeling.importance.drop_losses`.
        importance: of groups, [gated layers, groups], by that function.
        first: layers that go before anything else does, in that order, groups and all.
        least: share of the dense cost down to which steps are measured anew. Those below it go by what was found last.
    """
    states = [inputs_of(gated, batch) for batch in batches]
    path = [Allocation.dense(gated.shape.num_layers, gated.shape.num_groups)]
    loss = mean_loss(gated, batches, states, path[0].groups)
    prices: dict[int | None, float] = {}  # by the layer that a step gives up, None where it narrows
    while steps := _steps(gated, path[-1], importance, first):
        now = path[-1]
        kinds = [next(iter(given_up([now, step[-1]])), None) for step in steps]
        losses = dict.fromkeys(kinds, loss)
        if gated.cost.fraction(now) > least or not prices.keys() >= {*kinds}:
            found = _losses(gated, batches, states, now, [step[-1] for step in steps])
            losses = dict(zip(kinds, found, strict=True))
            for kind, step in zip(kinds, steps, strict=True):
                prices[kind] = (losses[kind] - loss) / (gated.cost.units(now) - gated.cost.units(step[-1]))
        best = min(kinds, key=prices.__getitem__)
        loss = losses[best]
        path += steps[kinds.index(best)]
    return path


def _losses(
    gated: GatedModel,
    batches: Sequence[Batch],
    states: Sequence[Tensor],
    now: Allocation,
    candidates: Sequence[Allocation],
) -> list[float]:
    """The loss of each candidate, from the inputs of the first layer."""
    changed = [
        next(layer for layer, pair in enumerate(zip(now.groups, one.groups, strict=True)) if pair[0] != pair[1])
        for one in candidates
    ]
    losses, done = [0.0] * len(candidates), 0
    for place in sorted(range(len(candidates)), key=changed.__getitem__):
        while done < changed[place]:
            if now.groups[done]:
                states = after(gated, batches, states, done, now.groups[done])
            done += 1
        losses[place] = mean_loss(gated, batches, states, [*[()] * done, *candidates[place].groups[done:]])
    return losses


def given_up(path: Sequence[Allocation]) -> list[int]:
    """The layers in the order in which a path gives them up."""
    return [layer for before, after in pairwise(path) for layer in sorted({*before.layers} - {*after.layers})]


def path_scores(path: Sequence[Allocation], stem: int) -> Tensor:
    """Scores by which the gates give up groups as a path does: the longer kept, the higher.

    A layer's score is that of its best group.

    Args:
        path: of nested allocations, from dense down.
        stem: layers that always run, and have no score.

    Returns:
        [gated layers, groups], from -3 to 3.
    """
    groups = torch.zeros(len(path[0].groups) - stem, path[0].num_groups)
    for allocation in path:
        for row, kept in zip(groups, allocation.groups[stem:], strict=True):
            row[list(kept)] += 6.0 / len(path)
    return groups - 3.0


def _steps(gated: GatedModel, now: Allocation, importance: Tensor, first: Sequence[int]) -> list[list[Allocation]]:
    """What may be given up next, each as the allocations on the way there."""
    stem, least = gated.gate_config.stem_layers, gated.gate_config.min_groups
    worth = importance.tolist()
    kept = [layer for layer in range(stem, len(now.groups)) if now.groups[layer]]
    kept = [layer for layer in first if layer in kept][:1] or kept
    found = []
    narrower: list[tuple[float, Item]] = []
    for layer in kept:
        groups, items = now.groups[layer], []
        while gated.gate_config.heads and len(groups) > least:
            worst = min(groups, key=lambda group: worth[layer - stem][group])  # used at once
            groups = tuple(group for group in groups if group != worst)
            items.append((layer, groups))
            if len(items) == 1:
                narrower.append((worth[layer - stem][worst], items[0]))
        found.append(_on_the_way(now, [*items, (layer, ())]))
    most = (gated.cost.layer_units + gated.shape.num_groups * gated.cost.group_units) // gated.cost.group_units
    if narrower and kept[0] not in first:
        found.append(_on_the_way(now, [item for _, item in sorted(narrower)[:most]]))
    return found


def _on_the_way(now: Allocation, items: Sequence[Item]) -> list[Allocation]:
    found = []
    for layer, groups in items:
        now = Allocation(num_groups=now.num_groups, groups=(*now.groups[:layer], groups, *now.groups[layer + 1 :]))
        found.append(now)
    return found
