"""Recipes: exact round trips, overrides by dotted names, and every mistake named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a_compress import profiles
from l2a_compress._cli import main
from l2a_compress.errors import ConfigError
from l2a_compress.training import run
from l2a_compress.training.data_config import DataConfig, MixtureConfig
from l2a_compress.training.recipe import Recipe, with_overrides

positive = st.floats(1e-6, 10, exclude_min=True)
share = st.floats(0, 0.5)
sections = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "model": st.fixed_dictionaries(
            {"name": st.sampled_from(["embedded", "some/model"]), "add_tags": st.booleans()}
        ),
        "gates": st.fixed_dictionaries({"hidden": st.integers(1, 99), "mode": st.sampled_from(["stem", "inline"])}),
        "adapter": st.fixed_dictionaries({"rank": st.integers(0, 64), "dropout": share}),
        "objective": st.fixed_dictionaries({"kl": positive, "without": st.lists(st.sampled_from(["kl", "heads"]))}),
        "draws": st.fixed_dictionaries({"minimum": st.floats(0.1, 1), "dense_share": share}),
        "annealing": st.fixed_dictionaries({"temperature_end": positive}),
        "optim": st.fixed_dictionaries(
            {"lr": positive, "steps": st.integers(1, 10**6), "precision": st.sampled_from(["auto", "fp32", "bf16"])}
        ),
        "evaluation": st.fixed_dictionaries(
            {"budgets": st.lists(st.floats(0.1, 1), min_size=1), "problems": st.integers(1, 99)}
        ),
        "data": st.fixed_dictionaries({"limit": st.integers(1, 99), "subset": st.sampled_from(["easy", "hard"])}),
    },
)


def toml_of(data: Mapping[str, Any]) -> str:
    """A TOML document of inline tables; what is None is left out, since TOML has no such value."""
    return "\n".join(f"{name} = {_inline(value)}" for name, value in data.items())


def _inline(value: object) -> str:
    if not isinstance(value, Mapping):
        return json.dumps(value)
    inner = ", ".join(f"{name} = {_inline(part)}" for name, part in value.items() if part is not None)
    return "{" + inner + "}"


@settings(max_examples=60)
@given(sections)
def test_a_recipe_survives_json_exactly(data: dict[str, Any]) -> None:
    recipe = Recipe.from_json(data)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipe_survives_toml_exactly(tmp_path: Path) -> None:
    recipe = Recipe.from_json(
        {
            "seed": 3,
            "objective": {"without": ["kl"], "kl": 0.1},
            "optim": {"lr": 1e-4, "precision": "bf16"},
            "evaluation": {"budgets": [1.0, 0.3], "baselines": ["uniform"]},
            "data": {"source": "x.jsonl", "kind": "gsm8k", "columns": {"prompt": "q"}, "limit": 5},
        }
    )
    path = tmp_path / "recipe.toml"
    path.write_text(toml_of(recipe.to_json()))
    assert Recipe.named(str(path)) == recipe


def test_a_mixture_survives_json() -> None:
    sources = (DataConfig(weight=2.0), DataConfig(source="a.txt", kind="text"))
    recipe = Recipe(data=MixtureConfig(sources=sources))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_every_shipped_recipe_reads() -> None:
    for name in profiles.names("recipes"):
        assert Recipe.from_json(Recipe.named(name).to_json()) == Recipe.named(name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"optimizer": {}}, "unknown section 'optimizer'; known: .*optim"),
        ({"optim": {"learning_rate": 1}}, r"\[optim\] has no setting 'learning_rate'; known: steps, .*lr"),
        ({"gates": {"stems": 1}}, r"\[gates\] has no setting 'stems'"),
        ({"optim": 3}, r"\[optim\] must be a table"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
        ({"seed": True}, "seed must be an integer, found True"),
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"optim": {"steps": 0}}, "optim.steps must be at least 1, found 0"),
        ({"optim": {"steps": 10.0}}, "optim.steps must be an integer, found 10.0"),
        ({"optim": {"threads": -1}}, "optim.threads must be at least 0"),
        ({"optim": {"lr": 0}}, "optim.lr = 0"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be a number, found 'fast'"),
        ({"optim": {"clip": math.inf}}, "optim.clip must be finite"),
        ({"optim": {"gradient_checkpointing": "no"}}, "optim.gradient_checkpointing must be true or false, found 'no'"),
        ({"gates": {"demand": "False"}}, "gates.demand must be true or false, found 'False'"),
        ({"annealing": {"search_rows": 1e2}}, "annealing.search_rows must be an integer, found 100.0"),
        ({"annealing": {"noise_end": math.nan}}, "annealing.noise_end must be finite"),
        ({"adapter": {"alpha": 0}}, "adapter alpha = 0: must be above 0"),
        ({"model": {"name": 3}}, "model.name must be text, found 3"),
        ({"model": {"gguf_file": 3}}, "model.gguf_file must be text"),
        ({"objective": {"without": "kl"}}, "objective.without must be a list, found 'kl'"),
        ({"evaluation": {"baselines": [1]}}, "evaluation.baselines must be text, found 1"),
        ({"evaluation": {"contracts": []}}, "evaluation.contracts: give at least one of cap, mean"),
        ({"static": {"compute": 0.5}}, "is of a static model: name its static.method"),
        ({"optim": {"batch_size": 10, "accumulate": 4}}, "batch_size 10 must be a multiple of accumulate 4"),
        ({"optim": {"teacher": "none"}}, "choose online or cached"),
        ({"optim": {"warmup": 1.5}}, "shares of the steps"),
        ({"model": {"dtype": "int8"}}, "model dtype 'int8'"),
        ({"adapter": {"rank": -1}}, "adapter rank = -1"),
        ({"adapter": {"dropout": 1.0}}, "adapter dropout = 1.0"),
        ({"objective": {"without": ["kd"]}}, "unknown term"),
        ({"data": {"kind": "books"}}, "data.kind"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_json(data)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "base.toml"
    path.write_text("seed = 1\n[optim]\nsteps = 5\nlr = 0.1\n")
    recipe = Recipe.named(
        str(path),
        [
            "optim.steps=7",
            "gates.mode=inline",
            'model.name="a b"',
            "seed = 4",
            'objective.without=["kl"]',
            "optim.precision=bf16",
        ],
    )
    assert (recipe.optim.steps, recipe.optim.lr, recipe.optim.bf16, recipe.seed) == (7, 0.1, True, 4)
    assert (recipe.gates.mode, recipe.model.name, recipe.objective.without) == ("inline", "a b", ("kl",))


@pytest.mark.parametrize("text", ["optim.steps", "optim.=3", ".steps=3", "a.b.c=3", "=3"])
def test_overrides_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section.key=value"):
        with_overrides({}, [text])


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-4b"])
def test_recipes_of_the_paper_read_no_script_and_no_empty_outputs(name: str) -> None:
    data = Recipe.named(name).data
    assert isinstance(data, MixtureConfig)
    named = {(source.source, source.subset) for source in data.sources}
    assert named == {
        ("openai/gsm8k", "main"),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("yahma/alpaca-cleaned", None),
    }


def test_an_override_does_not_change_what_it_was_made_from() -> None:
    data = {"optim": {"steps": 5}}
    assert with_overrides(data, ["optim.steps=6"]) == {"optim": {"steps": 6}}
    assert data == {"optim": {"steps": 5}}


def test_a_list_of_sources_cannot_be_overridden_by_key() -> None:
    with pytest.raises(ConfigError, match=r"expected section.key=value"):
        with_overrides({"data": {"sources": []}}, ["data.sources.0=1"])


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'nothing'"):
        Recipe.named("nothing")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What the command line wants to be trained; nothing is."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(run, "train", lambda recipe, out, **options: recipes.append(recipe))
    return recipes


def told(*options: str) -> int:
    return main(["compress", "train", "--no-evaluate", *options])


def test_the_page_tells_every_setting_and_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    told = dict(re.findall(r"^\| `([a-z]+\.\w+)` \| (`.*?`|-) \|", page, re.MULTILINE))
    sections = Recipe().to_json()
    del sections["seed"]
    assert told == {
        f"{section}.{key}": "-" if value is None else f"`{json.dumps(value)}`"
        for section, values in sections.items()
        for key, value in values.items()
    }


def test_data_of_the_command_line_replace_those_of_the_recipe(asked: list[Recipe]) -> None:
    assert told("--recipe", "smollm2-135m", "--data", "x.jsonl") == 0
    assert asked[0].data == DataConfig(source="x.jsonl", kind="gsm8k")
    assert told("--recipe", "qwen3-4b", "--data", "x.jsonl", "--kind", "text", "--columns", "text=body") == 0
    assert asked[1].data == DataConfig(source="x.jsonl", kind="text", columns={"text": "body"})
    assert told("--recipe", "qwen3-4b", "--data", "embedded") == 0
    assert asked[2].data == DataConfig()


def test_settings_come_after_all_other_options(asked: list[Recipe]) -> None:
    settings = ["--set", "data.max_length=256", "--set", "data.limit=9", "--set", "optim.steps=7"]
    assert told("--recipe", "smollm2-135m", *settings, "--data", "x.jsonl", "--steps", "5") == 0
    assert asked[0].data == DataConfig(source="x.jsonl", kind="gsm8k", max_length=256, limit=9)
    assert asked[0].optim.steps == 7


def test_a_kind_or_columns_of_several_sources_are_refused(
    asked: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (["--kind", "text"], ["--columns", "text=body"]):
        assert told("--recipe", "qwen3-4b", *option) == 2
        assert f"{option[0]}: the recipe has several sources" in capsys.readouterr().err
    assert told("--recipe", "qwen3-4b", "--set", "data.limit=3") == 2
    assert asked == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("budgets", []), ("budgets", [1.5]), ("budgets", 0.5), ("contracts", "cap"), ("problems", 0)),
        *(("calibration", -3), ("demand_rows", -1), ("max_think_tokens", 0), ("problems", True)),
    ],
)
def test_wrong_evaluation_settings_are_found_at_once(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.{name}"):
        Recipe.from_json({"evaluation": {name: value}})


def test_a_contract_that_there_is_not_is_found_at_once() -> None:
    with pytest.raises(ConfigError, match="contract 'caps': choose from cap, mean"):
        Recipe.from_json({"evaluation": {"contracts": ["caps"]}})
