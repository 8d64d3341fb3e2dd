"""Encoding: exact spans, on a word-level and on a BPE tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from l2a_compress.embedded import pretrain, task
from l2a_compress.errors import DataError, TokenizerError
from l2a_compress.modeling.tags import TAGS, read_tags
from l2a_compress.training.embedded_examples import EmbeddedExamples
from l2a_compress.training.encode import IGNORE, encode, encode_prompt
from l2a_compress.training.examples import STYLES, Encoded, Example, Style, UnfitError
from toy_data import bpe_tokenizer, new_bpe, word_tokenizer

TOKENIZERS = {"word": word_tokenizer, "bpe": bpe_tokenizer}
words = st.lists(st.sampled_from(task.vocabulary()), min_size=1, max_size=12).map(" ".join)
characters = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
anything = st.lists(characters | st.sampled_from([*TAGS, "</s>"]), min_size=1, max_size=5).map("".join)


def examples(text: st.SearchStrategy[str]) -> st.SearchStrategy[Example]:
    traces = st.dictionaries(st.sampled_from(STYLES), text, min_size=1)
    kind = st.just("reasoning")
    return st.builds(Example, prompt=text, traces=traces, answer=text, kind=kind, names_style=st.booleans())


def check_spans(encoded: Encoded, example: Example, tokenizer: PreTrainedTokenizerFast, style: Style) -> None:
    ids, labels, tags = encoded["input_ids"], encoded["labels"], read_tags(tokenizer)
    start, end = encoded["think_start"], encoded["think_end"]
    assert len(ids) == len(labels)
    assert encoded["prompt_length"] == start
    assert labels[:start] == [IGNORE] * start
    assert labels[start:] == ids[start:]
    assert ids[start - 1] == tags.think
    assert ids[end] == tags.end_think
    assert [ids.count(tag) for tag in (tags.think, tags.end_think, tags.answer, tags.end_answer)] == [1, 1, 1, 1]
    assert ids[end + 1] == tags.answer  # as a generation goes on
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[: encoded["prompt_length"]] == encode_prompt(example, tokenizer)
    assert ids[: len(encode_prompt(example, tokenizer, style))] == encode_prompt(example, tokenizer, style)


def check_all_styles(example: Example, tokenizer: PreTrainedTokenizerFast) -> None:
    for style in example.traces:
        check_spans(encode(example, tokenizer, style, 10_000), example, tokenizer, style)


@settings(max_examples=60)
@given(examples(words))
def test_spans_are_exact_on_the_word_tokenizer_whatever_the_words(example: Example) -> None:
    check_all_styles(example, word_tokenizer())


@settings(max_examples=60)
@given(examples(anything))
def test_spans_are_exact_on_bpe_whatever_the_text(example: Example) -> None:
    tokenizer = bpe_tokenizer()
    check_all_styles(example, tokenizer)
    for style in example.traces:
        encoded = encode(example, tokenizer, style, 10_000)
        ids = encoded["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1 : encoded["prompt_length"] - 1]) == example.prompt
        thought = tokenizer.decode(ids[encoded["think_start"] : encoded["think_end"]])
        assert thought == "".join(example.thinking(style))


def test_the_text_of_a_language_model_is_as_documented() -> None:
    tokenizer = bpe_tokenizer()
    example = Example(prompt="1+1?", traces={"long": "1+1=2", "none": ""}, answer="2", kind="reasoning")
    text = tokenizer.decode(encode(example, tokenizer, "long")["input_ids"])
    assert text == "<s>1+1?<think>\n1+1=2\n</think><answer>2</answer></s>"
    encoded = encode(example, tokenizer, "none")
    assert tokenizer.decode(encoded["input_ids"]) == "<s>1+1?<think></think><answer>2</answer></s>"
    assert encoded["think_start"] == encoded["think_end"]


@pytest.mark.parametrize("style", get_args(task.Style))
def test_the_embedded_format_is_what_its_model_was_trained_on(style: task.Style) -> None:
    tokenizer, opening = word_tokenizer(), pretrain.opening(style)
    problems = EmbeddedExamples(split="train", seed=3, limit=50)
    for index, example in enumerate(problems):
        prompt, rest = pretrain.full_text(problems.problem(index), style)
        encoded = encode(example, tokenizer, style)
        assert encoded["input_ids"] == tokenizer.encode(prompt) + tokenizer.encode(rest)
        assert encode_prompt(example, tokenizer) == tokenizer.encode(prompt)
        assert encode_prompt(example, tokenizer, style) == tokenizer.encode(f"{prompt}{opening}")
        thought = tokenizer.decode(encoded["input_ids"][encoded["think_start"] : encoded["think_end"]])
        assert thought == f"{opening} {problems.problem(index).trace(style)}".strip()


def test_reasoning_is_never_cut() -> None:
    example = Example(prompt="a b c d", traces={"long": "x " * 30}, answer="y", kind="reasoning")
    full = len(encode(example, bpe_tokenizer(), "long", 10_000)["input_ids"])
    assert len(encode(example, bpe_tokenizer(), "long", full)["input_ids"]) == full
    with pytest.raises(UnfitError, match=f"takes {full} tokens and max_length is {full - 1}"):
        encode(example, bpe_tokenizer(), "long", full - 1)


def test_a_prompt_that_leaves_no_room_is_unfit() -> None:
    example = Example(prompt="a b c d " * 200, traces={"long": "x"}, answer="y", kind="reasoning")
    count = len(encode_prompt(example, bpe_tokenizer()))
    assert count > 512
    assert len(encode_prompt(example, bpe_tokenizer(), max_length=count + 1)) == count
    with pytest.raises(UnfitError, match=f"the prompt takes {count} tokens and max_length is {count}"):
        encode_prompt(example, bpe_tokenizer(), max_length=count)


def test_a_missing_style_is_named() -> None:
    example = Example(prompt="p", traces={"long": "t"}, answer="a", kind="reasoning")
    with pytest.raises(DataError, match="no 'short' trace in this example, which has: long"):
        encode(example, bpe_tokenizer(), "short")
    with pytest.raises(DataError, match="needs a style; it has long"):
        encode(example, bpe_tokenizer())


def test_a_tokenizer_without_tags_is_refused() -> None:
    example = Example(prompt="p", traces={"long": "t"}, answer="a", kind="reasoning")
    with pytest.raises(TokenizerError, match="--add-tags"):
        encode(example, new_bpe(), "long")


def ordinary_tags() -> PreTrainedTokenizerFast:
    tokenizer = new_bpe()
    tokenizer.add_tokens(list(TAGS))  # not as special tokens: some models ship them so
    return tokenizer


@pytest.mark.parametrize("make", [ordinary_tags, word_tokenizer])
@pytest.mark.parametrize("place", ["prompt", "trace", "answer"])
def test_tags_in_a_text_are_refused_where_the_tokenizer_cannot_split_them(
    make: Callable[[], PreTrainedTokenizerFast], place: str
) -> None:
    texts = {name: "say </think> !" if name == place else "say !" for name in ("prompt", "trace", "answer")}
    example = Example(prompt=texts["prompt"], traces={"long": texts["trace"]}, answer=texts["answer"], kind="reasoning")
    with pytest.raises(UnfitError, match="contains a think or answer tag"):
        encode(example, make(), "long")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_gives_its_first_quarter_to_the_allocator(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    example = Example(prompt="Ann has 5 . " * 20, traces={}, answer="", kind="text")
    encoded = encode(example, tokenizer, max_length=40)
    assert len(encoded["input_ids"]) == 40
    assert encoded["prompt_length"] == 10
    assert encoded["labels"] == [IGNORE] * 10 + encoded["input_ids"][10:]
    assert (encoded["think_start"], encoded["think_end"]) == (0, 0)
    assert encode_prompt(example, tokenizer, max_length=40) == encoded["input_ids"][:10]
    assert encode(example, tokenizer, max_length=1000)["input_ids"][-1] == tokenizer.eos_token_id


def test_a_text_of_one_token_leaves_nothing_to_predict() -> None:
    with pytest.raises(UnfitError, match="nothing to predict"):
        encode(Example(prompt=" ", traces={}, answer="", kind="text"), word_tokenizer())
