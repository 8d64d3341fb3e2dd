"""A row that runs on an engine of TensorRT: what :class:`~l2a_compress.runtime.lane.Lane` is for graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.bundle import Bundle, GraphEntry
from l2a_compress.runtime.request import Request
from l2a_compress.runtime.tensorrt import EngineDecoder

Array = np.ndarray[Any, np.dtype[Any]]
OpenEngine = Callable[[Path, Bundle, str], EngineDecoder]


class OneRow:
    """Stands for the caches, which the engine's decoder keeps on the device for one row."""

    rows = 1

    def __init__(self, token_bytes: int) -> None:
        self.token_bytes, self.capacity = token_bytes, 0

    def growth(self, rows: int, capacity: int) -> int:
        """Bytes of the host that more room would take: none."""
        return 0


class EngineLane:
    """An engine and the request in its row. Keys and values stay on the device, and end with the request.

    Args:
        decoder: of the engine.
        entry: its graph.

    Attributes:
        requests: The one that runs, if any.
    """

    def __init__(self, decoder: EngineDecoder, entry: GraphEntry) -> None:
        self.entry, self._decoder = entry, decoder
        self.caches = OneRow(decoder.token_bytes)
        self.requests: list[Request] = []

    @property
    def runs_on(self) -> str:
        """The engine's file."""
        return self._decoder.engine.path.name

    def reserve(self, rows: int, capacity: int) -> None:
        """Makes room on the device, and forgets what was there."""
        self._decoder.start(rows, capacity)
        self.caches.capacity = capacity

    def free(self) -> None:
        """The device keeps its memory for the next request."""

    trim = free

    resident_bytes = 0  # of the host

    def unwritten(self, more: Request | None = None) -> int:
        """Bytes of the host that keys and values may still take: none."""
        return 0

    def prefill(self, request: Request, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Computes all tokens of a request and lets it run."""
        tokens = np.array([request.tokens], dtype=np.int64)
        outputs = self._decoder.step(tokens, np.ones_like(tokens), **inputs)
        request.length = tokens.shape[1]
        self.requests.append(request)
        return outputs

    def decode(self, requests: Sequence[Request], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """One token."""
        (request,) = requests
        mask = np.ones((1, request.length + 1), dtype=np.int64)
        outputs = self._decoder.step(np.array([[request.written[-1]]], dtype=np.int64), mask, **inputs)
        request.length += 1
        return outputs

    def remove(self, request: Request) -> None:
        """Takes the request out."""
        self.requests.remove(request)
