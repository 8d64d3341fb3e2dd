"""The graphs of a bundle that are loaded, each with the rows that run on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.bundle import Bundle, GraphEntry
from l2a_compress.errors import BundleError
from l2a_compress.runtime.chooser import Decoder, Serve, Widths, decision, widths_of
from l2a_compress.runtime.decoder import GraphDecoder, predicates
from l2a_compress.runtime.engine_lane import EngineLane, OpenEngine
from l2a_compress.runtime.lane import Lane
from l2a_compress.runtime.native import Native
from l2a_compress.runtime.providers import Provider
from l2a_compress.runtime.request import Request
from l2a_compress.runtime.tensorrt import EngineDecoder

Array = np.ndarray[Any, np.dtype[Any]]


class Lanes:
    """Loads graphs when a request needs them, and lets go of those without rows where no more may be loaded.

    Args: as :class:`~l2a_compress.runtime.engine.Engine` has them; ``native`` is the C++ runtime, where it runs graphs.

    Attributes:
        whole: The one graph; None where variants serve.

    Raises:
        BundleError: the bundle has not the graphs to serve it so.
        SessionError: the one graph cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        serve: Serve,
        max_graphs: int,
        threads: int | None,
        provider: Provider,
        native: Native | None,
        open_engine: OpenEngine | None,
    ) -> None:
        self.bundle, self._folder = bundle, folder
        self._most = max_graphs if native is None else len(bundle.graphs)  # which share one copy of the weights
        self._threads, self._provider, self._native, self._open_engine = threads, provider, native, open_engine
        self._lanes: dict[str, Lane | EngineLane] = {}  # by the graph's name, the last that was asked for at the end
        whole, dialect, target = bundle.if_graph, "ort", "--dialect ort"
        if open_engine is not None:
            whole, dialect, target = bundle.told_graph, "standard", "--target trt"
        if bundle.dialect != dialect or not (whole if serve == "if" else bundle.variants):
            option = {"if": "--if-graph", "variants": "--variants"}[serve]
            raise BundleError(
                f"{folder}: has no graphs of the dialect {dialect} to serve; export with {option} {target}"
            )
        self.whole = whole if serve == "if" else None
        if self.whole is not None:
            self.open(self.whole)

    def __iter__(self) -> Iterator[Lane | EngineLane]:
        return iter(self._lanes.values())

    @property
    def rows(self) -> int:
        """How many requests have a row."""
        return sum(len(lane.requests) for lane in self)

    @property
    def running(self) -> list[Request]:
        """The requests that have a row and are not done."""
        return [request for lane in self for request in lane.requests if not request.done]

    def open(self, entry: GraphEntry) -> Lane | EngineLane | None:
        """The lane of a graph; None where other graphs are in use and no more may be loaded.

        Raises:
            SessionError: the graph cannot be loaded.
        """
        lane = self._lanes.pop(entry.name, None)
        if lane is None:
            idle = [name for name, other in self._lanes.items() if not other.requests]  # the oldest first
            for name in idle[: max(0, len(self._lanes) + 1 - self._most)]:
                del self._lanes[name]  # before the new graph is loaded: there may be no room for both
            if len(self._lanes) >= self._most:
                return None
            decoder = self.decoder(entry)
            if isinstance(decoder, EngineDecoder):
                lane = EngineLane(decoder, entry)
            else:
                lane = Lane(self._folder / entry.file, entry, decoder)
        self._lanes[entry.name] = lane
        return lane

    def decoder(self, entry: GraphEntry) -> Decoder:
        """Opens a graph.

        Raises:
            SessionError: it cannot be loaded.
        """
        if self._open_engine is not None:
            return self._open_engine(self._folder, self.bundle, entry.name)
        if self._native is not None:
            return self._native.decoder(entry.name)
        return GraphDecoder(self._folder / entry.file, threads=self._threads, provider=self._provider)

    def of(self, request: Request) -> Lane | EngineLane | None:
        """Where a request runs."""
        return next((lane for lane in self if request in lane.requests), None)

    def graph(self, kept: Widths | None) -> GraphEntry:
        """The graph that runs so many KV groups of each layer."""
        return self.whole or next(entry for entry in self.bundle.variants if widths_of(entry) == kept)

    def inputs(self, lane: Lane | EngineLane, requests: Sequence[Request]) -> dict[str, Array]:
        """What a graph reads beside tokens and mask; an allocation of -1 asks the gates."""
        if lane.entry.kind not in ("if", "told"):
            return {}
        layers, told = self.bundle.shape.num_layers, decision([request.told for request in requests])
        kept = np.array([request.kept or (-1,) * layers for request in requests], dtype=np.int64)
        if lane.entry.kind == "if":
            return {**told, "allocation": kept}
        runs = predicates(kept, self.bundle.gates["stem_layers"], self.bundle.widths)
        shown = {"budget": told["budget"]} if self.bundle.gates["tokens"] else {}
        return {**shown, "allocation": kept, **runs}

    def unwritten(self, to: Lane | EngineLane | None = None, more: Request | None = None) -> int:
        """Bytes that keys and values of all rows may still take, and of one more in a lane."""
        return sum(lane.unwritten(more if lane is to else None) for lane in self)

    def free(self) -> None:
        """Graphs without rows give their caches back."""
        for lane in self:
            lane.free()

    def clear(self) -> None:
        """Frees all graphs and their caches."""
        self._lanes.clear()
        self._native = None
