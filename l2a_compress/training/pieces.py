"""Text pieces to token ids, without anything that a tokenizer adds or reads into them on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["begin_ids", "token_ids"]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, allow_special: bool = False
) -> list[list[int]]:
    """Token ids of each text. Unless allowed, a special token written in the text is ordinary characters."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not allow_special,
        return_attention_mask=False,
        verbose=False,  # a piece longer than the model is handled by max_length
    )
    return [list(ids) for ids in encoded["input_ids"]]


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What this tokenizer puts in front of every text: its begin token, or nothing."""
    begin = tokenizer.bos_token_id
    if begin is None:
        return []
    # Having such a token does not mean using it: Qwen and SmolLM2 name one and never put it there.
    return [begin] if list(tokenizer("", verbose=False)["input_ids"])[:1] == [begin] else []
