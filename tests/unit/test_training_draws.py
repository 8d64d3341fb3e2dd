"""What is drawn for a sample, how it anneals, and the samples made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2a_compress.errors import ConfigError, DataError
from l2a_compress.training.draws import Annealing, DrawConfig, draw, gumbel_noise
from l2a_compress.training.embedded_examples import EmbeddedExamples
from l2a_compress.training.encode import encode
from l2a_compress.training.examples import Example
from l2a_compress.training.mixture import Mixture
from l2a_compress.training.samples import SampleCollator, Samples
from toy_data import word_tokenizer


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    config = DrawConfig()
    first = [draw(config, 5, index) for index in range(50)]
    np.random.default_rng(0).random(10)
    torch.manual_seed(9)
    assert [draw(config, 5, index) for index in reversed(range(50))] == first[::-1]
    assert len({row.think for row in first}) > 20
    assert [draw(config, 6, index) for index in range(50)] != first


def test_the_shares_are_those_of_the_sandwich() -> None:
    config = DrawConfig(
        minimum=0.4,
        dense_share=0.2,
        minimum_share=0.1,
        switch_share=0.3,
        full_think_share=0.25,
        brief_below=0.3,
        noised_share=0.2,
    )
    count = 20_000
    rows = [draw(config, 0, index) for index in range(count)]
    kinds = Counter("dense" if r.compute == 1 else "least" if r.compute == 0.4 else "between" for r in rows)
    assert kinds["dense"] / count == pytest.approx(0.2, abs=0.01)
    assert kinds["least"] / count == pytest.approx(0.1, abs=0.01)
    between = np.array([r.compute for r in rows if 0.4 < r.compute < 1])
    assert between.mean() == pytest.approx(0.7, abs=0.01)
    assert between.std() == pytest.approx(0.6 / 12**0.5, abs=0.01)
    assert sum(r.mean for r in rows) / count == pytest.approx(0.5, abs=0.01)
    assert sum(r.think == 1 for r in rows) / count == pytest.approx(0.25, abs=0.01)
    assert min(r.think for r in rows) >= 0.1
    switched = [r for r in rows if r.switch < 1]
    assert len(switched) / count == pytest.approx(0.3, abs=0.01)
    assert all(0.2 <= r.switch <= 0.9 for r in switched)
    assert all(r.after == r.compute for r in rows if r.switch == 1)
    lost = [r.lost for r in rows if r.lost]
    assert len(lost) / count == pytest.approx(0.2, abs=0.01)
    assert 0 < min(lost) < 0.01 < 0.29 < max(lost) < 0.3
    assert {r.style for r in rows if r.think < config.brief_below} == {"brief"}
    assert {r.style for r in rows if config.brief_below <= r.think < config.condensed_below} == {"short"}
    assert {r.style for r in rows if r.think >= config.condensed_below} == {"long"}


@pytest.mark.parametrize(("contract", "means"), [("cap", {False}), ("mean", {True}), ("both", {False, True})])
def test_the_contract_of_a_sample(contract: str, means: set[bool]) -> None:
    assert {draw(DrawConfig(contract=contract), 0, index).mean for index in range(100)} == means


def test_where_a_budget_changes_says_nothing_of_what_it_becomes() -> None:
    rows = [draw(DrawConfig(switch_share=1.0, dense_share=0.0, minimum_share=0.0), 0, index) for index in range(2000)]
    correlation = np.corrcoef([row.after for row in rows], [row.switch for row in rows])[0, 1]
    assert abs(correlation) < 0.1


def test_noise_is_gumbel_and_repeats() -> None:
    noise = gumbel_noise(1, 2, (1000, 100))
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.std() == pytest.approx(np.pi / 6**0.5, abs=0.02)
    assert np.array_equal(gumbel_noise(1, 2, (1000, 100)), noise)
    assert not np.array_equal(gumbel_noise(1, 3, (1000, 100)), noise)


@pytest.mark.parametrize(
    "values",
    [
        {"contract": "max"},
        {"minimum": 0},
        {"minimum": 1.1},
        {"dense_share": 0.6, "minimum_share": 0.5},
        {"switch_share": -0.1},
    ],
)
def test_wrong_draw_settings(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        DrawConfig(**values)  # type: ignore[arg-type]


def test_annealing() -> None:
    plan = Annealing(
        temperature_start=2.0, temperature_end=0.5, noise_start=3.0, noise_end=1.0, explore=0.2, settle=0.6
    )
    assert [plan.temperature(at) for at in (-1, 0, 0.5, 1, 2)] == pytest.approx([2, 2, 1, 0.5, 0.5])
    assert [plan.noise(at) for at in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([3, 3, 2, 1, 1])
    sudden = replace(plan, explore=0.5, settle=0.5)
    assert [sudden.noise(at) for at in (0.5, 0.51)] == [3, 1]


@pytest.mark.parametrize(
    "values",
    [
        *({"explore": 0.9}, {"settle": 1.1}, {"temperature_end": 0}, {"noise_end": -1}),
        *({"search_rows": -1}, {"search_rows": 8, "explore": 0.0}, {"search_trials": 1}, {"trial_steps": 0}),
    ],
)
def test_wrong_annealing(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="annealing"):
        Annealing(**values)


def example(number: int, *, words: int = 1) -> Example:
    """An example whose answer tells which one it is; ``words`` more make it long."""
    trace = " ".join(["+"] * words)
    return Example(
        prompt="how many ?",
        traces={"long": f"{trace} =", "short": "="},
        answer=str(number),
        kind="reasoning",
        meta={"source": "test"},
    )


def samples(examples: list[Example], count: int, **changes: object) -> Samples:
    settings = {"count": count, "seed": 0, "max_length": lambda _: 32, "think_reference": 10} | changes
    return Samples(examples, word_tokenizer(), DrawConfig(full_think_share=1.0), **settings)  # type: ignore[arg-type]


def answer_of(sample: dict[str, list[int]]) -> str:
    text: str = word_tokenizer().decode(sample["input_ids"])
    return text.split("<answer>")[1].split("</answer>")[0].strip()


@pytest.mark.parametrize("count", [8, 4, 24, 7])
def test_an_over_long_example_is_replaced_by_one_that_fits(count: int) -> None:
    examples = [example(number, words=50 if number in (2, 3) else 1) for number in range(8)]
    found = samples(examples, count)
    answers = [answer_of(found[index]) for index in range(count)]
    assert found.unfit == len({2, 3} & {*range(count)})  # each is counted once
    assert not {"2", "3"} & {*answers}
    assert all(answer == str(index % 8) for index, answer in enumerate(answers) if index % 8 not in (2, 3))
    assert [answer_of(found[index]) for index in range(count)] == answers
    assert found.unfit <= 2


def test_an_over_long_example_is_replaced_by_one_of_its_own_source() -> None:
    some, other = [example(0), *(example(number, words=50) for number in range(1, 5))], [*map(example, range(5, 10))]
    mixture = Mixture([some, other], [1.0, 1.0], seed=0, length=60)
    found = samples(mixture, 60)  # type: ignore[arg-type]
    assert [int(answer_of(found[index])) >= 5 for index in range(60)] == [
        mixture.part_of(index) == 1 for index in range(60)
    ]
    drawn = {mixture.origin_of(index) for index in range(60)}
    assert found.unfit == len({number for part, number in drawn if part == 0 and number > 0})


def test_only_over_long_examples_are_an_error() -> None:
    with pytest.raises(DataError, match=r"^3 examples in a row cannot be used: .* max_length is 32; raise"):
        samples([example(number, words=50) for number in range(3)], 4)[0]


def test_a_sample_shows_the_trace_its_think_share_asks_for() -> None:
    config = DrawConfig(full_think_share=0.3, condensed_below=0.6, brief_below=0.3)
    found = Samples(
        EmbeddedExamples(split="train", seed=0, subset="easy"),
        word_tokenizer(),
        config,
        count=60,
        seed=1,
        max_length=lambda _: 256,
        think_reference=100,
    )
    limits = set()
    for index in range(60):
        sample, drawn = found[index], draw(config, 1, index)
        style = drawn.style
        assert sample["input_ids"] == encode(found.examples[index], word_tokenizer(), style, 256)["input_ids"]
        expected = len(sample["input_ids"]) if drawn.think == 1 else round(drawn.think * 100)
        assert sample["think_limit"] == expected
        assert sample["index"] == index
        limits.add(style)
    assert limits == {"brief", "short", "long"}


def test_a_noised_prompt_loses_tokens_and_nothing_else_changes() -> None:
    examples, tokenizer = EmbeddedExamples(split="train", seed=0, subset="easy"), word_tokenizer()
    settings = {"count": 80, "seed": 1, "max_length": lambda _: 256, "think_reference": 100}
    whole = Samples(examples, tokenizer, DrawConfig(), **settings)  # type: ignore[arg-type]
    noised = Samples(examples, tokenizer, DrawConfig(noised_share=0.5), **settings)  # type: ignore[arg-type]
    shares = []
    for index in range(80):
        full, sample = whole[index], noised[index]
        assert sample == noised[index]
        if not sample["lost"]:
            assert sample == full
            continue
        count, gone = full["prompt_length"], full["prompt_length"] - sample["prompt_length"]
        before, prompt = full["input_ids"][:count], sample["input_ids"][: count - gone]
        left = iter(before)
        assert all(token in left for token in prompt)  # in their order
        assert (prompt[0], prompt[-1]) == (before[0], before[-1])
        assert sample["input_ids"][count - gone :] == full["input_ids"][count:]
        assert sample["labels"] == full["labels"][gone:]
        assert (sample["think_start"], sample["think_end"]) == (full["think_start"] - gone, full["think_end"] - gone)
        shares.append((gone / (count - 2), sample["lost"]))
    assert 25 < len(shares) < 55
    gone_share, chance = np.mean(shares, axis=0)
    assert gone_share == pytest.approx(chance, rel=0.2)
    batch = SampleCollator(tokenizer)([noised[index] for index in range(4)])["batch"]
    assert batch["lost"].tolist() == pytest.approx([noised[index]["lost"] for index in range(4)])


def test_the_collator_stacks_what_was_drawn() -> None:
    found = samples([example(number) for number in range(4)], 4)
    found.teacher = lambda encoded: (
        torch.ones(len(encoded["input_ids"]), 2),
        torch.zeros(len(encoded["input_ids"]), 2),
    )
    rows = [found[index] for index in (2, 0, 3)]
    batch = SampleCollator(word_tokenizer())(rows)["batch"]
    assert batch["index"].tolist() == [2, 0, 3]
    assert batch["compute"].tolist() == pytest.approx([row["compute"] for row in rows])
    assert batch["mean"].tolist() == [int(row["mean"]) for row in rows]
    width = batch["input_ids"].shape[1]
    assert batch["teacher_values"].shape == (3, width, 2)
    for row, values in zip(rows, batch["teacher_values"], strict=True):
        assert values.sum() == 2 * len(row["input_ids"])
