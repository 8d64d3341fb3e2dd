"""What goes first, by search and by trial, on a model that has met many allocations.

greedy path -> its first layers as a set -> sets with one layer exchanged, tried -> the best set -> the order from there

What a network loses without a layer before it had time to adapt says little of what it loses after. So a trial is a
short training without some layers, and sets of layers are compared by their losses behind it, from the same weights and
on the same samples; the weights are put back.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import TrainingError
from l2a_compress.files import write_atomic
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import drop_losses, inputs_of
from l2a_compress.modeling.search import given_up, greedy_path, path_scores
from l2a_compress.training.objective import Supervised
from l2a_compress.training.readout import Readout, Teacher, readout
from l2a_compress.training.recipe import BETAS, Recipe
from l2a_compress.training.samples import SampleCollator, Samples, by_length, in_batches, whole_samples
from l2a_compress.training.step import Batch

log = logging.getLogger(__name__)


def search(
    gated: GatedModel, samples: Samples, collate: SampleCollator, recipe: Recipe, *, file: Path, main: bool, quiet: bool
) -> None:
    """Gives the gates the order in which the model can best do without layers and groups, the same in all processes.

    Args:
        gated: the explored model.
        samples: of the run; whole ones from its start are used.
        collate: makes batches of them.
        recipe: of the run.
        file: where all is noted: of all sets that were tried ``trials``: [layers that were gone, loss], and at the end
            the ``order`` of the layers and the ``scores`` of groups that the gates got. What it says is not searched
            again, so that a run that was cut off goes on there.
        main: whether this process writes the file.
        quiet: no progress bar.

    Raises:
        TrainingError: the file cannot be read.
    """
    noted = _noted(file, gated.allocator.head_gates.outer_bias.shape)
    ((losses, scores),) = broadcast_object_list([noted])  # every process goes on from where the main one was

    def note(**more: Any) -> None:
        if main:
            write_atomic(file, json.dumps({**more, "trials": list(losses.items())}) + "\n")

    if scores is None:
        gated.eval()
        held_out, steps = search_batches(gated, samples, collate, recipe)
        trials = None
        if recipe.annealing.search_trials:
            trials = Trials(gated, recipe, steps, held_out, losses=losses, tried=note, quiet=quiet)
        path = _path(gated, recipe, held_out, trials)
        scores = path_scores(path, gated.gate_config.stem_layers)
        note(order=given_up(path), scores=scores.tolist())
        log.info("layers are given up in the order %s", given_up(path))
        gated.train()
    scores = broadcast(scores.to(gated.model.device))
    gated.allocator.set_prior(scores.amax(1), scores)


def _path(gated: GatedModel, recipe: Recipe, batches: Sequence[Batch], trials: Trials | None) -> list[Allocation]:
    """Allocations from dense down; where there are trials, layers go first, in the order that these find."""
    least = recipe.draws.minimum
    _, importance = drop_losses(gated, batches, whole=False)
    path = greedy_path(gated, batches, importance, least=least)
    if trials is None:
        return path
    (guess,) = broadcast_object_list([given_up(path)])  # sums may be rounded otherwise on another device
    most = min(spared_layers(gated, least), len(guess))
    order = trials.order(
        guess, pivot=round(2 * most / 3), deepest=math.floor(most), most=recipe.annealing.search_trials
    )
    return greedy_path(gated, batches, importance, order, least=least)


def spared_layers(gated: GatedModel, least: float) -> float:
    """How many layers the smallest budget is worth, counted in units: ``(1 - 0.8) * 30`` would be a bit below 6."""
    cost = gated.cost
    return (cost.dense_units - cost.limit(Budget(compute=least))) / (cost.dense_units // gated.shape.num_layers)


def search_batches(
    gated: GatedModel, samples: Samples, collate: SampleCollator, recipe: Recipe
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Batches of ``search_rows`` whole samples to measure losses on, and one for each step of a trial.

    Rows of the first have inputs_embeds [batch, length, width], which show them their budgets.
    """
    device, plan, size = gated.model.device, recipe.annealing, recipe.optim.batch_size
    rows = plan.search_rows + (plan.trial_steps * size if plan.search_trials else 0)
    whole = whole_samples(samples, rows)
    if len(whole) < rows:
        log.warning("the search wants %d whole samples and the run has %d: its trials are shorter", rows, len(whole))
    batches = in_batches(whole[: plan.search_rows], collate, size, device=device)
    grouped = by_length(whole[plan.search_rows :], size)  # little is padding
    random.Random(recipe.seed).shuffle(grouped)
    with torch.no_grad():
        for batch in batches:  # shown its budget, the model knows which of the trained traces is asked for
            told = _told(gated, batch)
            if told is not None:
                embedded = inputs_of(gated, batch)
                batch["inputs_embeds"] = embedded + told.to(embedded.dtype)  # a base may have 16 bits
    return batches, [batch for part in grouped for batch in in_batches(part, collate, size, device=device)]


