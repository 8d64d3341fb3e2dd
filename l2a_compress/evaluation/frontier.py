"""``evaluate``: from an artifact to a report."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError, DataError
from l2a_compress.evaluation.baselines import BASELINES, OTHERS, Context, baseline_runs, known_baselines
from l2a_compress.evaluation.likelihood import measure_likelihoods
from l2a_compress.evaluation.points import Bench, allocate, dense_run, point_of
from l2a_compress.evaluation.prompts import held_out
from l2a_compress.evaluation.report import Report
from l2a_compress.evaluation.statistics import check_frontier
from l2a_compress.evaluation.values import Contract, Measured, Metric, Point, Run
from l2a_compress.evaluation.workers import measure_runs
from l2a_compress.limits import Contract as GateContract
from l2a_compress.modeling.budgets import minimum_compute
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.generation import GenerationConfig
from l2a_compress.modeling.prices import price_grid
from l2a_compress.training.calibration import calibration_examples, example_batches
from l2a_compress.training.data_config import WITH_ANSWERS, DataConfig, MixtureConfig
from l2a_compress.training.examples import Split
from l2a_compress.training.recipe import EvalConfig, Recipe

if TYPE_CHECKING:
    from l2a_compress.training.store import LoadedArtifact

__all__ = ["Progress", "evaluate"]

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, problems done and problems in all (over all runs)."""

_CALIBRATION_ROWS = 64
THINK_SHARES = (0.5, 0.25)


def own_settings(artifact: LoadedArtifact) -> EvalConfig:
    """Those of an artifact's recipe. A static model is asked for what it was trained for alone."""
    static, settings = artifact.config.metrics.get("static"), artifact.recipe.evaluation
    return dataclasses.replace(settings, budgets=(static["budget"],), contracts=("cap",)) if static else settings


