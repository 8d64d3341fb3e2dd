"""Keys and values of all rows of a batch, in buffers that the runtime owns.

A buffer is [rows, groups, capacity, head_dim] for each layer and part. As rows stand one after another in memory, one
row is a view that a prefill of its own writes into while the others keep what they have; decoding reads the first rows
together. Buffers grow by half when a row needs more room. Pages that nothing was written to take no memory: those of
layers that a graph skips without keys and values stay empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from l2a_compress.runtime.decoder import CACHE_TYPES
from l2a_compress.runtime.pages import zeros

Array = np.ndarray[Any, np.dtype[Any]]


class Caches:
    """The buffers of one graph.

    Args:
        inputs: the graph's past keys and values: name -> (groups, head_dim, onnx type).
    """

    def __init__(self, inputs: Mapping[str, tuple[int, int, str]]) -> None:
        self.inputs = dict(inputs)
        self.rows = self.capacity = 0
        self._buffers: dict[str, Array] = {}

    @property
    def token_bytes(self) -> int:
        """Of one token of one row."""
        return sum(
            groups * size * np.dtype(CACHE_TYPES[kind][0]).itemsize for groups, size, kind in self.inputs.values()
        )

    def growth(self, rows: int, capacity: int) -> int:
        """Bytes that ``reserve`` will ask for; the old buffers go only after the new ones are there."""
        if rows <= self.rows and capacity <= self.capacity:
            return 0
        rows, capacity = self._grown(rows, capacity)
        return rows * capacity * self.token_bytes

    def reserve(self, rows: int, capacity: int) -> bool:
        """Makes room for so many rows of so many tokens; what is there stays.

        Returns:
            Whether the buffers are new ones.

        Raises:
            MemoryError: there is no room; all is as it was.
        """
        if not self.growth(rows, capacity):
            return False
        old_rows, old_capacity = self.rows, self.capacity
        rows, capacity = self._grown(rows, capacity)
        grown = zeros(
            {
                name: ((rows, groups, capacity, size), CACHE_TYPES[kind][0])
                for name, (groups, size, kind) in self.inputs.items()
            }
        )
        for name, buffer in self._buffers.items():
            grown[name][:old_rows, :, :old_capacity] = buffer
        self._buffers, self.rows, self.capacity = grown, rows, capacity
        return True

    def _grown(self, rows: int, capacity: int) -> tuple[int, int]:
        tokens = self.capacity if capacity <= self.capacity else max(capacity, self.capacity * 3 // 2)
        return max(rows, self.rows), tokens

    def view(self, start: int, count: int) -> dict[str, Array]:
        """Some rows, by the name of the input; they are those of the buffers until the next ``reserve``."""
        return {name: buffer[start : start + count] for name, buffer in self._buffers.items()}

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first tokens of a row over another row."""
        for buffer in self._buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def take(self, row: int, tokens: int) -> dict[str, Array]:
        """A copy of the first tokens of a row: [groups, tokens, head_dim] by the name of the input."""
        return {name: buffer[row, :, :tokens].copy() for name, buffer in self._buffers.items()}

    def put(self, row: int, held: Mapping[str, Array]) -> None:
        """Fills a row with what :meth:`take` gave, of this graph or of one with more layers or groups."""
        for name, buffer in self._buffers.items():
            groups, tokens = buffer.shape[1], held[name].shape[1]
            buffer[row, :, :tokens] = held[name][:groups]
