"""Trials: sets of layers compared behind a short adaptation, from the same weights, which come back as they were."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.search import Trials, spared_layers
from test_training_step import new_batch
from toy_models import GROUPS, LAYERS, new_gated

LR = 1e-2


def new_trials(gated: GatedModel, steps: int) -> Trials:
    recipe = Recipe.from_json({"optim": {"lr": LR}})
    return Trials(gated, recipe, [new_batch(8) for _ in range(steps)], [new_batch(8)])


def weights(gated: GatedModel) -> dict[str, Tensor]:
    parts = {**gated.adapter_parameters, **gated.gate_parameters}
    return {name: value.detach().clone() for name, value in parts.items()}


def test_a_trial_trains_and_puts_the_weights_back() -> None:
    gated = new_gated()
    before = weights(gated)
    losses = [new_trials(gated, steps).loss([2, 3]) for steps in (0, 1, 12)]
    assert losses[0] > losses[1] > losses[2]  # on the samples that it trains on
    after = weights(gated)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.grad is None for value in gated.adapter_parameters.values())
    assert all(plan.layer is None and not plan.skip for plan in gated.state.plans)


def test_equal_trials_give_equal_losses_and_other_layers_another() -> None:
    trials = new_trials(new_gated(), 2)
    first = trials.loss([2])
    assert trials.loss([3]) != first
    assert trials.loss([2]) == first
    assert trials.loss([2]) == new_trials(trials.gated, 2).loss([2])


def test_a_trial_is_the_same_with_gradient_checkpointing() -> None:
    groups = tuple((0,) if layer in (2, 4) else () if layer == 3 else tuple(range(GROUPS)) for layer in range(LAYERS))
    narrow = Allocation(num_groups=GROUPS, groups=groups)
    plain, checkpointed = new_gated(), new_gated()
    checkpointed.activation_checkpointing_enable()
    calls: list[int] = []
    attention = checkpointed.model.model.layers[2].layer.self_attn
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    found = new_trials(checkpointed, 3).trial(narrow)
    assert len(calls) == 4 + 3 * 2 + 1  # teachers of the batches, twice in each step, and the measurement
    assert found == pytest.approx(new_trials(plain, 3).trial(narrow), abs=1e-5)


def test_whole_layers_that_the_smallest_budget_is_worth_stay_whole() -> None:
    gated = new_gated()
    assert int((1 - 5 / 6) * LAYERS) == 0  # what numbers with a point make of it
    assert [spared_layers(gated, least) for least in (0.5, 5 / 6, 1.0)] == [3, 1, 0]
    assert spared_layers(gated, 0.75) == pytest.approx(1.5)


class Known(Trials):
    """Trials whose losses are known: what each layer costs, and what two of them cost together beyond that."""

    def __init__(self, costs: dict[int, float], pairs: dict[tuple[int, int], float]) -> None:
        self.costs, self.pairs, self.losses = costs, pairs, {}  # nothing else is asked of it
        self.asked: list[list[int]] = []

    def loss(self, gone: list[int]) -> float:  # type: ignore[override]
        together = sum(self.pairs.get(pair, 0.0) for pair in itertools.combinations(sorted(gone), 2))
        self.asked.append(gone)
        return sum(self.costs[layer] for layer in gone) + together


class Processes:
    """Threads that stand for processes: each has a number, and gathers what all have."""

    def __init__(self, count: int) -> None:
        self.local, self.barrier, self.lists = threading.local(), threading.Barrier(count), [[] for _ in range(count)]

    def state(self) -> SimpleNamespace:
        return SimpleNamespace(num_processes=len(self.lists), process_index=self.local.number)

    def gather(self, objects: list[Any]) -> list[Any]:
        self.lists[self.local.number] = objects
        self.barrier.wait(60)
        found = [one for part in self.lists for one in part]
        self.barrier.wait(60)
        return found


class Counted(Trials):
    """Trials of known losses, each counted."""

    def __init__(self, guess: list[int]) -> None:
        self.guess, self.losses, self.mine = guess, {}, list[tuple[int, ...]]()
        self.noted = list[int]()
        self.tried, self.bar = lambda: self.noted.append(len(self.losses)), SimpleNamespace(update=lambda: None)  # type: ignore[assignment]

    def _without(self, gone: Sequence[int]) -> float:
        self.mine.append(tuple(gone))
        return sum(COSTS[layer] for layer in gone) - 3.0 * ({3, 5} <= set(gone))


def test_processes_share_the_trials_and_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = [5, 2, 3, 4, 7, 6]
    alone = Counted(guess)
    order = alone.order(guess, pivot=3, deepest=5, most=9)
    processes = Processes(2)
    monkeypatch.setattr("l2a_compress.training.search.PartialState", processes.state)
    monkeypatch.setattr("l2a_compress.training.search.gather_object", processes.gather)

    def run(number: int) -> Counted:
        processes.local.number = number
        trials = Counted(guess)
        assert trials.order(guess, pivot=3, deepest=5, most=9) == order
        return trials

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first.losses == second.losses == alone.losses
    assert {*first.mine} | {*second.mine} == {*alone.mine}
    assert not {*first.mine} & {*second.mine}
    assert {now - before for before, now in zip([0, *first.noted], first.noted, strict=False)} == {1, 2}


COSTS = {2: 5.0, 3: 4.0, 4: 3.0, 5: 6.0, 6: 1.0, 7: 2.0}


def test_the_order_of_layers_that_do_not_meet_is_that_of_their_costs() -> None:
    guess = [5, 2, 3, 4, 7, 6]  # the wrong way round
    trials = Known(COSTS, {})
    assert trials.order(guess, pivot=3, deepest=5, most=100) == [6, 7, 4, 3, 2]
    assert len(trials.asked[0]) == 3


def test_a_layer_that_goes_well_only_with_another_is_found() -> None:
    costs, pairs = {**COSTS, 5: 3.5}, {(5, 6): -3.0}
    guess = sorted(costs, key=costs.__getitem__)
    assert set(guess[:3]) == {6, 7, 4}
    order = Known(costs, pairs).order(guess, pivot=3, deepest=4, most=100)
    assert set(order[:3]) == {5, 6, 7}
    assert order == [6, 5, 7, 4]  # the pair goes first: together it costs less than 6 and 7 do


@pytest.mark.parametrize("most", [1, 3])
def test_the_set_is_searched_in_no_more_trials_than_allowed(most: int) -> None:
    trials = Known(COSTS, {})
    order = trials.order([5, 2, 3, 4, 7, 6], pivot=2, deepest=2, most=most)
    assert len(trials.asked) == most + 2  # and two to order the pair
    assert set(order) == ({5, 2} if most == 1 else {5, 4})