def evaluate(
    artifact: LoadedArtifact,
    settings: EvalConfig | None = None,
    *,
    data: DataConfig | MixtureConfig | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    think_shares: Sequence[float] | None = None,
    works: Sequence[float] = (),
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Report:
    """Measures an artifact on held-out problems: dense, at every budget under every contract, and the baselines.

    Args:
        artifact: What to measure; the model is left as it was.
        settings: Budgets, contracts, problems and baselines; by default those of the artifact's recipe.
        data: Other data than the recipe's. For a file that is only evaluated set its ``heldout_share`` to 1.
        metric: ``accuracy`` generates and compares answers, ``nll`` is teacher-forced; by default what the data allows.
        seed: Of generated problems; by default the recipe's.
        think_shares: Caps on think tokens, as shares of the gates' ``think_reference``, measured at the full compute;
            by default ``THINK_SHARES``, and none with ``nll`` or of a static model.
        works: Shares of the dense model's work of a request, each measured by the split that the artifact notes for it.
        batch_size: Most problems that run together.
        progress: Told how far it is.

    Raises:
        ConfigError: an unknown baseline or metric, or one that the data does not allow.
        BudgetError: a budget the model cannot keep to, or ``mean`` without calibrated prices.
        DataError: the data cannot be read or is empty.
    """
    settings = settings or own_settings(artifact)
    data, seed = data or artifact.recipe.data, artifact.recipe.seed if seed is None else seed
    contracts = cast("tuple[GateContract, ...]", tuple(dict.fromkeys(settings.contracts)))
    metric = metric or metric_for(data)
    names = _allowed(settings.baselines, metric)
    if metric == "nll" and think_shares:
        raise ConfigError("think shares are of generated tokens: leave --think-shares out, or use --metric accuracy")
    if not all(0 <= share <= 1 for share in think_shares or ()):
        raise ConfigError(f"think shares {', '.join(map(str, think_shares or ()))}: must lie in [0, 1]")
    if think_shares is None:
        think_shares = THINK_SHARES if metric == "accuracy" and "static" not in artifact.config.metrics else ()
    began, bench = time.perf_counter(), bench_of(artifact, settings, data, metric, seed, batch_size)
    with evaluating(artifact.gated):
        caps = [think_cap(bench, share) for share in think_shares]
        runs = _gated_runs(bench, settings.budgets, contracts, caps)
        context = Context(artifact.gated, lambda: _calibration(artifact))
        priced = [run for run in runs if run.budget.think_tokens is None]
        capped = [run for run in priced if run.contract == "cap"]
        runs += baseline_runs(bench, context, names, [_cost(bench, run) for run in capped or priced], caps)
        runs += _split_runs(bench, artifact, works, metric)
        runs = [dense_run(bench, name) for name in _references(bench, metric)] + runs
        measured = measure_all(bench, runs, metric, progress)
    cost = artifact.gated.cost
    points = [point_of(run, one, cost, metric=metric, seed=seed) for run, one in zip(runs, measured, strict=True)]
    return Report(
        model=_model(artifact),
        metric="accuracy" if metric == "accuracy" else "agreement",
        data=data.to_json(),
        settings=_settings(
            settings,
            bench,
            contracts=contracts,
            seed=seed,
            batch_size=batch_size,
            think_shares=tuple(think_shares),
            works=tuple(works),
        ),
        environment=_environment(artifact, time.perf_counter() - began),
        **_sorted(points, contracts),
    )


def check_evaluation(recipe: Recipe, gated: GatedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses, before a training, what :func:`evaluate` could not do with what it leaves.

    Args:
        recipe: of the training.
        gated: its model, trained or not.
        tokenizer: of the model.

    Raises:
        ConfigError: baselines that the data does not allow, or a budget that the model cannot keep to.
        DataError: the held-out examples cannot be read, or none of them fits.
    """
    settings, metric = recipe.evaluation, metric_for(recipe.data)
    names = _allowed(settings.baselines, metric)
    held_out(recipe.data, tokenizer, metric=metric, count=1, seed=recipe.seed)
    if recipe.static.method:  # is only ever asked for what it spends, and reads nothing of calibration before
        if set(names) & set(BASELINES):
            calibration_examples(recipe, 1)
        return
    least = minimum_compute(gated.cost, gated.gate_config)
    calibrated = price_grid(gated)[0] if "mean" in settings.contracts else least
    for budget in settings.budgets:
        if budget < least:
            raise ConfigError(f"evaluation.budgets: {budget:g} is below {least:.4g}, what the always-on layers cost")
        if budget < calibrated:
            raise ConfigError(
                f"evaluation.budgets: {budget:g} is below {calibrated:g}, the least that prices of the contract mean "
                "are calibrated for; leave it out, set evaluation.contracts to cap alone, or lower gates.least_compute"
            )


def _allowed(baselines: Sequence[str], metric: Metric) -> tuple[str, ...]:
    names = known_baselines(baselines)
    refused = [name for name in names if metric == "nll" and name in OTHERS]
    if refused:
        raise ConfigError(f"baseline {refused[0]!r} is about generated tokens; leave it out, or use --metric accuracy")
    return names


@contextmanager
def evaluating(gated: GatedModel) -> Iterator[None]:
    """Evaluation mode, and fused attention in the place of eager: a decoded token then copies no keys and values."""
    was_training, attention = gated.training, gated.model.config._attn_implementation
    gated.eval()
    if attention == "eager":
        gated.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        gated.model.set_attn_implementation(attention)
        gated.train(was_training)


def metric_for(data: DataConfig | MixtureConfig) -> Metric:
    """Exact answers are compared where every source has them."""
    return "accuracy" if all(source.kind in WITH_ANSWERS for source in data.sources) else "nll"


def bench_of(
    artifact: LoadedArtifact,
    settings: EvalConfig,
    data: DataConfig | MixtureConfig,
    metric: Metric,
    seed: int,
    batch_size: int,
    *,
    split: Split = "heldout",
) -> Bench:
    """The model on problems of a split.

    Raises:
        ConfigError: an unknown metric, or one that the data does not allow.
        DataError: the data cannot be read or is empty.
    """
    if metric not in get_args(Metric):
        raise ConfigError(f"metric {metric!r}: choose from {', '.join(get_args(Metric))}")
    return Bench(
        gated=artifact.gated,
        tokenizer=artifact.tokenizer,
        problems=held_out(data, artifact.tokenizer, metric=metric, count=settings.problems, seed=seed, split=split),
        generation=GenerationConfig(
            max_think_tokens=settings.max_think_tokens, max_answer_tokens=settings.max_answer_tokens
        ),
        batch_size=batch_size,
    )


def _gated_runs(
    bench: Bench, budgets: Sequence[float], contracts: Sequence[GateContract], think_caps: Sequence[int]
) -> list[Run]:
    """All allocations are decided before anything is measured, so that a budget that cannot be kept fails at once."""
    caps = [Budget(compute=value) for value in sorted(set(budgets), reverse=True)]
    runs = [allocate(bench, budget, contract) for contract in contracts for budget in caps]
    return runs + [allocate(bench, Budget(think_tokens=cap), "cap") for cap in think_caps]


def _split_runs(bench: Bench, artifact: LoadedArtifact, works: Sequence[float], metric: Metric) -> list[Run]:
    if not works:
        return []
    if metric != "accuracy":
        raise ConfigError("work is of generated tokens: measure it with the metric accuracy")
    split = artifact.config.split
    if split is None:
        raise ConfigError("the artifact notes no split of work; measure one with l2a compress split")
    budgets = [split.at(work).budget for work in sorted(set(works), reverse=True)]
    return [dataclasses.replace(allocate(bench, budget, "cap"), name="split") for budget in budgets]


def think_cap(bench: Bench, share: float) -> int:
    """A cap on think tokens, of a share of the longest full reasoning; no more than generation writes at all."""
    return min(round(share * bench.gated.gate_config.think_reference), bench.generation.max_think_tokens)


def _cost(bench: Bench, run: Run) -> float:
    return fmean(bench.gated.cost.fraction(allocation) for allocation in run.allocations)


def _references(bench: Bench, metric: Metric) -> tuple[str, ...]:
    examples = [problem.example for problem in bench.problems]
    both = metric == "accuracy" and any(one.names_style and "short" in one.traces for one in examples)
    return ("dense", "dense_short") if both else ("dense",)


def measure_all(bench: Bench, runs: Sequence[Run], metric: Metric, progress: Progress | None) -> list[Measured]:
    """One measurement per run, in order; of runs that do the same, one is measured."""
    total, done = len(runs) * len(bench.problems), 0

    def tick(label: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(label, done, total)

    if progress is not None:
        progress(runs[0].label, 0, total)
    if metric == "nll":
        return measure_likelihoods(bench, runs, tick)
    distinct = list({_what_runs(run): run for run in runs}.values())
    total = len(distinct) * len(bench.problems)
    found = dict(zip(map(_what_runs, distinct), measure_runs(bench, distinct, tick), strict=True))
    return [found[_what_runs(run)] for run in runs]


def _what_runs(run: Run) -> Any:
    """Equal for runs that give the same output: ``cap`` and ``mean`` meet at the whole budget."""
    return run.allocations, run.budget, run.teacher, run.style, run.exit_entropy


def _calibration(artifact: LoadedArtifact) -> list[dict[str, Tensor]]:
    """Whole examples of the recipe's calibration split."""
    recipe = artifact.recipe
    try:
        examples = calibration_examples(recipe, _CALIBRATION_ROWS)
    except DataError as error:
        raise DataError(f"static baselines are chosen on the data of training: {error}; or leave them out") from error
    device = artifact.gated.model.device
    return example_batches(examples, artifact.tokenizer, max_length=recipe.data.max_length, device=device)


def _sorted(points: Sequence[Point], contracts: Sequence[Contract]) -> dict[str, Any]:
    """The report's fields that hold points."""
    named = {point.name: point for point in points}
    gated = [point for point in points if point.name == "l2a"]
    frontier = tuple(point for point in gated if point.think_cap is None)
    return {
        "dense": named["dense"],
        "dense_short": named.get("dense_short"),
        "points": frontier,
        "think_points": tuple(point for point in gated if point.think_cap is not None),
        "split_points": tuple(point for point in points if point.name == "split"),
        "baselines": tuple(p for p in points if p.name not in ("l2a", "split") and not p.name.startswith("dense")),
        "frontier": {
            contract: check_frontier([point for point in frontier if point.contract == contract])
            for contract in contracts
        },
    }


def _model(artifact: LoadedArtifact) -> dict[str, Any]:
    base, gated = artifact.config.base, artifact.gated
    return {
        **{name: base.get(name) for name in ("name", "family", "digest")},
        "artifact": artifact.config.digest,
        "shape": gated.shape.to_json(),
        "gates": gated.gate_config.to_json(),
        "adapter": gated.adapter_config.to_json(),
    }


def _settings(settings: EvalConfig, bench: Bench, **more: Any) -> dict[str, Any]:
    values = dataclasses.asdict(settings) | more | {"tau_threshold": bench.generation.tau_threshold}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _environment(artifact: LoadedArtifact, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "device": str(artifact.gated.model.device),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
