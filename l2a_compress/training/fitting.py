"""Leaves out what cannot be encoded, before a run starts and with a count."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from l2a_compress.errors import DataError
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.embedded_examples import EmbeddedExamples
from l2a_compress.training.encode import UnfitError, encode
from l2a_compress.training.examples import Example, Style
from l2a_compress.training.mixture import MapStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FittingExamples", "Sample", "usable_styles"]

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """An example and the most tokens it may take, which its source decides."""

    example: Example
    max_length: int


class FittingExamples(MapStyle[Sample]):
    """The examples of one source that can be encoded in every style they may be drawn in.

    Reasoning that is longer than ``max_length`` is dropped with one counted warning, since cutting would lose the
    answer. Generated problems are not looked through (there are a million of them, and dropping would quietly take the
    hard ones away): one that does not fit is an error when it is encoded.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        styles: Sequence[Style],
    ) -> None:
        """Tries every example once.

        Raises:
            DataError: An example has none of the styles, or no example fits.
            TokenizerError: The tokenizer lacks a tag.
        """
        self._examples = examples
        self._max_length = config.max_length
        self._kept: Sequence[int] = range(len(examples))
        self.dropped = 0
        if not isinstance(examples, EmbeddedExamples):
            self._drop(tokenizer, config.source, styles)

    def __len__(self) -> int:
        return len(self._kept)

    def _item(self, index: int) -> Sample:
        return Sample(self._examples[self._kept[index]], self._max_length)

    def _drop(self, tokenizer: PreTrainedTokenizerBase, source: str, styles: Sequence[Style]) -> None:
        kept: list[int] = []
        reasons: Counter[str] = Counter()
        for index, example in enumerate(self._examples):
            tried: Sequence[Style | None] = usable_styles(example, styles) if example.kind == "reasoning" else [None]
            try:
                for style in tried:
                    encode(example, tokenizer, style, self._max_length)
            except UnfitError as error:
                reasons[str(error)] += 1
            else:
                kept.append(index)
        self._kept, self.dropped = kept, reasons.total()
        if not kept:
            raise DataError(f"{source}: none of {self.dropped} examples can be encoded; {next(iter(reasons))}")
        if reasons:
            logger.warning(
                "%s: dropped %d of %d examples; for example: %s",
                source,
                self.dropped,
                len(self._examples),
                next(iter(reasons)),
            )


def usable_styles(example: Example, styles: Sequence[Style]) -> list[Style]:
    """Those of ``styles`` that the example has a trace of.

    Raises:
        DataError: It has none of them.
    """
    usable = [style for style in styles if style in example.traces]
    if not usable:
        raise DataError(
            f"an example has none of the styles {', '.join(styles)}, only {', '.join(example.traces)} "
            f"(prompt {example.prompt[:60]!r})"
        )
    return usable
