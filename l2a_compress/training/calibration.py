"""What gates are calibrated on: prices, the demand head, static baselines, a bundle's ladder, parity of its graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from l2a_compress.errors import DataError
from l2a_compress.training.collate import Collator, left_padded
from l2a_compress.training.data import load_some
from l2a_compress.training.encode import encode, encode_prompt
from l2a_compress.training.examples import Encoded, Example, UnfitError
from l2a_compress.training.recipe import Recipe

log = logging.getLogger(__name__)


def calibration_examples(recipe: Recipe, count: int, *, skip: int = 0) -> list[Example]:
    """Up to ``count`` examples of the recipe's calibration split, behind the first ``skip`` where there are so many.

    Raises:
        DataError: the data cannot be read, or that split is empty.
    """
    examples = load_some(recipe.data, "calibration", recipe.seed, skip + count)
    end = min(skip + count, len(examples))
    if end < skip + count and skip:
        log.warning("the calibration split has %d examples, so that some of %d + %d are the same", end, skip, count)
    return [examples[place] for place in range(max(0, end - count), end)]


def calibration_prompts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    batch_size: int = 64,
    *,
    device: torch.device | str = "cpu",
) -> list[tuple[Tensor, Tensor]]:
    """Left-padded ``(input_ids, attention_mask)`` batches of prompts of the calibration split, by length.

    Raises:
        DataError: the data cannot be read, that split is empty, or no prompt of it fits.
    """
    found = (_prompt_ids(one, tokenizer, recipe.data.max_length) for one in calibration_examples(recipe, count))
    rows = sorted((ids for ids in found if ids is not None), key=len)
    if not rows:
        raise DataError(f"no calibration prompt fits max_length = {recipe.data.max_length}; raise data.max_length")
    padded = (
        left_padded(rows[at : at + batch_size], Collator.of(tokenizer).pad_token_id)
        for at in range(0, len(rows), batch_size)
    )
    return [(ids.to(device), mask.to(device)) for ids, mask in padded]


def demand_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """What the demand head is fitted on: ``evaluation.demand_rows`` examples, as of :func:`example_batches`.

    They are others than those that prices are calibrated on: a head knows the prompts it was fitted on too well to say
    what others will cost.

    Raises:
        DataError: the data cannot be read.
    """
    some = calibration_examples(recipe, recipe.evaluation.demand_rows, skip=recipe.evaluation.calibration)
    return example_batches(some, tokenizer, max_length=recipe.data.max_length, batch_size=batch_size, device=device)


def example_batches(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Batches of whole examples that fit, each with its longest reasoning, by length."""
    found = list[Encoded]()
    for example in examples:
        with suppress(UnfitError):
            found.append(encode(example, tokenizer, next(iter(example.traces), None), max_length))
    found.sort(key=lambda encoded: len(encoded["input_ids"]))
    collate = Collator.of(tokenizer)
    batches = [collate(found[start : start + batch_size]) for start in range(0, len(found), batch_size)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def _prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int] | None:
    try:
        return encode_prompt(example, tokenizer, max_length=max_length)
    except UnfitError:
        return None
