"""How much each layer and KV group matters: the prior of the gates, and the order of the static baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from l2a_compress.allocation import Allocation
from l2a_compress.cost import CostModel
from l2a_compress.modeling.families import decoder_layers
from l2a_compress.modeling.gated import GatedModel

Batch = Mapping[str, Tensor]
PART_NUMBERS = 2**26  # vocabulary logits that are in memory together: 256 MB in 32 bits


@torch.no_grad()
def drop_losses(
    gated: GatedModel, batches: Sequence[Batch], progress: Callable[[], None] | None = None, *, whole: bool = True
) -> tuple[Tensor, Tensor]:
    """Increase of the cross entropy per labelled token when one layer, or one KV group of one layer, is dropped alone.

    What comes before that layer is the same for all its cuts, so it is run once.

    Args:
        gated: The model; adapters count unless the caller turned them off.
        batches: Of input_ids, attention_mask and labels (-100: not counted), all [batch, length]; with inputs_embeds
            [batch, length, width] these are the network's input.
        progress: Called after each cut.
        whole: Whether layers are dropped whole, too; else what that costs is given as 0.

    Returns:
        (layers [gated layers], groups [gated layers, groups]); the always-on stem is left out.
    """
    shape, stem = gated.shape, gated.gate_config.stem_layers
    every = tuple(range(shape.num_groups))
    states = [inputs_of(gated, batch) for batch in batches]
    base = mean_loss(gated, batches, states, [every] * shape.num_layers)
    layers = torch.zeros(shape.num_layers - stem)
    groups = torch.zeros(shape.num_layers - stem, shape.num_groups)
    cuts: list[tuple[int, ...]] = [()]
    if gated.gate_config.heads and shape.num_groups > gated.gate_config.min_groups:
        cuts += [tuple(other for other in every if other != group) for group in every]
    for index in range(shape.num_layers):
        for number, kept in enumerate(cuts if index >= stem else ()):
            if number == 0 and not whole:
                continue
            rest = [every] * (shape.num_layers - index - 1)
            increase = mean_loss(gated, batches, states, [*[()] * index, kept, *rest]) - base
            if number == 0:
                layers[index - stem] = increase
            else:
                groups[index - stem, number - 1] = increase
            if progress is not None:
                progress()
        if index + 1 < shape.num_layers:
            states = after(gated, batches, states, index, every)
    return layers, groups


def inputs_of(gated: GatedModel, batch: Batch) -> Tensor:
    """The input of the first layer, [batch, length, width]."""
    found: Tensor = (
        batch["inputs_embeds"] if "inputs_embeds" in batch else gated.model.get_input_embeddings()(batch["input_ids"])
    )
    return found


def mean_loss(
    gated: GatedModel, batches: Sequence[Batch], states: Sequence[Tensor], kept: Sequence[tuple[int, ...]]
) -> float:
    """Cross entropy per labelled token with these groups of each layer, from the input of the first layer that runs."""
    total, count = 0.0, 0
    for batch, state in zip(batches, states, strict=True):
        hidden = _hidden(gated, batch, state, kept)
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        size = max(1, PART_NUMBERS // int(gated.model.config.vocab_size))
        for part, targets in zip(hidden[:, :-1][mask].split(size), labels[mask].split(size), strict=True):
            total += float(functional.cross_entropy(gated.logits(part).float(), targets, reduction="sum"))
        count += int(mask.sum())
    return total / max(count, 1)


def _hidden(gated: GatedModel, batch: Batch, state: Tensor, kept: Sequence[tuple[int, ...]]) -> Tensor:
    """[batch, length, width] behind the last layer; layers that keep no group hand their input on."""
    with gated.forced([Allocation(num_groups=gated.shape.num_groups, groups=tuple(kept))]):
        output = gated.model.base_model(
            inputs_embeds=state, attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
    return output  # type: ignore[no-any-return]


def after(
    gated: GatedModel, batches: Sequence[Batch], states: Sequence[Tensor], index: int, kept: tuple[int, ...]
) -> list[Tensor]:
    """The outputs of layer ``index`` with these groups, not the last layer, for its inputs ``states``."""
    shape, found = gated.shape, list[Tensor]()

    def catch(layer: int, hidden: Tensor) -> None:
        if layer == index + 1:
            found.append(hidden)

    alone = [kept if layer == index else () for layer in range(shape.num_layers)]
    with gated.forced([Allocation(num_groups=shape.num_groups, groups=tuple(alone))]):
        gated.state.hook = catch
        try:
            for batch, state in zip(batches, states, strict=True):
                gated.model.base_model(inputs_embeds=state, attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            gated.state.hook = None
    return found


def prior_scores(layers: Tensor, groups: Tensor, cost: CostModel) -> tuple[Tensor, Tensor]:
    """Gate scores to start from: the logarithm of the loss increase per unit of cost, standardized.

    Args:
        layers: loss increases [gated layers].
        groups: loss increases [gated layers, groups].
        cost: of the model; a group costs far less than a layer.
    """
    ratio = (cost.layer_units + cost.shape.num_groups * cost.group_units) / cost.group_units
    logs = torch.cat([layers[:, None], groups * ratio], dim=1).clamp(min=1e-4).log()
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
