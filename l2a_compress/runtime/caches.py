"""Keys and values of all rows of a batch, in buffers that the runtime owns.

A buffer is [rows, groups, capacity, head_dim] for each layer and part. As rows stand one after another in memory, one
row is a view that a prefill of its own writes into while the others keep what they have; decoding reads the first rows
together. Buffers grow by half when a row needs more room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from l2a_compress.runtime.decoder import CACHE_TYPES

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

    def reserve(self, rows: int, capacity: int) -> None:
        """Makes room for so many rows of so many tokens; what is there stays."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        old_rows, old_capacity = self.rows, self.capacity
        rows = max(rows, old_rows)
        capacity = old_capacity if capacity <= old_capacity else max(capacity, old_capacity * 3 // 2)
        grown = {}
        for name, (groups, size, kind) in self.inputs.items():
            grown[name] = np.zeros((rows, groups, capacity, size), dtype=CACHE_TYPES[kind][0])
            if name in self._buffers:
                grown[name][:old_rows, :, :old_capacity] = self._buffers[name]
        self._buffers, self.rows, self.capacity = grown, rows, capacity

    def view(self, start: int, count: int) -> dict[str, ort.OrtValue]:
        """Some rows, by the name of the input; they borrow the buffers and end with the next ``reserve``."""
        return {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer[start : start + count], CACHE_TYPES[kind][1])
            for (name, buffer), (_, _, kind) in zip(self._buffers.items(), self.inputs.values(), strict=True)
        }

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first tokens of a row over another row."""
        for buffer in self._buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]
