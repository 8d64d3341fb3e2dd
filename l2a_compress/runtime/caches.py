"""Keys and values of all rows of a batch, in buffers that the runtime owns.

A buffer is [rows, groups, capacity, head_dim] for each layer and part. As rows stand one after another in memory, one
row is a view that a prefill of its own writes into while the others keep what they have; decoding reads the first rows
together. Buffers grow by half when a row needs more room, and end with the last row. Pages that nothing was written to
take no memory: those of layers that a graph skips without keys and values stay empty, when buffers grow too. Those that
are begun are taken whole, and most are huge: where a group's tokens are less than one, its neighbours' come with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2a_compress.runtime.decoder import CACHE_TYPES
from l2a_compress.runtime.pages import give_back_rest, mapped, resident, taken, zeros

Array = np.ndarray[Any, np.dtype[Any]]


class Caches:
    """The buffers of one graph.

    Args:
        inputs: the graph's past keys and values: name -> (groups, head_dim, onnx type).
    """

    def __init__(self, inputs: Mapping[str, tuple[int, int, str]]) -> None:
        self.inputs = dict(inputs)
        self.clear()

    def clear(self) -> None:
        """Gives all rows back, as soon as nobody reads their views."""
        self.rows = self.capacity = 0
        self._marks: list[int] = []  # how many tokens of each row were ever written
        self._buffers = self._made(0, 0)

    @property
    def token_bytes(self) -> int:
        """Of one token of one row."""
        return sum(
            groups * size * np.dtype(CACHE_TYPES[kind][0]).itemsize for groups, size, kind in self.inputs.values()
        )

    @property
    def resident_bytes(self) -> int:
        """That what was written takes of memory, at most; what is only reserved takes none."""
        low, high, starts, ends = self._written(self.rows, self.capacity, self._marks)
        return int(min(taken(low, high, starts, ends), resident(low, high)))

    def mark(self, row: int, tokens: int) -> None:
        """Notes that so many tokens of a row are being written."""
        self._marks[row] = max(self._marks[row], tokens)

    def unwritten(self, lengths: Sequence[int]) -> int:
        """Bytes that the first rows will take beyond those they have, until they have so many tokens.

        Where buffers must grow for it, what rows hold is there twice for a moment.
        """
        most = max(lengths, default=0)
        if self.growth(len(lengths), most):
            return self._taken(*self._grown(len(lengths), most), lengths)
        wanted = [*lengths, *[0] * (self.rows - len(lengths))]
        wanted = [max(one, known) for one, known in zip(wanted, self._marks, strict=True)]
        return self._taken(self.rows, self.capacity, wanted) - self.resident_bytes

    def trim(self, lengths: Sequence[int]) -> None:
        """Gives back the memory of all but the first tokens of the first rows."""
        marks = [*lengths, *[0] * (self.rows - len(lengths))]
        if give_back_rest(*self._written(self.rows, self.capacity, marks)):
            self._marks = marks

    def _taken(self, rows: int, capacity: int, lengths: Sequence[int]) -> int:
        """Bytes of memory of the first tokens of the first rows, in buffers of so many rows of so many tokens."""
        return taken(*self._written(rows, capacity, lengths))

    def _written(self, rows: int, capacity: int, lengths: Sequence[int]) -> tuple[int, int, Array, Array]:
        """The same as places in memory: where all begins and ends, and where what is written does."""
        kept = np.array([(row, tokens) for row, tokens in enumerate(lengths) if tokens], dtype=np.int64).reshape(-1, 2)
        low = next(iter(self._buffers.values())).ctypes.data if (rows, capacity) == (self.rows, self.capacity) else 0
        starts, ends, base = [], [], low
        for groups, size, kind in self.inputs.values():
            token = size * np.dtype(CACHE_TYPES[kind][0]).itemsize
            first = base + (kept[:, :1] * groups + np.arange(groups)) * capacity * token
            starts.append(first.ravel())
            ends.append((first + kept[:, 1:] * token).ravel())
            base += mapped(rows * groups * capacity * token)
        return low, base, np.concatenate(starts), np.concatenate(ends)

    def growth(self, rows: int, capacity: int) -> int:
        """Bytes that ``reserve`` will set aside; the old buffers go only after the new ones are there."""
        if rows <= self.rows and capacity <= self.capacity:
            return 0
        rows, capacity = self._grown(rows, capacity)
        return rows * capacity * self.token_bytes

    def reserve(self, rows: int, capacity: int, lengths: Sequence[int] = ()) -> bool:
        """Makes room for so many rows of so many tokens; the first tokens of the first rows stay, as many as told.

        Returns:
            Whether the buffers are new ones.

        Raises:
            MemoryError: there is no room; all is as it was.
        """
        if not self.growth(rows, capacity):
            return False
        rows, capacity = self._grown(rows, capacity)
        grown = self._made(rows, capacity)
        for name, buffer in self._buffers.items():
            for row, tokens in enumerate(lengths):
                held = buffer[row, :, :tokens]
                if held.any():  # zeros are there, and writing them would take memory
                    grown[name][row, :, :tokens] = held
        self._buffers, self.rows, self.capacity = grown, rows, capacity
        self._marks = [*lengths, *[0] * (rows - len(lengths))]
        return True

    def _made(self, rows: int, capacity: int) -> dict[str, Array]:
        """Empty buffers."""
        return zeros(
            {
                name: ((rows, groups, capacity, size), CACHE_TYPES[kind][0])
                for name, (groups, size, kind) in self.inputs.items()
            }
        )

    def _grown(self, rows: int, capacity: int) -> tuple[int, int]:
        tokens = self.capacity if capacity <= self.capacity else max(capacity, self.capacity * 3 // 2)
        return max(rows, self.rows), tokens

    def view(self, start: int, count: int) -> dict[str, Array]:
        """Some rows, by the name of the input; they are those of the buffers until the next ``reserve``."""
        return {name: buffer[start : start + count] for name, buffer in self._buffers.items()}

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first tokens of a row over another row."""
        self.mark(target, tokens)
        for buffer in self._buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def take(self, row: int, tokens: int) -> dict[str, Array]:
        """A copy of the first tokens of a row: [groups, tokens, head_dim] by the name of the input."""
        return {name: buffer[row, :, :tokens].copy() for name, buffer in self._buffers.items()}

    def put(self, row: int, held: Mapping[str, Array]) -> None:
        """Fills a row with what :meth:`take` gave, of this graph or of one with more layers or groups."""
        self.mark(row, max((part.shape[1] for part in held.values()), default=0))
        for name, buffer in self._buffers.items():
            groups, tokens = buffer.shape[1], held[name].shape[1]
            buffer[row, :, :tokens] = held[name][:groups]
