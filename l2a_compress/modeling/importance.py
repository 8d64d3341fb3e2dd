"""How much each layer and KV group matters: the prior of the gates, and the order of the static baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from l2a_compress.allocation import Allocation
from l2a_compress.modeling.families import decoder_layers
from l2a_compress.modeling.gated import GatedModel

Batch = Mapping[str, Tensor]


@torch.no_grad()
def mean_loss(gated: GatedModel, batches: Sequence[Batch], allocation: Allocation | None = None) -> float:
    """Cross entropy per labelled token, with adapters on, under one allocation (None: dense).

    Each batch holds input_ids, attention_mask and labels (-100: not counted), all [batch, length].
    """
    total, count = 0.0, 0
    with gated.forced([allocation] if allocation is not None else None):
        for batch in batches:
            hidden = gated(batch["input_ids"], batch["attention_mask"]).hidden
            labels = batch["labels"][:, 1:]
            mask = labels != -100
            logits = gated.logits(hidden[:, :-1][mask]).float()
            total += float(functional.cross_entropy(logits, labels[mask], reduction="sum"))
            count += int(mask.sum())
    return total / max(count, 1)


def drop_losses(
    gated: GatedModel, batches: Sequence[Batch], progress: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Loss increase when one layer, or one KV group of one layer, is dropped alone.

    Returns:
        (layers [gated layers], groups [gated layers, groups]); the always-on stem is left out.
    """
    shape, stem = gated.shape, gated.gate_config.stem_layers
    base = mean_loss(gated, batches)
    everything = Allocation.dense(shape.num_layers, shape.num_groups).groups
    layers = torch.zeros(shape.num_layers - stem)
    groups = torch.zeros(shape.num_layers - stem, shape.num_groups)
    for index in range(stem, shape.num_layers):
        cuts: list[tuple[int, ...]] = [()]
        if gated.gate_config.heads and shape.num_groups > gated.gate_config.min_groups:
            cuts += [tuple(g for g in range(shape.num_groups) if g != group) for group in range(shape.num_groups)]
        for number, kept in enumerate(cuts):
            allocation = Allocation(
                num_groups=shape.num_groups, groups=(*everything[:index], kept, *everything[index + 1 :])
            )
            increase = mean_loss(gated, batches, allocation) - base
            if number == 0:
                layers[index - stem] = increase
            else:
                groups[index - stem, number - 1] = increase
            if progress is not None:
                progress()
    return layers, groups


def prior_scores(layers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Gate scores to start from: the logarithm of the loss increases, standardized over both kinds together.

    A group costs far less than a layer, so its increase is first put in proportion (``groups`` per layer).
    """
    share = groups.shape[1]
    logs = torch.cat([layers[:, None], groups * share], dim=1).clamp(min=1e-4).log()
    scores = (logs - logs.mean()) / logs.std().clamp(min=1e-6)
    return scores[:, 0], scores[:, 1:]


@torch.no_grad()
def block_influence(gated: GatedModel, batches: Sequence[Batch]) -> Tensor:
    """Block influence of ShortGPT (arXiv 2403.03853): 1 - cosine of a layer's input and output, [layers].

    It is measured on the frozen dense model.
    """
    sums, count = torch.zeros(gated.shape.num_layers), 0
    mask = torch.zeros(0, dtype=torch.bool)

    def observe(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        sums[layer.index] += float((1 - functional.cosine_similarity(args[0], output, dim=-1))[mask].sum())

    handles = [layer.register_forward_hook(observe) for layer in decoder_layers(gated.model)]
    try:
        with gated.teacher():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                gated(batch["input_ids"], batch["attention_mask"])
                count += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    return sums / max(count, 1)
