"""The prior of the gates: what dropping a layer or a group alone does, measured the short way and the long way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from l2a_compress.allocation import Allocation
from l2a_compress.cost import CostModel
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.families import shape_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.importance import drop_losses, inputs_of, mean_loss, prior_scores
from l2a_compress.modeling.projection import Limits, project
from l2a_compress.modeling.search import given_up, greedy_path, path_scores
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


def test_the_loss_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM), AdapterConfig(rank=2)).eval()
    batch, kept = batch_of(0, 4, 12), [(0, 1)] * LAYERS
    states, largest, logits = [inputs_of(gated, batch)], list[int](), gated.logits
    monkeypatch.setattr(gated, "logits", lambda hidden: (largest.append(len(hidden)), logits(hidden))[1])
    with torch.no_grad():
        whole = mean_loss(gated, [batch], states, kept)
        assert len(largest) == 1  # what is small stays in one part, and the same to the last bit
        monkeypatch.setattr("l2a_compress.modeling.importance.PART_NUMBERS", 5 * gated.model.config.vocab_size)
        assert mean_loss(gated, [batch], states, kept) == pytest.approx(whole, rel=1e-5)
    assert max(largest[1:]) == 5


def test_groups_alone_are_measured_with_fewer_cuts() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM), AdapterConfig(rank=2)).eval()
    cuts, batches = list[int](), [batch_of(0, 2, 9)]
    layers, groups = drop_losses(gated, batches, lambda: cuts.append(1))
    none, alone = drop_losses(gated, batches, lambda: cuts.append(2), whole=False)
    assert torch.equal(alone, groups)
    assert layers.any()
    assert not none.any()
    assert (cuts.count(1), cuts.count(2)) == ((LAYERS - STEM) * (1 + GROUPS), (LAYERS - STEM) * GROUPS)


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


def searched(gated: GatedModel) -> list[Allocation]:
    batches = [batch_of(0, 2, 9), batch_of(1, 3, 7)]
    _, importance = drop_losses(gated, batches)
    path = greedy_path(gated, batches, importance)
    assert path[0] == Allocation.dense(LAYERS, GROUPS)
    assert path[-1] == Allocation.of_layers(range(STEM), LAYERS, GROUPS)
    return path


def test_each_layer_that_is_given_up_is_the_one_that_is_missed_least_then() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM, heads=False), AdapterConfig(rank=2)).eval()
    batches = [batch_of(0, 2, 9), batch_of(1, 3, 7)]
    for before, after in pairwise(searched(gated)):
        losses = {}
        for other in before.layers[STEM:]:
            kept = Allocation.of_layers(set(before.layers) - {other}, LAYERS, GROUPS)
            losses[kept] = loss_of(gated, batches, kept)
        assert losses[after] == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_below_the_least_cost_layers_go_by_what_was_found_last(seed: int) -> None:
    gated = GatedModel.wrap(new_model(seed=seed), GateConfig(stem_layers=STEM, heads=False), AdapterConfig(rank=2))
    batches = [batch_of(0, 2, 9)]
    _, importance = drop_losses(gated.eval(), batches)
    whole = greedy_path(gated, batches, importance)
    path = greedy_path(gated, batches, importance, least=gated.cost.fraction(whole[2]))
    assert path[:3] == whole[:3]

    def found_last(gone: int) -> float:
        kept = set(path[1].layers) - {gone}
        return loss_of(gated, batches, Allocation.of_layers(kept, LAYERS, GROUPS))

    assert given_up(path[2:]) == sorted(path[2].layers[STEM:], key=found_last)


@pytest.mark.parametrize("scale", [0.0, 1.0])  # of the second group in every layer
def test_the_search_weighs_a_layer_against_a_group_of_each(scale: float) -> None:
    model = new_model()
    for layer in model.model.layers[STEM:]:
        weight = layer.self_attn.o_proj.weight
        weight.data[:, weight.shape[1] // GROUPS :] *= scale
    gated = GatedModel.wrap(model, GateConfig(stem_layers=STEM), AdapterConfig(rank=0)).eval()
    batches = [batch_of(0, 2, 9), batch_of(1, 3, 7)]
    _, importance = drop_losses(gated, batches)
    path = searched(gated)
    narrow = [(int(row.argmax()),) for row in importance]
    steps = [Allocation.of_layers(set(range(LAYERS)) - {gone}, LAYERS, GROUPS) for gone in range(STEM, LAYERS)]
    steps.append(Allocation(num_groups=GROUPS, groups=(*path[0].groups[:STEM], *narrow)))
    saved = [gated.cost.dense_units - gated.cost.units(step) for step in steps]
    base = loss_of(gated, batches, path[0])
    prices = [(loss_of(gated, batches, step) - base) / units for step, units in zip(steps, saved, strict=True)]
    assert steps[prices.index(min(prices))] in path


def test_gates_with_the_scores_of_a_path_choose_its_allocations() -> None:
    gated = GatedModel.wrap(new_model(), GateConfig(stem_layers=STEM), AdapterConfig(rank=2)).eval()
    path = searched(gated)
    assert len(path) == 1 + (LAYERS - STEM) * GROUPS  # a layer and its least group go together
    scores = path_scores(path, STEM)
    gated.allocator.set_prior(scores.amax(1), scores)
    layers, groups = gated.allocator.scores(torch.zeros(1, gated.allocator.layer_gates.inner.shape[1]))
    for allocation in path:
        units = gated.cost.units(allocation) - gated.cost.units(path[-1])
        free = torch.tensor([10**9])
        limits = Limits(units=torch.tensor([units]), layers=free, heads=free, price=torch.tensor([-torch.inf]))
        costs = {"layer_units": gated.cost.layer_units, "group_units": gated.cost.group_units, "min_groups": 1}
        kept = gated.allocator.by_group(project(layers, groups, limits, **costs).groups)
        found = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in kept[0])
        assert found == allocation.groups[STEM:]


def test_scores_rank_by_increase_and_put_groups_in_proportion() -> None:
    layers = torch.tensor([0.4, 0.1, 0.2])
    cost = CostModel(shape=shape_of(new_model().config))
    ratio = (cost.layer_units + GROUPS * cost.group_units) / cost.group_units
    layer_scores, group_scores = prior_scores(layers, layers[:, None].expand(3, GROUPS) / ratio, cost)
    assert layer_scores.argsort().tolist() == [1, 2, 0]
    torch.testing.assert_close(group_scores, layer_scores[:, None].expand(3, GROUPS))
