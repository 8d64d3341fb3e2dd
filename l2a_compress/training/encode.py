"""Examples to token ids with exact spans.

The pieces of an example (prompt, tag, reasoning, tag, answer) are tokenized one by one and their ids joined, so that no
token ever crosses a border and a prompt encoded alone for generation is exactly the start of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2a_compress.errors import DataError
from l2a_compress.modeling.tags import Tags, read_tags
from l2a_compress.training.chat import chat_pieces
from l2a_compress.training.examples import Encoded, Example, Style, UnfitError
from l2a_compress.training.pieces import begin_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "encode", "encode_prompt"]

IGNORE = -100
_LENGTH = 512  # most tokens of an example, where nobody says


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, style: Style | None = None, max_length: int = _LENGTH
) -> Encoded:
    """Encodes one example for training.

    Args:
        example: What to encode.
        tokenizer: Must have the four tags where the example has reasoning.
        style: Which trace; needed for ``reasoning``, not looked at for ``chat`` and ``text``.
        max_length: Most tokens. ``chat`` and ``text`` are cut at the end; reasoning is never cut.

    Raises:
        DataError: The example has no trace of that style.
        UnfitError: A reasoning example is longer than ``max_length``, nothing is left to train on, or the example's
            own text contains a tag.
        TokenizerError: A tag is not in the tokenizer.
    """
    if example.kind == "text":
        return _encode_text(example, tokenizer, max_length)
    if example.kind == "chat":
        return _encode_chat(example, tokenizer, max_length)
    if style is None:
        raise DataError(f"a reasoning example needs a style; it has {', '.join(example.traces) or 'none'}")
    return _encode_reasoning(example, tokenizer, style, max_length)


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, style: Style | None = None, max_length: int | None = None
) -> list[int]:
    """What a generation starts from: the first ``prompt_length`` ids of the encoded example.

    With a ``style``, an example whose reasoning names its style also gets that word, the first think token. Without
    ``max_length`` a reasoning prompt may be of any length; others are then cut as :func:`encode` does by default.

    Raises:
        UnfitError: As for :func:`encode`; a reasoning prompt leaves no room in ``max_length``.
        TokenizerError: A tag is not in the tokenizer.
    """
    if example.kind != "reasoning":
        encoded = encode(example, tokenizer, max_length=_LENGTH if max_length is None else max_length)
        return encoded["input_ids"][: encoded["prompt_length"]]
    opening = example.opening(style) if style is not None else ""
    prompt, opened = token_ids(tokenizer, [example.prompt, opening])
    ids = [*begin_ids(tokenizer), *prompt, read_tags(tokenizer).think, *opened]
    if max_length is not None and len(ids) >= max_length:
        raise UnfitError(f"the prompt takes {len(ids)} tokens and max_length is {max_length}")
    return ids


def _encode_reasoning(example: Example, tokenizer: PreTrainedTokenizerBase, style: Style, max_length: int) -> Encoded:
    tags = read_tags(tokenizer)
    prompt, answer, *parts = token_ids(tokenizer, [example.prompt, example.answer, *example.thinking(style)])
    think = [token for part in parts for token in part]
    _refuse_tags(example, tags, [*prompt, *answer, *think])
    head = [*begin_ids(tokenizer), *prompt, tags.think]
    tail = [tags.end_think, tags.answer, *answer, tags.end_answer]
    if tokenizer.eos_token_id not in (None, tags.end_answer):
        tail.append(tokenizer.eos_token_id)
    ids = [*head, *think, *tail]
    if len(ids) > max_length:
        raise UnfitError(f"the example takes {len(ids)} tokens and max_length is {max_length}")
    return Encoded(
        input_ids=ids,
        labels=[IGNORE] * len(head) + ids[len(head) :],
        prompt_length=len(head),
        think_start=len(head),
        think_end=len(head) + len(think),
    )


def _refuse_tags(example: Example, tags: Tags, ids: Sequence[int]) -> None:
    if {tags.think, tags.end_think, tags.answer, tags.end_answer} & set(ids):
        raise UnfitError(f"the example's own text contains a think or answer tag (prompt {example.prompt[:60]!r})")


def _encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    (text,) = token_ids(tokenizer, [example.prompt])
    ids = [*begin_ids(tokenizer), *text]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:max_length]
    if len(ids) < 2:
        raise UnfitError(f"the text takes {len(ids)} token(s), which leaves nothing to predict")
    return _without_reasoning(ids, [*ids], max(1, len(ids) // 4))


def _encode_chat(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    prompt_length = 0
    for piece, trained in chat_pieces(example.messages, tokenizer):
        if trained and not prompt_length:
            prompt_length = len(ids)
        ids += piece
        labels += piece if trained else [IGNORE] * len(piece)
    if prompt_length >= max_length:
        raise UnfitError(f"the first reply starts at token {prompt_length} and max_length is {max_length}")
    return _without_reasoning(ids[:max_length], labels[:max_length], prompt_length)


def _without_reasoning(ids: list[int], labels: list[int], prompt_length: int) -> Encoded:
    return Encoded(
        input_ids=ids,
        labels=[IGNORE] * prompt_length + labels[prompt_length:],
        prompt_length=prompt_length,
        think_start=0,
        think_end=0,
    )
