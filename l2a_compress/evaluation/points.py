"""Runs to be measured, their measurement by generation, and the point made of the rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.evaluation.answers import matches
from l2a_compress.evaluation.early_exit import exiting
from l2a_compress.evaluation.prompts import Problem, plan_batches
from l2a_compress.evaluation.statistics import clustered
from l2a_compress.evaluation.values import THINK_BIN, Contract, Heat, Measured, Metric, Point, Row, Run, Slice
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.generation import Generated, GenerationConfig, confirm, generate
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.collate import left_padded
from l2a_compress.training.examples import STYLES
from l2a_compress.training.pieces import token_ids

__all__ = ["Bench", "Tick", "allocate", "dense_run", "measure", "point_of"]

Tick = Callable[[str, int], None]
"""Called with the label of the run and the number of problems just done."""

_PATIENCE = 1.25  # of the reference reasoning
_DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every run is measured on.

    Attributes:
        gated: The model.
        tokenizer: Its tokenizer.
        problems: The held-out problems, the same for every run.
        generation: Limits of the generation.
        batch_size: Most rows of a batch.
    """

    gated: GatedModel
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[Problem]
    generation: GenerationConfig
    batch_size: int = 64

    @property
    def pad(self) -> int:
        """The padding id; what it is does not matter, since it is masked."""
        return int(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)


def allocate(bench: Bench, budget: Budget, contract: Contract) -> Run:
    """The run of the gated model under one budget: every problem's allocation is decided here, on its prompt."""
    assert contract != "static"
    problems = bench.problems
    found: dict[int, Allocation] = {}
    order = sorted(range(len(problems)), key=lambda row: len(problems[row].prompt))
    for start in range(0, len(order), bench.batch_size):
        rows = order[start : start + bench.batch_size]
        ids, mask = left_padded([problems[row].prompt for row in rows], bench.pad, bench.gated.model.device)
        decided = bench.gated.allocate(ids, mask, [budget] * len(rows), contract=contract)
        found.update(zip(rows, decided, strict=True))
    allocations = tuple(found[row] for row in range(len(problems)))
    return Run(name="l2a", budget=budget, contract=contract, allocations=allocations)


def dense_run(bench: Bench, name: str = "dense") -> Run:
    """The frozen base model; asked for a style of reasoning where the data names one."""
    shape = bench.gated.shape
    dense = Allocation.dense(shape.num_layers, shape.num_groups)
    styled = any(problem.example.names_style for problem in bench.problems)
    style = ("short" if name == "dense_short" else "long") if styled else None
    return Run(
        name=name,
        budget=Budget(),
        contract="static",
        allocations=(dense,) * len(bench.problems),
        teacher=True,
        style=style,  # type: ignore[arg-type]
    )


