"""Teacher-forced measurement: likelihood of the held-out text, and how far a run is from the dense model.

All runs are measured batch by batch, so that the dense model is run once and only one batch is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from l2a_compress.evaluation.points import Bench, Tick
from l2a_compress.evaluation.values import Measured, Row, Run
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.collate import Collator

__all__ = ["measure_likelihoods"]

_CHUNK = 512  # positions whose logits are in memory at a time: a large vocabulary takes 0.1 GB


@dataclass(frozen=True)
class _Labelled:
    """The predicted positions: ``mask`` [rows, length - 1], and their ``targets`` and ``rows``, both [positions]."""

    mask: Tensor
    targets: Tensor
    rows: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> _Labelled:
        mask = labels[:, 1:] != -100
        rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(mask)
        return cls(mask, labels[:, 1:][mask], rows[mask])


@torch.no_grad()
def measure_likelihoods(bench: Bench, runs: Sequence[Run], tick: Tick | None = None) -> list[Measured]:
    """One measurement per run, in order; a row's hits are the tokens that the run predicts as the dense model does."""
    collate = Collator.of(bench.tokenizer)
    rows: list[dict[int, Row]] = [{} for _ in runs]
    walls, cpus, tokens = [0.0] * len(runs), [0.0] * len(runs), 0
    for numbers in _batches(bench):
        encoded = [bench.problems[row].encoded for row in numbers]
        batch = collate([one for one in encoded if one is not None])
        batch = {name: value.to(bench.gated.model.device) for name, value in batch.items()}
        tokens += int(batch["attention_mask"].sum())
        where = _Labelled.of(batch["labels"])
        with bench.gated.teacher():
            teacher = bench.gated(batch["input_ids"], batch["attention_mask"]).hidden[:, :-1][where.mask]
        for at, run in enumerate(runs):
            wall, cpu = time.perf_counter(), time.process_time()
            hidden = _hidden(bench.gated, run, numbers, batch)[:, :-1][where.mask]
            walls[at] += time.perf_counter() - wall
            cpus[at] += time.process_time() - cpu
            sums = _sums(bench.gated, hidden, teacher, where)
            rows[at].update({row: _row(bench, run, row, sums[slot]) for slot, row in enumerate(numbers)})
            if tick is not None:
                tick(run.label, len(numbers))
    return [
        Measured(rows=tuple(found[row] for row in range(len(bench.problems))), wall=wall, cpu=cpu, tokens=tokens)
        for found, wall, cpu in zip(rows, walls, cpus, strict=True)
    ]


def _batches(bench: Bench) -> Iterator[list[int]]:
    """Problems of like length, at most ``batch_size`` and about 8,000 tokens a batch."""
    order = sorted(range(len(bench.problems)), key=lambda row: bench.problems[row].length)
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) >= bench.batch_size or (len(batch) + 1) * bench.problems[row].length > 8_000):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _hidden(gated: GatedModel, run: Run, numbers: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states [rows, length, width] under the run's allocations; rows that keep the same layers go together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for slot, row in enumerate(numbers):
        groups.setdefault(run.allocations[row].layers, []).append(slot)
    hidden: Tensor | None = None
    for slots in groups.values():
        ids, mask = batch["input_ids"][slots], batch["attention_mask"][slots]
        with _running(gated, run, [numbers[slot] for slot in slots]):
            if not run.teacher:
                told = batch_budgets([run.budget] * len(ids), gated.cost, gated.gate_config).to(ids.device)
                gated.state.offset = gated.think_offset(ids, told.features)
            part = gated(ids, mask).hidden
        if hidden is None:
            hidden = part.new_zeros(len(numbers), *part.shape[1:])
        hidden[slots] = part
    assert hidden is not None
    return hidden


@contextmanager
def _running(gated: GatedModel, run: Run, numbers: Sequence[int]) -> Iterator[None]:
    with ExitStack() as stack:
        if run.teacher:
            stack.enter_context(gated.teacher())
        stack.enter_context(gated.forced([run.allocations[row] for row in numbers]))
        yield


def _sums(gated: GatedModel, hidden: Tensor, teacher: Tensor, where: _Labelled) -> list[tuple[int, int, float, float]]:
    """Per row: labelled tokens, tokens predicted as the dense model does, NLL and KL in nats."""
    sums = torch.zeros(where.mask.shape[0], 4, dtype=torch.float64, device=hidden.device)
    for start in range(0, len(where.targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        student = functional.log_softmax(gated.logits(hidden[part]).float(), dim=-1)
        dense = functional.log_softmax(gated.logits(teacher[part]).float(), dim=-1)
        agree = student.argmax(-1) == dense.argmax(-1)
        nll = -student.gather(-1, where.targets[part, None])[:, 0]
        kl = (dense.exp() * (dense - student)).sum(-1)
        values = torch.stack([torch.ones_like(nll), agree.float(), nll, kl], dim=-1).double()
        sums.index_add_(0, where.rows[part], values)
    return [(int(count), int(same), nll, max(kl, 0.0)) for count, same, nll, kl in sums.tolist()]


def _row(bench: Bench, run: Run, row: int, sums: tuple[int, int, float, float]) -> Row:
    problem = bench.problems[row]
    trials, hits, nll, kl = sums
    return Row(
        trials=trials,
        hits=hits,
        allocation=run.allocations[row],
        difficulty=problem.tag("difficulty"),
        family=problem.tag("family"),
        nll=nll,
        kl=kl,
    )
