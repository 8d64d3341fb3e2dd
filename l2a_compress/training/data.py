"""Loads the examples of a split: the entry to this package's data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from l2a_compress.errors import ConfigError, DataError
from l2a_compress.training.data_config import DataConfig, MixtureConfig
from l2a_compress.training.embedded_examples import EmbeddedExamples
from l2a_compress.training.examples import SPLITS, Example, Split, position, split_of
from l2a_compress.training.kinds import example_of, resolve_columns
from l2a_compress.training.mixture import Chain, MapStyle, Mixture
from l2a_compress.training.sources import Rows, read_rows

__all__ = ["load_examples", "load_some"]

log = logging.getLogger(__name__)
T = TypeVar("T")


def load_examples(
    config: DataConfig | MixtureConfig, split: Split = "train", seed: int = 0, *, length: int | None = None
) -> Sequence[Example]:
    """The examples of a split, as a map-style sequence. Examples are made when they are asked for.

    Splits come from a hash of the prompt, so that they never overlap, whatever the seed, the limit or the file's order.
    A mixture is interleaved by weight, except that its held-out split has each example once.

    Args:
        config: One source, or several.
        split: ``train``, ``heldout`` or ``calibration``.
        seed: Of the interleave and of generated problems, at least 0. Rows of a file do not depend on it.
        length: Least samples of a mixture, where it is interleaved; never fewer than its sources have together.

    Raises:
        ConfigError: An unknown split or a seed below 0.
        DataError: A source cannot be read, lacks a column, has a bad row, or has no example in that split.
    """
    if isinstance(config, MixtureConfig):
        return _mix([load_examples(one, split, seed) for one in config.sources], config, split, seed, length)
    _check(split, seed)
    if config.kind == "embedded":
        return EmbeddedExamples(split=split, seed=seed, limit=config.limit, subset=config.subset)
    return _RowExamples(read_rows(config), config, split)


def load_some(config: DataConfig | MixtureConfig, split: Split, seed: int, count: int) -> Sequence[Example]:
    """As :func:`load_examples`; of generated problems there are as many as are asked for."""
    if isinstance(config, DataConfig) and config.kind == "embedded" and config.limit is None:
        config = replace(config, limit=count)
    return load_examples(config, split, seed)


class _RowExamples(MapStyle[Example]):
    """Examples of one split of a file or hub data set. Every row is checked once, at the start."""

    def __init__(self, rows: Rows, config: DataConfig, split: Split) -> None:
        self._rows = rows
        self._config = config
        self._columns = resolve_columns(config, rows.columns)
        places: list[tuple[float, int]] = []
        empty = 0
        for index, row in enumerate(rows):
            try:
                example = example_of(row, self._columns, config)
            except DataError as error:
                raise DataError(f"{rows.where(index)}: {error}") from error
            empty += example is None
            if example is not None and self._split(example) == split:
                places.append((position(example.prompt), index))
        if empty and config.kind == "chat":  # blank lines of a text are nothing to tell
            if empty == len(rows):
                raise DataError(f"{config.source}: all {empty} replies are empty; see data.columns, or --columns")
            if split == "train" or config.heldout_share == 1:  # other splits are read in the same run
                log.warning("%s: skipped %d of %d rows, whose reply is empty", config.source, empty, len(rows))
        if not places:
            raise DataError(
                f"{config.source}: the {split} split is empty: of {len(rows)} rows none falls into its share "
                f"(heldout_share {config.heldout_share}, calibration_share {config.calibration_share}); give more "
                "rows or another share"
            )
        # The limit takes prompts by their hash: a fair sample of a sorted file, and a larger limit keeps all of them.
        taken = [index for _, index in sorted(places)[: config.limit]]
        self._indices = taken if split == "calibration" else sorted(taken)  # whose first ones are a fair sample too

    def _split(self, example: Example) -> Split:
        return split_of(
            example.prompt,
            heldout_share=self._config.heldout_share,
            calibration_share=self._config.calibration_share,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Example:
        example = example_of(self._rows[self._indices[index]], self._columns, self._config)
        assert example is not None  # only rows that gave an example are indexed
        return example


def _mix(
    parts: Sequence[Sequence[T]], config: MixtureConfig, split: Split, seed: int, length: int | None = None
) -> Sequence[T]:
    if split == "heldout":
        return Chain(parts)
    if length is not None:  # so that any of a source can replace what does not fit, whatever the length of the run
        length = max(length, sum(map(len, parts)))
    return Mixture(parts, [source.weight for source in config.sources], seed=seed, length=length)


def _check(split: str, seed: int) -> None:
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be an integer of at least 0, found {seed!r}")
