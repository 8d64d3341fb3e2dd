"""Held-out problems as token ids, and the order in which they are batched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from l2a_compress.allocation import Allocation
from l2a_compress.errors import ConfigError, DataError
from l2a_compress.evaluation.values import Metric
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.data import load_some
from l2a_compress.training.data_config import DataConfig, MixtureConfig
from l2a_compress.training.encode import encode, encode_prompt
from l2a_compress.training.examples import Encoded, Example, Split, Style, UnfitError
from l2a_compress.training.pieces import token_ids

log = logging.getLogger(__name__)

__all__ = ["Problem", "examples_of", "held_out", "plan_batches"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One held-out problem.

    Attributes:
        example: As text.
        prompt: Token ids that the allocator may read: up to and with ``<think>``, of a text its first quarter.
        encoded: The whole example with its labels, for likelihoods.
        length: Tokens of the reference reasoning, or of the whole example where it is encoded. Only the order of the
            work depends on it.
        drafts: By style, what a generation that follows the reference would write; see ``confirm``.
    """

    example: Example
    prompt: tuple[int, ...]
    encoded: Encoded | None
    length: int
    drafts: Mapping[Style, tuple[int, ...]] = field(default_factory=dict)

    def tag(self, name: str) -> str:
        """What the example says of itself under that name, or nothing."""
        return str(self.example.meta.get(name, ""))


def held_out(
    data: DataConfig | MixtureConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: Metric,
    count: int,
    seed: int,
    split: Split = "heldout",
) -> list[Problem]:
    """Up to ``count`` problems of the held-out split, or another, evenly spread over it.

    Raises:
        ConfigError: ``accuracy`` is asked of data without exact answers.
        DataError: no example can be encoded.
    """
    problems = []
    examples = examples_of(data, split, count=count, seed=seed)
    for example in examples:
        if metric == "accuracy" and example.kind != "reasoning":
            raise ConfigError(f"data of kind {example.kind!r} has no exact answer to compare with; use --metric nll")
        problem = _problem(example, tokenizer, data.max_length, labelled=metric == "nll")
        if problem is not None:
            problems.append(problem)
    unfit = f"too long for max_length = {data.max_length}, with a tag in their text, or refused by the chat template"
    if problems and len(problems) < len(examples):
        left_out = len(examples) - len(problems)
        log.warning("%d of %d held-out examples are left out: %s", left_out, len(examples), unfit)
    if not problems:
        raise DataError(f"no held-out example can be encoded: {unfit}")
    return problems


def examples_of(data: DataConfig | MixtureConfig, split: Split, *, count: int, seed: int) -> list[Example]:
    """Up to ``count`` examples of a split, evenly spread over it (the parts of a mixture stand one after another)."""
    examples = load_some(data, split, seed, count)
    taken = min(count, len(examples))
    return [examples[at * len(examples) // taken] for at in range(taken)]


def _problem(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, *, labelled: bool
) -> Problem | None:
    try:
        prompt = encode_prompt(example, tokenizer, max_length=max_length)
        encoded = encode(example, tokenizer, _style(example), max_length) if labelled else None
    except UnfitError:
        return None
    if encoded is not None:
        length = len(encoded["input_ids"])
    else:
        length = max(map(len, token_ids(tokenizer, list(example.traces.values()))), default=0)
    drafts = {} if labelled else _drafts(example, tokenizer, max_length)
    return Problem(example=example, prompt=tuple(prompt), encoded=encoded, length=length, drafts=drafts)


def _drafts(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Mapping[Style, tuple[int, ...]]:
    tags, found = read_tags(tokenizer), dict[Style, tuple[int, ...]]()
    for style in example.traces:
        try:
            encoded = encode(example, tokenizer, style, max_length)
        except UnfitError:
            continue
        written = encoded["input_ids"][encoded["think_start"] :]
        found[style] = tuple(written[: written.index(tags.end_answer) + 1])
    return found


def _style(example: Example) -> Style | None:
    if example.kind != "reasoning":
        return None
    return "long" if "long" in example.traces else next(iter(example.traces))


def plan_batches(allocations: Sequence[Allocation], lengths: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Row numbers, in batches of at most ``size`` that share their layers as far as that does not make them tiny.

    A layer that no row of a batch runs is not run at all, and rows of one length finish together. So rows are sorted
    by layers, then length, and a batch ends where the layers change once it is half full.

    Args:
        allocations: One per row.
        lengths: Per row the tokens to write and the tokens of the prompt.
        size: Rows of a batch.
    """
    order = sorted(range(len(allocations)), key=lambda row: (allocations[row].layers, lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        last = batches[-1] if batches else []
        changes = bool(last) and allocations[last[-1]].layers != allocations[row].layers
        if not last or len(last) >= size or (changes and len(last) >= size // 2):
            batches.append([row])
        else:
            last.append(row)
    return batches
