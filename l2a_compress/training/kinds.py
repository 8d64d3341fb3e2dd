"""Turns a row of a source into an example, one function per kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from l2a_compress.errors import DataError
from l2a_compress.training.data_config import COLUMNS, DataConfig
from l2a_compress.training.examples import Example, Message, Style

__all__ = ["example_of", "resolve_columns"]

_DEFAULT_NAMES = {"gsm8k": {"prompt": "question"}}
_MARK = re.compile(r"<<([^<>]*)>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")

Values = Mapping[str, Any]  # one row under our own column names


def resolve_columns(config: DataConfig, found: Sequence[str]) -> dict[str, str]:
    """Maps our column names to the source's.

    Raises:
        DataError: A column that the kind needs, or one that the mapping names, is not in the source.
    """
    columns: dict[str, str] = {}
    for name in COLUMNS[config.kind]:
        ours = name.removeprefix("?")
        theirs = config.columns.get(ours, _DEFAULT_NAMES.get(config.kind, {}).get(ours, ours))
        if theirs in found:
            columns[ours] = theirs
        elif ours in config.columns or not name.startswith("?"):
            raise _missing(config, ours, theirs, found)
    if config.kind == "chat" and "messages" not in columns and not {"prompt", "response"} <= columns.keys():
        raise _missing(config, "messages", "messages (or prompt and response)", found)
    return columns


def _missing(config: DataConfig, ours: str, theirs: str, found: Sequence[str]) -> DataError:
    return DataError(
        f"{config.source}: column {theirs} is missing; found {', '.join(found) or 'no column'}. "
        f"Map it with columns, e.g. {ours}=<one of those>"
    )


def example_of(row: Values, columns: Mapping[str, str], config: DataConfig) -> Example | None:
    """Makes the example of a row; ``None`` for a blank row of a text file and a conversation whose last reply is empty.

    Raises:
        DataError: The row cannot be used; the message says why, the caller adds file and row.
    """
    values = {ours: row.get(theirs) for ours, theirs in columns.items()}
    return _MAKERS[config.kind](values, config.source)


def _gsm8k(values: Values, source: str) -> Example:
    prompt, solution = _text(values, "prompt"), _text(values, "answer")
    steps_text, mark, answer = solution.rpartition("####")
    answer = _THOUSANDS.sub("", answer.strip())
    if not mark or not answer:
        raise DataError("answer has no '#### <final answer>' at its end")
    lines = [line.strip() for line in steps_text.splitlines() if line.strip()]
    equations = [equation.strip() for equation in _MARK.findall(steps_text) if equation.strip()]
    traces: dict[Style, str] = {"long": _MARK.sub("", "\n".join(lines)), "none": ""}
    if equations:
        traces["short"] = "\n".join(equations)
    steps = len(equations) or len(lines)
    difficulty = "easy" if steps <= 2 else "medium" if steps <= 4 else "hard"
    meta: dict[str, str | int] = {"source": source, "steps": steps, "difficulty": difficulty}
    return Example(prompt=prompt, traces=traces, answer=answer, kind="reasoning", meta=meta)


def _reasoning(values: Values, source: str) -> Example:
    traces: dict[Style, str] = {"long": _untagged(_text(values, "trace"), "think"), "none": ""}
    if not _is_empty(values.get("short")):
        traces["short"] = _untagged(_text(values, "short"), "think")
    answer = _untagged(_text(values, "answer"), "answer")
    return Example(
        prompt=_text(values, "prompt"), traces=traces, answer=answer, kind="reasoning", meta={"source": source}
    )


def _chat(values: Values, source: str) -> Example | None:
    messages = _turns(values["messages"]) if values.get("messages") is not None else _single_turn(values)
    replies = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not replies or replies[0] == 0:
        raise DataError("a conversation needs an assistant reply that follows another message")
    if not messages[replies[-1]].content.strip():
        return None  # some instruction data have a few: one of them must not end a run
    return Example(
        prompt="\n".join(message.content for message in messages[: replies[0]]),
        traces={},
        answer=messages[replies[-1]].content,
        kind="chat",
        meta={"source": source, "turns": len(replies)},
        messages=tuple(messages[: replies[-1] + 1]),  # what follows the last reply has nothing to learn from
    )


def _single_turn(values: Values) -> list[Message]:
    asked = _text(values, "prompt")
    if not _is_empty(values.get("input")):
        asked = f"{asked}\n\n{_text(values, 'input')}"
    reply = "" if _is_empty(values.get("response")) else _text(values, "response")
    turns = [Message(role="user", content=asked), Message(role="assistant", content=reply)]
    if not _is_empty(values.get("system")):
        turns.insert(0, Message(role="system", content=_text(values, "system")))
    return turns


def _turns(value: object) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"messages must be a list of role and content, found {type(value).__name__}")
    turns = []
    for number, turn in enumerate(value, start=1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"message {number} needs a role and a content of text, found {turn!r}"[:200])
        turns.append(Message(role=role, content=content))
    return turns


def _plain(values: Values, source: str) -> Example | None:
    text = values.get("text")
    if text is None or (isinstance(text, str) and not text.strip()):
        return None  # paragraphs of a text file are often separated by blank lines
    return Example(prompt=_text(values, "text"), traces={}, answer="", kind="text", meta={"source": source})


def _is_empty(value: object) -> bool:
    """Whether a cell has nothing in it, as files say it: no value, blank text, or in tables of numbers NaN."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _text(values: Values, name: str) -> str:
    value = values.get(name)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} must be text with something in it, found {value!r}")
    return value.strip() if name != "text" else value


def _untagged(text: str, tag: str) -> str:
    """Takes away the tags that some data sets already put around a trace or an answer."""
    return text.removeprefix(f"<{tag}>").removesuffix(f"</{tag}>").strip()


_MAKERS: Mapping[str, Callable[[Values, str], Example | None]] = {
    "gsm8k": _gsm8k,
    "reasoning": _reasoning,
    "chat": _chat,
    "text": _plain,
}
