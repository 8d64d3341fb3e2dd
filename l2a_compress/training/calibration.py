"""What gates are calibrated on: prices, the demand head, a bundle's ladder, and the parity check of its graphs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from l2a_compress.training.collate import Collator, left_padded
from l2a_compress.training.data import load_examples, load_some
from l2a_compress.training.encode import UnfitError, encode, encode_prompt
from l2a_compress.training.examples import Encoded, Example
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


def demand_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """What the demand head is fitted on: ``evaluation.demand_rows`` examples, as of :func:`example_batches`.

    They stand behind those that prices are calibrated on, where the calibration split has that many: a head knows the
    prompts it was fitted on too well to say what others will cost.

    Raises:
        DataError: the data cannot be read.
    """
    settings = recipe.evaluation
    wanted = settings.calibration + settings.demand_rows
    examples = load_some(recipe.data, "calibration", recipe.seed, wanted)
    end = min(wanted, len(examples))
    some = [examples[place] for place in range(max(0, end - settings.demand_rows), end)]
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