def measure(bench: Bench, run: Run, tick: Tick | None = None) -> Measured:
    """Generates an answer to every problem and compares it.

    What a trained model writes may well be the reference, word for word, so that is tried first, in one forward, until
    there is a batch in which no row does. The rest is generated. A batch runs until its last row is done, and a model
    that is lost writes on up to the limit. So a row that thinks for longer than its reference does by far is stopped,
    and run again from its start in a batch of its like.
    """
    found: dict[int, Row] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    if run.exit_entropy is None:
        _confirm(bench, run, found, tick)
    open_rows = [row for row in range(len(bench.problems)) if row not in found]
    lost = _measure_some(bench, run, open_rows, found, tick, patience=_PATIENCE)
    _measure_some(bench, run, lost, found, tick, patience=None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    outcomes = tuple(found[row] for row in range(len(bench.problems)))
    return Measured(rows=outcomes, wall=wall, cpu=cpu, tokens=sum((row.think or 0) + row.answer for row in outcomes))


def _confirm(bench: Bench, run: Run, found: dict[int, Row], tick: Tick | None) -> None:
    """Adds the rows that write their reference in one of its styles, or in the one that is asked for."""
    problems, tags = bench.problems, read_tags(bench.tokenizer)
    for style in [run.style] if run.style else STYLES:
        some = [row for row, problem in enumerate(problems) if row not in found and style in problem.drafts]
        drafts = {row: problems[row].drafts[style] for row in some}
        before = len(found)
        for opened, rows in _batches(bench, run, some, {row: len(draft) for row, draft in drafts.items()}):
            known = [(*problems[row].prompt, *drafts[row][:-1]) for row in rows]
            ids, mask = left_padded(known, bench.pad, bench.gated.model.device)
            outputs = confirm(
                bench.gated,
                tags,
                ids,
                mask,
                [drafts[row] for row in rows],
                budgets=[run.budget] * len(rows),
                allocations=[run.allocations[row] for row in rows],
                config=bench.generation,
                opened=len(opened[0]),
                teacher=run.teacher,
            )
            if not any(outputs):
                break
            found.update(
                (row, _row(bench, run, row, output, None))
                for row, output in zip(rows, outputs, strict=True)
                if output is not None
            )
        if tick is not None:
            tick(run.label, len(found) - before)


def _measure_some(
    bench: Bench, run: Run, some: Sequence[int], found: dict[int, Row], tick: Tick | None, *, patience: float | None
) -> list[int]:
    """Adds the rows that end in time to ``found`` and returns the others."""
    cap, lost = run.budget.think_tokens, list[int]()
    full = bench.generation.max_think_tokens if cap is None else min(bench.generation.max_think_tokens, cap)
    for openings, rows in _batches(bench, run, some, {row: bench.problems[row].length for row in some}):
        reference = max(bench.problems[row].length for row in rows)
        limit = full if patience is None else min(full, round(patience * reference) + 8)
        before = len(found)
        for row, output, cost in zip(rows, *_generate(bench, run, rows, openings, limit), strict=True):
            if output.stopped_by == "cap" and limit < full:
                lost.append(row)
            else:
                found[row] = _row(bench, run, row, output, cost)
        if tick is not None:
            tick(run.label, len(found) - before)
    return lost


def _batches(
    bench: Bench, run: Run, some: Sequence[int], written: Mapping[int, int]
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """(openings of the style that is asked for, rows) of each batch; openings of one batch are equally long."""
    problems = bench.problems
    texts = [problems[row].example.opening(run.style) if run.style else "" for row in some]
    opened = dict(zip(some, token_ids(bench.tokenizer, texts), strict=True)) if some else {}
    for length in sorted({len(ids) for ids in opened.values()}):
        alike = [row for row in some if len(opened[row]) == length]
        lengths = [(written[row], len(problems[row].prompt)) for row in alike]
        for batch in plan_batches([run.allocations[row] for row in alike], lengths, bench.batch_size):
            rows = [alike[at] for at in batch]
            yield [opened[row] for row in rows], rows


def _generate(
    bench: Bench, run: Run, rows: Sequence[int], openings: list[list[int]], limit: int
) -> tuple[list[Generated], list[float | None]]:
    """Outputs, and what each cost where its allocation does not say."""
    if run.exit_entropy is None:
        return _outputs(bench, run, rows, openings, limit), [None] * len(rows)
    with exiting(bench.gated, run.exit_entropy) as meter:
        outputs = _outputs(bench, run, rows, openings, limit)
    return outputs, [meter.cost(at, len(one.think) + len(one.answer)) for at, one in enumerate(outputs)]


def _outputs(bench: Bench, run: Run, rows: Sequence[int], openings: list[list[int]], limit: int) -> list[Generated]:
    ids, mask = left_padded([bench.problems[row].prompt for row in rows], bench.pad, bench.gated.model.device)
    return generate(
        bench.gated,
        read_tags(bench.tokenizer),
        ids,
        mask,
        budgets=[run.budget] * len(rows),
        allocations=[run.allocations[row] for row in rows],
        config=replace(bench.generation, max_think_tokens=limit),
        openings=openings,
        teacher=run.teacher,
    )


def _row(bench: Bench, run: Run, row: int, output: Generated, cost: float | None) -> Row:
    problem = bench.problems[row]
    text = str(bench.tokenizer.decode(output.answer, skip_special_tokens=True))
    return Row(
        trials=1,
        hits=int(matches(text, problem.example.answer)),
        allocation=run.allocations[row],
        difficulty=problem.tag("difficulty"),
        family=problem.tag("family"),
        think=len(output.think),
        answer=len(output.answer),
        stopped_by=output.stopped_by,
        empty=not text.strip(),
        cost=cost,
    )


def point_of(run: Run, measured: Measured, cost: CostModel, *, metric: Metric, seed: int) -> Point:
    """The point that all rows of a run make."""
    rows, budget = measured.rows, run.budget
    whole = _slice(rows, cost)
    likely = _likelihoods(rows) if metric == "nll" else {}
    tokens = max(measured.tokens, 1)
    return Point(
        name=run.name,
        budget=budget.compute,
        contract=run.contract,
        accuracy=whole.accuracy,
        accuracy_low=whole.accuracy_low,
        accuracy_high=whole.accuracy_high,
        layer_sparsity=fmean(row.allocation.layer_sparsity if row.cost is None else 1 - row.cost for row in rows),
        head_sparsity=fmean(row.allocation.head_sparsity for row in rows),
        think_tokens=whole.think_tokens,
        cost=whole.cost,
        over_budget=_over_budget(run, rows, cost),
        n=len(rows),
        seed=seed,
        think_cap=budget.think_tokens,
        exit_entropy=run.exit_entropy,
        mean_error=whole.cost - budget.compute if run.contract == "mean" else None,
        distinct_allocations=len(set(run.allocations)),
        dropped_layers=_dropped(run) if run.contract == "static" else (),
        tokens=measured.tokens,
        wall_ms_per_token=1000 * measured.wall / tokens,
        cpu_ms_per_token=1000 * measured.cpu / tokens,
        stopped_by=dict(sorted(Counter(row.stopped_by for row in rows if row.stopped_by).items())),
        empty_answers=sum(row.empty for row in rows) if metric == "accuracy" else None,
        by_difficulty={name: _slice(part, cost) for name, part in _grouped(rows, "difficulty").items()},
        by_family={name: _slice(part, cost) for name, part in _grouped(rows, "family").items()},
        heat={name: _heat(part) for name, part in (_grouped(rows, "difficulty") or {"all": list(rows)}).items()},
        think_histogram=_histogram(rows),
        outcomes="".join(str(row.hits) for row in rows) if metric == "accuracy" else "",
        work=fmean(_work(row, cost) for row in rows) if metric == "accuracy" else None,
        **likely,
    )


def _slice(rows: Sequence[Row], cost: CostModel) -> Slice:
    hits, trials = sum(row.hits for row in rows), sum(row.trials for row in rows)
    low, high = clustered([row.hits for row in rows], [row.trials for row in rows])
    written = [row.think for row in rows if row.think is not None]
    return Slice(
        n=len(rows),
        accuracy=hits / trials,
        accuracy_low=low,
        accuracy_high=high,
        cost=fmean(_cost(row, cost) for row in rows),
        think_tokens=fmean(written) if written else None,
    )


def _work(row: Row, cost: CostModel) -> float:
    """Tokens of the dense model that cost as much as what was written."""
    return _cost(row, cost) * ((row.think or 0) + row.answer)


def _cost(row: Row, cost: CostModel) -> float:
    return cost.fraction(row.allocation) if row.cost is None else row.cost


def _likelihoods(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = sum(row.trials for row in rows)
    nll = sum(row.nll for row in rows) / tokens
    agreement = sum(row.hits for row in rows) / tokens
    return {
        "nll": nll,
        "perplexity": exp(min(nll, 700.0)),  # a float holds no more
        "kl": sum(row.kl for row in rows) / tokens,
        "agreement": agreement,
        "nll_by_problem": tuple(round(row.nll / row.trials, 5) for row in rows),
        "agreement_by_problem": tuple(round(row.hits / row.trials, 5) for row in rows),
    }


def _over_budget(run: Run, rows: Sequence[Row], cost: CostModel) -> int:
    """Rows that broke what they were held to: a cap on think tokens always, the compute under ``cap``."""
    cap = run.budget.think_tokens
    return sum(
        (run.contract == "cap" and not cost.fits(row.allocation, run.budget))
        or (cap is not None and row.think is not None and row.think > cap)
        for row in rows
    )


def _dropped(run: Run) -> tuple[int, ...]:
    kept = set(run.allocations[0].layers)
    return tuple(layer for layer in range(run.allocations[0].num_layers) if layer not in kept)


def _grouped(rows: Sequence[Row], name: str) -> Mapping[str, list[Row]]:
    """Rows by difficulty or family, in order of difficulty; empty where the data does not say."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return {key: groups[key] for key in _ordered(groups) if key}


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_DIFFICULTIES.index(name) if name in _DIFFICULTIES else -1, name))


def _heat(rows: Sequence[Row]) -> Heat:
    total = rows[0].allocation.num_groups
    kept = torch.tensor([[len(groups) for groups in row.allocation.groups] for row in rows], dtype=torch.float64)
    return Heat(
        n=len(rows),
        layers=tuple((kept > 0).double().mean(0).tolist()),
        groups=tuple((kept / total).mean(0).tolist()),
    )


def _histogram(rows: Sequence[Row]) -> tuple[int, ...]:
    """Counts of rows by think tokens, in bins of ``THINK_BIN`` from 0 on."""
    counts = Counter((row.think or 0) // THINK_BIN for row in rows if row.think is not None)
    return tuple(counts[at] for at in range(max(counts) + 1)) if counts else ()
