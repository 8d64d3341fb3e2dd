"""What is wrong with a recipe, before it trains."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from l2a_compress.errors import ConfigError, DataError
from l2a_compress.evaluation.frontier import check_evaluation
from l2a_compress.training.checks import check_model, check_recipe
from l2a_compress.training.recipe import Recipe
from toy_data import word_tokenizer, write_jsonl
from toy_models import new_gated

STATIC = {"method": "uniform", "compute": 0.7}


@pytest.mark.parametrize("name", ["mini", "smollm2-135m", "llama-3-8b", "qwen3-4b"])
def test_nothing_is_wrong_with_a_shipped_recipe(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_recipe(Recipe.named(name), (), 1)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        ({"optim": {"batch_size": 8}}, {"processes": 3}, "optim.batch_size = 8: does not split over 3 processes"),
        ({"static": {"method": "unifrom"}}, {}, "static.method = 'unifrom': choose from uniform"),
        ({}, {"trackers": ("wandbb",)}, "--tracker wandbb: wandbb is not supported"),
    ],
)
def test_what_does_not_go_together_is_refused(data: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_recipe(Recipe.from_json(data), **({"trackers": (), "processes": 1} | more))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"gates": {"mode": "inline"}, "draws": {"switch_share": 0.1}}, ["draws.switch_share = 0.1 has no effect"]),
        ({"gates": {"mode": "inline"}, "annealing": {"search_rows": 4}}, ["annealing.search_rows = 4 has no effect"]),
        ({"gates": {"demand": False}, "evaluation": {"demand_rows": 8}}, ["evaluation.demand_rows = 8 has no effect"]),
        (
            {"draws": {"minimum": 0.7}},
            ["evaluation.budgets goes down to 0.5, and no", "gates.least_compute goes down to 0.4, and no"],
        ),
        ({"draws": {"minimum": 0.7}, "static": STATIC}, []),
    ],
)
def test_what_has_no_effect_is_told(data: dict[str, Any], words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    check_recipe(Recipe.from_json(data), (), 1)
    assert all(word in caplog.text for word in words)
    assert bool(caplog.text) == bool(words)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"draws": {"minimum": 0.1}}, "draws.minimum = 0.1"),
        ({"static": {"method": "uniform", "compute": 0.1}}, "static.compute = 0.1"),
    ],
)
def test_a_share_below_the_stem_is_refused(data: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: is below 0.1667, what the always-on layers cost"):
        check_model(Recipe.from_json(data), new_gated())


def evaluated(tmp_path: Path, data: dict[str, Any] | None = None, **evaluation: Any) -> Recipe:
    """A recipe whose data are a file of ten problems, unless ``data`` says more."""
    asked = "how many is it and one more of the same ?"
    rows = [{"prompt": f"{n} {asked}", "trace": f"{n} + 1", "answer": str(n + 1), "text": "one"} for n in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    told = {"source": str(path), "kind": "reasoning", "heldout_share": 0.4} | (data or {})
    return Recipe.from_json({"data": told, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("data", "evaluation", "error", "words"),
    [
        ({}, {"budgets": [1.0, 0.1]}, ConfigError, "evaluation.budgets: 0.1 is below 0.1667"),
        ({}, {"budgets": [0.3]}, ConfigError, "evaluation.budgets: 0.3 is below 0.4, the least that prices"),
        ({}, {"baselines": ["magic"]}, ConfigError, "magic"),
        ({"kind": "text"}, {"baselines": ["early_exit"]}, ConfigError, "'early_exit' is about generated tokens"),
        ({"heldout_share": 0.0}, {}, DataError, "empty"),
        ({"max_length": 8}, {}, DataError, "no held-out example can be encoded"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    data: dict[str, Any], evaluation: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    recipe = evaluated(tmp_path, data, **evaluation)
    with pytest.raises(error, match=words):
        check_evaluation(recipe, new_gated(), word_tokenizer())


def test_what_can_be_evaluated_passes(tmp_path: Path) -> None:
    gated, tokenizer = new_gated(), word_tokenizer()
    check_evaluation(evaluated(tmp_path, budgets=[1.0, 0.4]), gated, tokenizer)
    check_evaluation(evaluated(tmp_path, budgets=[0.3], contracts=["cap"]), gated, tokenizer)
    static = Recipe.from_json(evaluated(tmp_path, budgets=[0.1]).to_json() | {"static": STATIC})
    check_evaluation(static, gated, tokenizer)  # which is asked for its own share alone
    none = dataclasses.replace(static.data, calibration_share=0.0)
    chosen = dataclasses.replace(static.evaluation, baselines=("uniform",))
    with pytest.raises(DataError, match="calibration"):
        check_evaluation(dataclasses.replace(static, data=none, evaluation=chosen), gated, tokenizer)
