"""Map-style sequences: random access, so that a trainer can resume anywhere, and a weighted interleave of several."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from l2a_compress.errors import ConfigError, DataError

__all__ = ["Chain", "MapStyle", "Mixture"]

T_co = TypeVar("T_co", covariant=True)


class MapStyle(Sequence[T_co], ABC, Generic[T_co]):
    """A sequence whose items are made when they are asked for. A slice is a list."""

    @abstractmethod
    def _item(self, index: int) -> T_co:
        """The item at ``index``, which is in [0, len(self))."""

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | Sequence[T_co]:
        if isinstance(index, slice):
            return [self._item(number) for number in range(*index.indices(len(self)))]
        number = int(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)}")
        return self._item(number)


class Chain(MapStyle[T_co]):
    """Several sequences one after the other, each item once: what an evaluation wants."""

    def __init__(self, parts: Sequence[Sequence[T_co]]) -> None:
        """Chains ``parts`` in their order."""
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> T_co:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]


class Mixture(MapStyle[T_co]):
    """A weighted interleave of several sequences.

    Sample ``i`` depends only on the seed, ``i``, the weights and the lengths of the parts: not on what was read before
    and not on the length of the mixture, so a resumed or a longer run sees the same samples at the same places. Each
    part is gone through in a fresh random order per round, and no item comes a second time before all came once.
    """

    def __init__(
        self, parts: Sequence[Sequence[T_co]], weights: Sequence[float], *, seed: int, length: int | None = None
    ) -> None:
        """Plans the interleave.

        Args:
            parts: Sequences to draw from, none of them empty.
            weights: One share per part, finite and above 0; they need not add up to 1.
            seed: Of the interleave, at least 0.
            length: Number of samples; by default the lengths of the parts added up.

        Raises:
            ConfigError: The weights are not one number above 0 per part.
            DataError: A part is empty.
        """
        self._parts = tuple(parts)
        shares = _shares(weights, len(self._parts))
        empty = [number for number, part in enumerate(self._parts) if not len(part)]
        if empty:
            raise DataError(f"source {empty[0] + 1} of the mixture is empty")
        size = sum(len(part) for part in self._parts) if length is None else length
        # Streams of one generator each, so that a prefix of the plan is the plan of the prefix.
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0]))).random(size)
        self._part = np.minimum(np.searchsorted(np.cumsum(shares), draws, side="right"), len(shares) - 1)
        self._index = np.empty(size, dtype=np.int64)
        for number, part in enumerate(self._parts):
            mine = np.flatnonzero(self._part == number)
            self._index[mine] = _rounds(len(part), len(mine), np.random.SeedSequence([seed, 1, number]))

    def __len__(self) -> int:
        return len(self._index)

    def _item(self, index: int) -> T_co:
        return self._parts[int(self._part[index])][int(self._index[index])]

    def origin_of(self, index: int) -> tuple[int, int]:
        """Which part sample ``index`` is drawn from, and which item of it it is."""
        return int(self._part[index]), int(self._index[index])

    def following(self, index: int) -> int:
        """The place of the next sample of the same part, from the start again behind the last one."""
        places = np.flatnonzero(self._part == self._part[index])
        return int(places[np.searchsorted(places, index, side="right") % len(places)])

    def part_of(self, index: int) -> int:
        """Which part sample ``index`` is drawn from."""
        return int(self._part[index])


def _shares(weights: Sequence[float], count: int) -> npt.NDArray[np.float64]:
    shares = np.asarray(weights, dtype=np.float64)
    if count == 0 or shares.shape != (count,):
        raise ConfigError(f"a mixture needs one weight per source, found {len(weights)} for {count}")
    if not np.isfinite(shares).all() or (shares <= 0).any():
        raise ConfigError(f"weights of a mixture must be finite and above 0, found {list(weights)}")
    normalized: npt.NDArray[np.float64] = shares / shares.sum()
    return normalized


def _rounds(size: int, count: int, seed: np.random.SeedSequence) -> npt.NDArray[np.int64]:
    """The first ``count`` of an endless run through ``size`` items, in a new random order each round."""
    rounds = -(-count // size)
    keys = np.random.Generator(np.random.Philox(seed)).random((rounds, size))
    return keys.argsort(axis=1, kind="stable").ravel()[:count].astype(np.int64)
