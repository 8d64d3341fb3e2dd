"""Conversations: the loss is on the replies, with and without a chat template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from l2a_compress.errors import DataError
from l2a_compress.training.encode import IGNORE, encode, encode_prompt
from l2a_compress.training.examples import Encoded, Example, Message, UnfitError
from toy_data import CHATML, new_bpe

TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "Because.")]
# Drops what earlier replies thought, as the templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('|')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(*turns: tuple[str, str]) -> Example:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(prompt="p", traces={}, answer=turns[-1][1], kind="chat", messages=messages)


def tokenizer_with(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = new_bpe()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    return tokenizer


def trained_texts(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in encoded["labels"]:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_the_template_is_kept_and_every_reply_is_trained() -> None:
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    encoded = encode(conversation(*TURNS), tokenizer)
    rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in TURNS], tokenize=False)
    assert tokenizer.decode(encoded["input_ids"]) == rendered.rstrip("\n")
    assert trained_texts(encoded, tokenizer) == ["Hello<|im_end|>\n", "Because.<|im_end|>"]
    prompt = tokenizer.decode(encode_prompt(conversation(*TURNS), tokenizer))
    assert prompt == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (encoded["think_start"], encoded["think_end"]) == (0, 0)


def test_an_end_token_that_the_template_lacks_is_added_once() -> None:
    encoded = encode(conversation(*TURNS), tokenizer_with(CHATML))
    tokenizer = tokenizer_with(CHATML)
    assert tokenizer.decode(encoded["input_ids"]).endswith("Because.<|im_end|>\n</s>")
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_reply_that_the_template_rewrites_is_context_only() -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    example = conversation(("user", "a"), ("assistant", "hm|one"), ("user", "b"), ("assistant", "hm|two"))
    encoded = encode(example, tokenizer)
    assert trained_texts(encoded, tokenizer) == ["hm|two</s>"]
    assert tokenizer.decode(encoded["input_ids"]) == "[user]a</s>[assistant]one</s>[user]b</s>[assistant]hm|two</s>"


def test_without_a_template_turns_are_labelled_lines() -> None:
    tokenizer = tokenizer_with(None)
    encoded = encode(conversation(*TURNS), tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<s>System: Be kind.\nUser: Hi\nAssistant: Hello</s>\nUser: Why?\nAssistant: Because.</s>"
    )
    assert trained_texts(encoded, tokenizer) == [" Hello</s>", " Because.</s>"]
    assert tokenizer.decode(encode_prompt(conversation(*TURNS), tokenizer)).endswith("User: Hi\nAssistant:")


@settings(max_examples=40)
@given(st.sampled_from([CHATML, None]), st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=2))
def test_the_prompt_alone_is_the_start_of_the_whole(template: str | None, contents: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    tokenizer = tokenizer_with(template)
    encoded = encode(conversation(*zip(roles, contents, strict=True)), tokenizer, max_length=10_000)
    alone = encode(conversation((roles[0], contents[0]), (roles[1], "other")), tokenizer, max_length=10_000)
    length = encoded["prompt_length"]
    assert 0 < length == alone["prompt_length"]
    assert encoded["input_ids"][:length] == alone["input_ids"][:length]
    assert set(encoded["labels"][:length]) == {IGNORE}
    assert encoded["labels"][-1] == encoded["input_ids"][-1] == tokenizer.eos_token_id


def test_a_long_conversation_is_cut_at_its_end() -> None:
    tokenizer = tokenizer_with(CHATML)
    whole = encode(conversation(*TURNS), tokenizer)
    length = whole["prompt_length"] + 3
    cut = encode(conversation(*TURNS), tokenizer, max_length=length)
    assert cut["input_ids"] == whole["input_ids"][:length]
    assert cut["labels"] == whole["labels"][:length]
    with pytest.raises(UnfitError, match=f"first reply starts at token {length - 3}"):
        encode(conversation(*TURNS), tokenizer, max_length=length - 3)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "refuses a conversation: no system role"),
        ("{{ messages | length }}{{ messages[-1].content }}", "does not show where the last reply begins"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_error(template: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode(conversation(*TURNS), tokenizer_with(template))
