"""Conversations to token pieces, each known to be trained on (a reply) or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2a_compress.errors import DataError
from l2a_compress.training.examples import Message, UnfitError
from l2a_compress.training.pieces import begin_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_pieces"]

Piece = tuple[list[int], bool]


def chat_pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Token ids of a conversation in order; true where they belong to an assistant reply that is trained on.

    Uses the tokenizer's chat template where there is one, else lines of ``User: ...`` and ``Assistant: ...``. The last
    piece is the last reply and ends with the tokenizer's end token.

    Raises:
        UnfitError: The template refuses the conversation.
        DataError: It does not show where the last reply begins.
    """
    pieces = _templated(messages, tokenizer) if tokenizer.chat_template else _plain(messages, tokenizer)
    return [*pieces[:-1], (_ended(pieces[-1][0], tokenizer.eos_token_id), True)]


def _templated(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    full = _render(messages, tokenizer, reply_follows=False)
    texts: list[str] = []
    trained: list[bool] = []
    done = 0
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:number], tokenizer, reply_follows=True)
        after = _render(messages[: number + 1], tokenizer, reply_follows=False)
        # Some templates write an earlier reply otherwise once another turn follows (they drop its reasoning). Where a
        # reply begins is then not known, and it is left as context.
        if full.startswith(before) and full.startswith(after) and done <= len(before) < len(after):
            texts += [full[done : len(before)], full[len(before) : len(after)]]
            trained += [False, True]
            done = len(after)
    if done < len(full):
        raise DataError("the chat template does not show where the last reply begins; remove it or use another one")
    return list(zip(token_ids(tokenizer, texts, allow_special=True), trained, strict=True))


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, reply_follows: bool) -> str:
    from jinja2.exceptions import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply_follows))
    except TemplateError as error:
        raise UnfitError(f"the tokenizer's chat template refuses a conversation: {error}") from error


def _plain(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    texts: list[str] = []
    trained: list[bool] = []
    for message in messages:
        is_reply = message.role == "assistant"
        start = "\n" if texts else ""
        label = f"{start}{message.role.capitalize()}:"
        texts += [label, f" {message.content}"] if is_reply else [f"{label} {message.content}"]
        trained += [False, True] if is_reply else [False]
    pieces = list(zip(token_ids(tokenizer, texts), trained, strict=True))
    pieces = [(_ended(ids, tokenizer.eos_token_id) if reply else ids, reply) for ids, reply in pieces]
    return [(begin_ids(tokenizer), False), *pieces]


def _ended(ids: list[int], eos: int | None) -> list[int]:
    """A reply that ends with the end token, whatever the template put after it."""
    if eos is None:
        return ids
    if eos in ids:
        return ids[: len(ids) - ids[::-1].index(eos)]
    return [*ids, eos]
