"""DataConfig and MixtureConfig: validation and exact round trips."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress.errors import ConfigError
from l2a_compress.training.data_config import (
    COLUMNS,
    KINDS,
    DataConfig,
    MixtureConfig,
    data_from_json,
    parse_columns,
)

TEXT = st.text(st.characters(codec="utf-8"), min_size=1)  # no lone surrogates: no file could hold them


@st.composite
def configs(draw: st.DrawFn) -> DataConfig:
    kind = draw(st.sampled_from(KINDS))
    names = [name.removeprefix("?") for name in COLUMNS[kind]]
    heldout = draw(st.floats(0, 1))
    limit = draw(st.none() | st.integers(1, 10**9))
    return DataConfig(
        source="embedded" if kind == "embedded" else draw(TEXT.filter(lambda name: name != "embedded")),
        kind=kind,
        columns=draw(st.dictionaries(st.sampled_from(names), TEXT)) if names else {},
        split=draw(st.none() | TEXT),
        subset=draw(st.none() | TEXT),
        weight=draw(st.floats(1e-300, 1e300)),
        limit=limit,
        max_length=draw(st.integers(8, 10**6)),
        streaming=limit is not None and draw(st.booleans()),
        heldout_share=heldout,
        calibration_share=draw(st.floats(0, 1 - heldout)),
    )


@given(configs())
def test_a_config_survives_json_exactly(config: DataConfig) -> None:
    assert DataConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(st.lists(configs(), min_size=1, max_size=3))
def test_a_mixture_survives_json_exactly(sources: list[DataConfig]) -> None:
    mixture = MixtureConfig(sources=tuple(sources))
    assert MixtureConfig.from_json(json.loads(json.dumps(mixture.to_json()))) == mixture
    assert data_from_json(mixture.to_json()["sources"]) == mixture


def test_a_recipe_may_give_one_table() -> None:
    assert data_from_json({"limit": 5}) == DataConfig(limit=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": 0}, "data.weight must be finite and above 0, found 0"),
        ({"weight": -1.0}, "above 0, found -1.0"),
        ({"weight": float("nan")}, "data.weight"),
        ({"weight": True}, "data.weight"),
        ({"kind": "poem"}, "data.kind must be one of embedded, gsm8k, reasoning, chat, text, found 'poem'"),
        ({"kind": "gsm8k"}, "does not go with data.source 'embedded'"),
        ({"source": "a.jsonl"}, "does not go with data.source 'a.jsonl'"),
        ({"source": ""}, "data.source"),
        ({"limit": 0}, "data.limit must be at least 1, found 0"),
        ({"max_length": 7}, "data.max_length"),
        ({"streaming": True}, "needs data.limit"),
        ({"streaming": "yes"}, "data.streaming must be true or false"),
        ({"heldout_share": 1.5}, r"data.heldout_share must be in \[0, 1\], found 1.5"),
        ({"calibration_share": float("nan")}, "data.calibration_share"),
        ({"heldout_share": 0.7, "calibration_share": 0.4}, "must be at most 1, found 0.7 and 0.4"),
        ({"columns": {"prompt": "q"}}, "kind 'embedded' has no column 'prompt'; its columns are none"),
        ({"columns": ["prompt"]}, "data.columns must map"),
        ({"columns": {"prompt": 3}, "source": "a.csv", "kind": "gsm8k"}, "data.columns.prompt"),
        ({"split": ""}, "data.split"),
        ({"colums": {}}, "unknown key 'colums'"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataConfig.from_json(change)


@pytest.mark.parametrize(
    ("data", "words"),
    [([], "at least one source"), ({"sources": "a"}, "must be a list"), ({"sources": [3]}, "expected a JSON object")],
)
def test_a_bad_mixture_is_named(data: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data_from_json(data)


def test_columns_as_flags_give_them() -> None:
    assert parse_columns("prompt=question, answer = final answer,") == {"prompt": "question", "answer": "final answer"}
    assert parse_columns("") == {}


@pytest.mark.parametrize(("text", "words"), [("prompt", "name=column"), ("=a", "name=column"), ("a=b,a=c", "twice")])
def test_bad_flags_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_columns(text)


def test_a_config_takes_columns_as_flags_give_them() -> None:
    config = DataConfig.from_json({"source": "a.jsonl", "kind": "gsm8k", "columns": "prompt=q"})
    assert config.columns == {"prompt": "q"}


def test_a_config_does_not_share_its_columns_with_the_caller() -> None:
    columns = {"prompt": "q"}
    config = DataConfig(source="a.jsonl", kind="gsm8k", columns=columns)
    columns["answer"] = "a"
    assert config.columns == {"prompt": "q"}
