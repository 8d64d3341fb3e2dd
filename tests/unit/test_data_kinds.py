"""Rows to examples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from l2a_compress.errors import DataError
from l2a_compress.training.data import load_examples
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.examples import Example, Message
from l2a_compress.training.kinds import example_of, resolve_columns
from toy_data import TINY_GSM8K, gsm8k_file, write_jsonl

ALL = {"heldout_share": 0.0, "calibration_share": 0.0}


def make(kind: Any, row: dict[str, object], **columns: str) -> Example | None:
    config = DataConfig(source="rows.jsonl", kind=kind, columns=columns)
    return example_of(row, resolve_columns(config, list(row)), config)


def test_gsm8k_gives_three_lengths_of_one_solution() -> None:
    examples = load_examples(DataConfig(source=str(TINY_GSM8K), kind="gsm8k", **ALL))
    assert len(examples) == 6
    first = examples[0]
    assert first.traces == {
        "long": "Mina has 3 * 4 = 12 pears.\nAfter eating 2 there are 12 - 2 = 10 pears left.",
        "short": "3*4=12\n12-2=10",
        "none": "",
    }
    assert (first.answer, first.kind, first.names_style) == ("10", "reasoning", False)
    assert first.meta == {"source": str(TINY_GSM8K), "steps": 2, "difficulty": "easy"}
    assert examples[2].answer == "2000"  # written 2,000
    assert "short" not in examples[4].traces  # a solution without calculator marks
    assert examples[5].meta["difficulty"] == "hard"


@pytest.mark.data
def test_every_gsm8k_training_problem_can_be_used() -> None:
    splits = [load_examples(DataConfig(source=str(gsm8k_file()), kind="gsm8k"), name) for name in ("train", "heldout")]
    assert [len(split) for split in splits] == [6778, 453]
    for example in splits[0]:
        assert "<<" not in example.traces["long"]
        assert "####" not in example.traces["long"]
        assert example.answer.lstrip("-").replace(".", "", 1).isdigit()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": "no marks"}, "no '#### <final answer>'"),
        ({"question": "q", "answer": "a\n#### "}, "no '#### <final answer>'"),
        ({"question": None, "answer": "#### 1"}, "prompt must be text with something in it, found None"),
        ({"question": "  ", "answer": "#### 1"}, "prompt must be text"),
        ({"question": ["q"], "answer": "#### 1"}, "prompt must be text"),
    ],
)
def test_a_bad_gsm8k_row_says_why(row: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make("gsm8k", row)


def test_reasoning_columns_are_mapped_and_untagged() -> None:
    row = {"q": "two and two?", "cot": "<think> 2 + 2 = 4 </think>", "brief": "4", "a": 4.0}
    example = make("reasoning", row, prompt="q", trace="cot", short="brief", answer="a")
    assert example is not None
    assert example.traces == {"long": "2 + 2 = 4", "short": "4", "none": ""}
    assert example.answer == "4"


@pytest.mark.parametrize(("value", "text"), [(1234567.0, "1234567"), (0.25, "0.25"), (12, "12"), ("x", "x")])
def test_a_number_is_an_answer(value: object, text: str) -> None:
    example = make("reasoning", {"prompt": "p", "trace": "t", "answer": value})
    assert example is not None
    assert example.answer == text


@pytest.mark.parametrize("value", [float("nan"), None, True, ""])
def test_an_empty_answer_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="answer must be text"):
        make("reasoning", {"prompt": "p", "trace": "t", "answer": value})


def test_reasoning_may_lack_the_short_trace() -> None:
    example = make("reasoning", {"prompt": "p", "trace": "t", "answer": "a"})
    assert example is not None
    assert set(example.traces) == {"long", "none"}


def test_a_conversation_ends_with_its_last_reply() -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "?"), ("assistant", "!")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("user", "bye")]]
    example = make("chat", {"messages": messages})
    assert example is not None
    assert example.messages == tuple(Message(role=role, content=content) for role, content in turns)
    assert (example.prompt, example.answer, example.meta["turns"]) == ("Be kind.\nHi", "!", 2)


def test_an_instruction_with_input_is_one_turn() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "system": None}
    example = make("chat", row, prompt="instruction", response="output")
    assert example is not None
    assert [message.content for message in example.messages] == ["Translate.\n\nHaus", "house"]


@pytest.mark.parametrize("reply", ["", " \n", None, float("nan")])
def test_a_conversation_without_a_last_reply_is_skipped(reply: object) -> None:
    assert make("chat", {"prompt": "Say nothing.", "response": reply}) is None
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]
    assert make("chat", {"messages": turns}) is None


def test_a_reply_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="response must be text"):
        make("chat", {"prompt": "Say nothing.", "response": ["no"]})


def test_skipped_conversations_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": f"Say {i}.", "output": "" if i % 3 == 0 else str(i)} for i in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(source=str(path), kind="chat", columns={"prompt": "instruction", "response": "output"}, **ALL)
    with caplog.at_level(logging.WARNING):
        assert len(load_examples(config)) == 6
        for split in ("calibration", "heldout"):  # of the same run
            with pytest.raises(DataError, match=f"the {split} split is empty"):
                load_examples(config, split)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: skipped 3 of 9 rows, whose reply is empty"]


def test_conversations_without_any_reply_are_an_error_of_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {i}.", "response": ""} for i in range(9)])
    with pytest.raises(DataError, match="all 9 replies are empty; see"):
        load_examples(DataConfig(source=str(path), kind="chat", **ALL))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "hi"}], "needs an assistant reply"),
        ([{"role": "assistant", "content": "hi"}], "that follows another message"),
        ("hi", "messages must be a list"),
        ([{"role": "user", "content": None}], "message 1 needs a role and a content"),
        (["hi"], "message 1 needs"),
    ],
)
def test_a_bad_conversation_says_why(messages: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make("chat", {"messages": messages})


@pytest.mark.parametrize("blank", ["", " ", "\n", None, float("nan")])
def test_blank_cells_are_cells_that_are_not_there(blank: object) -> None:
    row = {"prompt": "Say one.", "response": "one", "input": blank, "system": blank}
    assert make("chat", row) == make("chat", {"prompt": "Say one.", "response": "one"})
    row = {"prompt": "1+1?", "trace": "one and one", "answer": "2", "short": blank}
    assert make("reasoning", row) == make("reasoning", {"prompt": "1+1?", "trace": "one and one", "answer": "2"})


def test_blank_rows_of_a_text_are_skipped_and_the_rest_is_kept_as_it_is() -> None:
    assert make("text", {"text": " \n"}) is None
    example = make("text", {"text": " a line "})
    assert example is not None
    assert (example.prompt, example.kind, example.traces) == (" a line ", "text", {})


@pytest.mark.parametrize(
    ("kind", "columns", "found", "words"),
    [
        ("gsm8k", {}, ["answer", "q"], "column question is missing; found answer, q. .*prompt=<one of those>"),
        ("gsm8k", {"prompt": "qq"}, ["answer", "q"], "column qq is missing"),
        ("reasoning", {"short": "brief"}, ["prompt", "trace", "answer"], "column brief is missing"),
        ("chat", {}, ["prompt"], r"messages \(or prompt and response\) is missing; found prompt"),
        ("text", {}, [], "found no column"),
    ],
)
def test_a_missing_column_says_what_was_found(kind: Any, columns: dict[str, str], found: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        resolve_columns(DataConfig(source="rows.jsonl", kind=kind, columns=columns), found)


def test_a_bad_row_names_file_and_row(tmp_path: Any) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": ""}]
    )
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: answer must be text"):
        load_examples(DataConfig(source=str(path), kind="gsm8k", **ALL))
