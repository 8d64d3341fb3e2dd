"""The prompts that gates are calibrated on: prices, a bundle's ladder, and the parity check of its graphs."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from l2a_compress.training.collate import Collator, left_padded
from l2a_compress.training.data import load_examples
from l2a_compress.training.encode import UnfitError, encode_prompt
from l2a_compress.training.examples import Example
from l2a_compress.training.recipe import Recipe


def calibration_prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Left-padded ``(input_ids, attention_mask)`` batches of prompts of the calibration split, by length."""
    examples = load_examples(recipe.data, "calibration", recipe.seed)
    found = (_prompt_ids(examples[i], tokenizer, recipe.data.max_length) for i in range(min(count, len(examples))))
    rows = sorted((ids for ids in found if ids is not None), key=len)
    return [
        left_padded(rows[at : at + batch_size], Collator.of(tokenizer).pad_token_id)
        for at in range(0, len(rows), batch_size)
    ]


def _prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int] | None:
    try:
        return encode_prompt(example, tokenizer, max_length=max_length)
    except UnfitError:
        return None
