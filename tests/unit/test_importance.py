"""The prior of the gates: what dropping a layer or a group alone does, measured the short way and the long way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from l2a_compress.allocation import Allocation
from l2a_compress.cost import CostModel
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.families import shape_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.importance import drop_losses, prior_scores
from l2a_compress.modeling.search import layer_order
from toy_models import FAMILIES, GROUPS, LAYERS, new_model

STEM = 2


def batch_of(seed: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(gated: GatedModel, batches: list[dict[str, torch.Tensor]], allocation: Allocation) -> float:
    """From the tokens on, by masks."""
    losses, count = 0.0, 0
    for batch in batches:
        with torch.no_grad(), gated.forced([allocation], skip=False):
            logits = gated.logits(gated(batch["input_ids"], batch["attention_mask"]).hidden)
        losses += float(functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="sum"))
        count += int((batch["labels"][:, 1:] != -100).sum())
    return losses / count


@pytest.mark.parametrize("family", FAMILIES)
def test_each_increase_is_that_of_the_whole_model(family: str) -> None:
    gated = GatedModel.wrap(new_model(family), GateConfig(stem_layers=STEM), AdapterConfig(rank=2)).eval()
    for value in gated.adapter_parameters.values():
        value.data.normal_(std=0.1)
    batches = [batch_of(0, 2, 9), batch_of(1, 3, 7)]
    layers, groups = drop_losses(gated, batches)
    dense = Allocation.dense(LAYERS, GROUPS)
    base = loss_of(gated, batches, dense)
    assert layers.shape == (LAYERS - STEM,)
    for index in range(STEM, LAYERS):
        for kept, found in [
            ((), layers[index - STEM]),
            ((1,), groups[index - STEM, 0]),
            ((0,), groups[index - STEM, 1]),
        ]:
            cut = Allocation(num_groups=GROUPS, groups=(*dense.groups[:index], kept, *dense.groups[index + 1 :]))
            assert float(found) == pytest.approx(loss_of(gated, batches, cut) - base, abs=1e-5)
    assert layers.abs().min() > 1e-4  # every layer of the toy matters
    assert gated.state.hook is None
    assert all(plan.layer is None and not plan.skip for plan in gated.state.plans)


def test_without_head_gates_only_layers_are_measured() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM, heads=False), AdapterConfig(rank=0)).eval()
    cuts: list[None] = []
    layers, groups = drop_losses(gated, [batch_of(0, 2, 8)], progress=lambda: cuts.append(None))
    assert len(cuts) == LAYERS - STEM
    assert layers.abs().max() > 0
    assert groups.abs().max() == 0


def test_each_layer_that_is_given_up_is_the_one_that_is_missed_least_then() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM), AdapterConfig(rank=2)).eval()
    batches = [batch_of(0, 2, 9), batch_of(1, 3, 7)]
    order = layer_order(gated, batches)
    assert sorted(order) == list(range(STEM, LAYERS))
    every, gone = tuple(range(GROUPS)), set[int]()
    for layer in order:
        losses = {}
        for other in set(range(STEM, LAYERS)) - gone:
            kept = tuple(() if index in gone | {other} else every for index in range(LAYERS))
            losses[other] = loss_of(gated, batches, Allocation(num_groups=GROUPS, groups=kept))
        assert losses[layer] == pytest.approx(min(losses.values()), abs=1e-6)
        gone.add(layer)


def test_layers_that_are_given_up_first_get_the_lowest_scores() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM), AdapterConfig(rank=0))
    count = LAYERS - STEM
    bias = gated.allocator.layer_gates.outer_bias
    with torch.no_grad():
        bias.copy_(torch.randn(count, 1, generator=torch.Generator().manual_seed(0)))
    before, order = bias.detach().clone(), torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    gated.allocator.reorder(order)
    assert bias[order, 0].tolist() == before[:, 0].sort().values.tolist()
    with torch.no_grad():
        bias.zero_()
    gated.allocator.reorder(order)
    assert bias[order, 0].diff().min() > 5e-4  # equals come apart


def test_scores_rank_by_increase_and_put_groups_in_proportion() -> None:
    layers = torch.tensor([0.4, 0.1, 0.2])
    cost = CostModel(shape=shape_of(new_model().config))
    ratio = (cost.layer_units + GROUPS * cost.group_units) / cost.group_units
    layer_scores, group_scores = prior_scores(layers, layers[:, None].expand(3, GROUPS) / ratio, cost)
    assert layer_scores.argsort().tolist() == [1, 2, 0]
    torch.testing.assert_close(group_scores, layer_scores[:, None].expand(3, GROUPS))
