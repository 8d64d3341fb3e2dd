"""A tiny artifact on the embedded task, as evaluation takes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from l2a_compress.artifact import ArtifactConfig
from l2a_compress.evaluation.points import Bench
from l2a_compress.evaluation.prompts import held_out
from l2a_compress.evaluation.values import Metric
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.generation import GenerationConfig
from l2a_compress.modeling.prices import calibrate_prices
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.recipe import EvalConfig, Recipe
from l2a_compress.training.store import LoadedArtifact
from strategies import EXAMPLE_ARTIFACT
from toy_data import word_tokenizer
from toy_models import new_gated, prompts

THINK = 8
SETTINGS = EvalConfig(budgets=(1.0, 0.7, 0.5), problems=9, max_think_tokens=THINK, baselines=("uniform",))


def _gated() -> GatedModel:
    gated = new_gated()
    with torch.no_grad():  # wide scores, so that inputs are given different allocations
        gated.allocator.layer_gates.outer.mul_(4)
    return gated


@functools.cache
def _prices() -> list[tuple[float, float]]:
    return calibrate_prices(_gated(), [prompts(16)], [0.4, 0.6, 0.8, 1.0])


def new_artifact(**changes: Any) -> LoadedArtifact:
    """A model with random gates and adapters, and prices calibrated on random prompts."""
    gated = _gated()
    gated.prices = _prices()
    recipe = Recipe(evaluation=dataclasses.replace(SETTINGS, **changes))
    config: ArtifactConfig = dataclasses.replace(
        EXAMPLE_ARTIFACT, base={"name": "tiny <b>", "family": "qwen3", "digest": "0" * 64, "path": None}
    )
    return LoadedArtifact(gated, word_tokenizer(), config, recipe)


def new_bench(*, metric: Metric = "accuracy", count: int = 9, batch_size: int = 4) -> Bench:
    """Held-out problems of the embedded task on such a model."""
    artifact = new_artifact()
    return Bench(
        gated=artifact.gated,
        tokenizer=artifact.tokenizer,
        problems=held_out(DataConfig(), artifact.tokenizer, metric=metric, count=count, seed=0),
        generation=GenerationConfig(max_think_tokens=THINK, max_answer_tokens=3),
        batch_size=batch_size,
    )