def _noted(file: Path, shape: torch.Size) -> tuple[dict[tuple[int, ...], float], Tensor | None]:
    """What a search that was cut off has tried, and what one that came to its end has found."""
    if not file.is_file():
        return {}, None
    try:
        content = json.loads(file.read_text())
        losses = {tuple(gone): float(loss) for gone, loss in content["trials"]}
        scores = torch.tensor(content["scores"]) if "scores" in content else None
        if scores is not None and scores.shape != shape:
            raise ValueError(f"scores of shape {[*scores.shape]}, and the model has {[*shape]}")
        return losses, scores
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file}: not what a search notes ({error}); remove it to search again") from error


def _told(gated: GatedModel, batch: Batch) -> Tensor | None:
    """What shows each row its budget, as in training."""
    return gated.think_offset(batch["input_ids"], torch.stack([batch["compute"], batch["think"]], dim=-1))


class Trials:
    """Tries sets of layers to go on one model. ``losses`` are all sets that were tried, each in order, with its loss.

    Args:
        gated: the model; what is tried changes no weight of it for good.
        recipe: of the run; rates and weights of the loss are its own.
        batches: one for each step of a trial.
        held_out: batches that the loss is measured on.
        losses: of sets that were tried before, which are not tried again; others are put in.
        tried: called when one was.
        quiet: no progress bar.
    """

    def __init__(
        self,
        gated: GatedModel,
        recipe: Recipe,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        *,
        losses: dict[tuple[int, ...], float] | None = None,
        tried: Callable[[], None] = lambda: None,
        quiet: bool = True,
    ) -> None:
        self.gated, self.recipe, self.tried = gated, recipe, tried
        self.batches = [(batch, *self._teacher(batch)) for batch in batches]
        self.held_out = [(batch, *self._teacher(batch)) for batch in held_out]
        self.losses = {} if losses is None else losses
        self.bar = tqdm(desc="sets of layers tried", unit="", leave=False, disable=quiet or None)

    def loss(self, gone: Sequence[int]) -> float:
        """The mean of :meth:`trial` without these layers, which is not tried twice."""
        wanted = tuple(sorted(gone))
        if wanted not in self.losses:
            self.losses[wanted] = self._without(wanted)
            self.tried()
        self.bar.update()
        return self.losses[wanted]

    def all_losses(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The :meth:`loss` of each set; where there are several processes each tries a share, and all learn of all."""
        state = PartialState()
        if state.num_processes > 1:
            new = [gone for gone in dict.fromkeys(tuple(sorted(one)) for one in sets) if gone not in self.losses]
            for at in range(0, len(new), state.num_processes):
                mine = new[at : at + state.num_processes][state.process_index :][:1]
                self.losses |= sorted(gather_object([(gone, self._without(gone)) for gone in mine]))
                self.tried()
        return [self.loss(gone) for gone in sets]

    def _without(self, gone: Sequence[int]) -> float:
        shape = self.gated.shape
        kept = set(range(shape.num_layers)) - set(gone)
        found = self.trial(Allocation.of_layers(kept, shape.num_layers, shape.num_groups))
        return sum(found) / len(found)

    def trial(self, allocation: Allocation) -> list[float]:
        """Cross entropy of each batch of ``held_out`` at an allocation, after the adapters were trained for that."""
        optim = self.recipe.optim
        forced = self.gated.forced([allocation])  # in backward passes too: checkpointed layers run again there
        with forced, _put_back(list(self.gated.adapter_parameters.values())) as adapters, self._dropout():
            optimizer = torch.optim.AdamW(adapters, lr=optim.lr, betas=BETAS, weight_decay=0.0)
            self.gated.train()
            for part in self.batches:
                optimizer.zero_grad()
                self._read(*part).loss.backward()
                torch.nn.utils.clip_grad_norm_(adapters, optim.clip)
                optimizer.step()
            self.gated.eval()
            with torch.no_grad():
                return [float(self._read(*part).terms["ce"]) for part in self.held_out]

    def order(self, guess: Sequence[int], *, pivot: int, deepest: int, most: int) -> list[int]:
        """The first layers to give up, in that order.

        A set of ``pivot`` layers is found first, by exchanging one at a time. Then which of them comes back first, and
        so on down, and which layer goes beside them, and so on up.

        Args:
            guess: all layers that may go, the likeliest first.
            pivot: layers of the set that is searched.
            deepest: layers to find the order of, at least ``pivot``.
            most: trials that the search of the set may take.
        """
        left, kept = self._exchanged(guess, pivot, most), list[int]()
        while len(left) > 1:
            losses = self.all_losses([[other for other in left if other != layer] for layer in left])
            kept.insert(0, left.pop(losses.index(min(losses))))
        order = left + kept
        while len(order) < deepest:
            others = [layer for layer in guess if layer not in order]
            losses = self.all_losses([[*order, layer] for layer in others])
            order.append(others[losses.index(min(losses))])
        return order

    def _exchanged(self, guess: Sequence[int], count: int, most: int) -> list[int]:
        chosen, tried = list(guess[:count]), 1
        (least,) = self.all_losses([chosen])
        for place in reversed(range(count)):
            others = [layer for layer in guess if layer not in chosen][: most - tried]
            candidates = [[*chosen[:place], other, *chosen[place + 1 :]] for other in others]
            tried += len(candidates)
            for candidate, loss in zip(candidates, self.all_losses(candidates), strict=True):
                if loss < least:
                    least, chosen = loss, candidate
        return chosen

    def _teacher(self, batch: Batch) -> tuple[Supervised, Teacher, Tensor | None]:
        where, gated = Supervised.of(batch["labels"]), self.gated
        with torch.no_grad(), self._autocast():
            with gated.teacher():
                hidden = gated(batch["input_ids"], batch["attention_mask"]).hidden[where.mask]
            return where, Teacher(hidden=hidden), _told(gated, batch)

    def _read(self, batch: Batch, where: Supervised, teacher: Teacher, told: Tensor | None) -> Readout:
        gated, weight = self.gated, self.recipe.objective.weight("kl")
        with self._autocast():
            gated.state.offset = told
            hidden = gated(batch["input_ids"], batch["attention_mask"]).hidden[where.mask]
            vocabulary = int(gated.model.config.vocab_size)
            return readout(hidden, gated.logits, where, teacher, kl_weight=weight, vocabulary=vocabulary)

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """The same in every trial, and the run's own stream of random numbers is left as it was."""
        device = self.gated.model.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(self.recipe.seed)
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.gated.model.device.type, torch.bfloat16, enabled=self.recipe.optim.bf16)


@contextmanager
def _put_back(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Lends parameters, and makes them what they were."""
    before = [(value.detach().clone(), value.grad) for value in parameters]
    try:
        yield parameters
    finally:
        with torch.no_grad():
            for value, (content, grad) in zip(parameters, before, strict=True):
                value.copy_(content)
                value.grad = grad
