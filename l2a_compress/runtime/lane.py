"""Rows that run together on one graph of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.bundle import GraphEntry
from l2a_compress.runtime.caches import Caches
from l2a_compress.runtime.decoder import PAST, GraphDecoder, session_error
from l2a_compress.runtime.native import NativeDecoder
from l2a_compress.runtime.request import Request

Array = np.ndarray[Any, np.dtype[Any]]


class Lane:
    """A graph, its caches, and the requests in their rows.

    Args:
        path: for messages.
        entry: the ``If`` graph or a variant.
        decoder: which runs it.

    Attributes:
        requests: Those that run, in the order of their rows.
    """

    def __init__(self, path: Path, entry: GraphEntry, decoder: GraphDecoder | NativeDecoder) -> None:
        self.entry = entry
        self._path, self._decoder = path, decoder
        inputs = self._decoder.inputs.items()
        self.caches = Caches(
            {name: (item.shape[1], item.shape[3], item.type) for name, item in inputs if name.startswith(PAST)}
        )
        self.requests: list[Request] = []
        self._bound: tuple[int, int] | None = None  # the first row that the decoder is bound to, and how many

    @property
    def runs_on(self) -> str:
        """The execution providers of its session."""
        return ", ".join(self._decoder.providers)

    def reserve(self, rows: int, capacity: int) -> None:
        """Makes room in the caches.

        Raises:
            OutOfMemoryError: there is none; the rows are as they were.
        """
        try:
            if self.caches.reserve(rows, capacity, [request.length for request in self.requests]):
                self._bound = None
        except MemoryError as error:
            raise session_error(self._path, "make caches for", error) from error

    def free(self) -> None:
        """Gives the caches back, where no row uses them."""
        if self.caches.rows and not self.requests:
            self.caches.clear()
            self._bound = None
            self._decoder.bind(self.caches.view(0, 0))  # which would keep what it read last

    def trim(self) -> None:
        """Gives back what the caches hold beside the rows."""
        self.caches.trim([request.length for request in self.requests])

    @property
    def resident_bytes(self) -> int:
        """That keys and values have taken."""
        return self.caches.resident_bytes

    def unwritten(self, more: Request | None = None) -> int:
        """Bytes that keys and values of the rows may still take, and of one more where it is given."""
        rows = [*self.requests, more] if more is not None else self.requests
        return self.caches.unwritten([request.most_tokens for request in rows])

    def prefill(self, request: Request, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Computes all tokens of a request into the row behind those that run, and lets it run."""
        tokens = np.array([request.tokens], dtype=np.int64)
        self._bind(len(self.requests), 1)
        self.caches.mark(len(self.requests), tokens.shape[1])
        outputs = self._decoder.step(tokens, np.ones_like(tokens), **inputs)
        request.length = tokens.shape[1]
        self.requests.append(request)
        return outputs

    def resume(self, request: Request, held: Mapping[str, Array]) -> None:
        """Lets a request run on with keys and values that it brings."""
        self.caches.put(len(self.requests), held)
        self.requests.append(request)

    def decode(self, requests: Sequence[Request], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """One token of rows that stand one behind another; the caches have room for it."""
        start = self.requests.index(requests[0])
        self._bind(start, len(requests))
        lengths = np.array([request.length + 1 for request in requests])
        mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
        for row, request in enumerate(requests, start):
            self.caches.mark(row, request.length + 1)
        fed = np.array([[request.written[-1]] for request in requests], dtype=np.int64)
        outputs = self._decoder.step(fed, mask, **inputs)
        for request in requests:
            request.length += 1
        return outputs

    def _bind(self, start: int, count: int) -> None:
        if self._bound != (start, count):
            self._bound = None  # binding may fail halfway
            self._decoder.bind(self.caches.view(start, count))
            self._bound = start, count

    def remove(self, request: Request) -> None:
        """Takes a request out; the last row takes its place."""
        row, last = self.requests.index(request), self.requests.pop()
        if last is not request:
            self.caches.move(len(self.requests), row, last.length)
            self.requests[row] = last

    def held(self, request: Request) -> dict[str, Array]:
        """A copy of the keys and values of a request."""
        return self.caches.take(self.requests.index(request), request.length)
