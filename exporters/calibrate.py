"""What each graph of a bundle costs on this machine: time of a prefill and of a decode step, and memory.

Each graph takes turns with one reference, the largest variant, so that a machine that slows down slows both, and no
more than two graphs are open. Its time is its median ratio to the reference in the rounds that they share, times what
the reference takes: the median of all of its rounds. Memory is the peak of a process that does nothing but load the
graph and run it, while no other is open here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress._machine import peak_of, processor
from l2a_compress.bundle import COSTS_FILE, GraphEntry
from l2a_compress.cost import ModelShape
from l2a_compress.files import write_atomic
from l2a_compress.runtime.decoder import Array, GraphDecoder

PROMPT, TOKENS = 128, 16  # fewer where a bundle has fewer positions
_ROUNDS = 7


def calibrate(
    folder: Path,
    graphs: Sequence[GraphEntry],
    shape: ModelShape,
    *,
    in_place: bool,
    positions: int,
) -> dict[str, Any]:
    """Measures all graphs, one sequence at a time, as many threads as onnxruntime takes, and writes ``costs.json``.

    Returns:
        ``device``, ``prompt`` and ``graphs``: by name ``prefill_seconds`` of that prompt, ``decode_seconds`` of one
        token after it, ``peak_bytes`` and ``graph_bytes``.
    """
    seconds = _seconds(folder, graphs, shape, positions, in_place=in_place)
    found = {
        "device": processor(),
        "prompt": _sizes(positions)[0],
        "graphs": {
            graph.name: {
                "prefill_seconds": seconds[graph.name][0],
                "decode_seconds": seconds[graph.name][1],
                "peak_bytes": _peak(folder / graph.file, shape, positions, in_place=in_place),
                "graph_bytes": (folder / graph.file).stat().st_size,
            }
            for graph in graphs
        },
    }
    write_atomic(folder / COSTS_FILE, json.dumps(found, indent=2) + "\n")
    return found


def _seconds(
    folder: Path, graphs: Sequence[GraphEntry], shape: ModelShape, positions: int, *, in_place: bool
) -> dict[str, list[float]]:
    """Seconds of a prefill and of a decode step, by graph."""

    def opened(graph: GraphEntry) -> GraphDecoder:
        return GraphDecoder(folder / graph.file, in_place=in_place)

    def turns(*decoders: GraphDecoder) -> Array:
        rounds = [[_run(decoder, shape, positions) for decoder in decoders] for _ in range(_ROUNDS + 1)]
        return np.array(rounds[1:])  # the first one warms up

    first = next((graph for graph in graphs if graph.kind == "variant"), graphs[0])
    reference = opened(first)
    others = {graph.name: turns(reference, opened(graph)) for graph in graphs if graph is not first}
    alone = [each[:, 0] for each in others.values()] or [turns(reference)[:, 0]]
    usual = np.median(np.concatenate(alone), axis=0)
    ratios = {name: np.median(each[:, 1] / each[:, 0], axis=0) for name, each in others.items()}
    return {first.name: usual.tolist()} | {name: (ratio * usual).tolist() for name, ratio in ratios.items()}


def not_faster(graphs: Sequence[GraphEntry], costs: Mapping[str, Any]) -> list[GraphEntry]:
    """The variants that decode no faster than one of a larger budget that stays."""
    slow, stays = [], list[tuple[float, float]]()
    for graph in graphs:
        if graph.kind != "variant" or graph.budget is None:
            continue
        seconds = costs["graphs"][graph.name]["decode_seconds"]
        if any(budget > graph.budget and seconds >= other for budget, other in stays):
            slow.append(graph)
        else:
            stays.append((graph.budget, seconds))
    return slow


def _sizes(positions: int) -> tuple[int, int]:
    """Tokens of the prompt, and those behind it."""
    tokens = min(TOKENS, positions - 1)
    return min(PROMPT, positions - tokens), tokens


def _run(decoder: GraphDecoder, shape: ModelShape, positions: int) -> tuple[float, float]:
    """Seconds of a prefill, and of one decode step after it, of the dense allocation where the graph can choose."""
    prompt, steps = _sizes(positions)
    tokens = np.arange(max(prompt, steps), dtype=np.int64)[None] % shape.vocab_size
    inputs: dict[str, Array] = {}
    if "allocation" in decoder.inputs:
        inputs = {
            "budget": np.ones((1, 2), dtype=np.float32),
            "limits": np.zeros((1, 3), dtype=np.int64),
            "price": np.zeros(1, dtype=np.float32),
            "allocation": np.full((1, shape.num_layers), shape.num_groups, dtype=np.int64),
        }
    decoder.start(1, prompt + steps)
    began = time.perf_counter()
    decoder.step(tokens[:, :prompt], np.ones((1, prompt), dtype=np.int64), **inputs)
    middle = time.perf_counter()
    for step in range(steps):
        decoder.step(tokens[:, step : step + 1], np.ones((1, prompt + step + 1), dtype=np.int64), **inputs)
    return middle - began, (time.perf_counter() - middle) / steps


def _peak(path: Path, shape: ModelShape, positions: int, *, in_place: bool) -> int | None:
    """Bytes; None where the system does not tell."""
    given = f"{str(path)!r}, {shape.to_json()!r}, {positions!r}, {in_place!r}"
    return peak_of(f"from {__name__} import run_once; run_once({given})")


def run_once(path: str, shape: Mapping[str, Any], positions: int, in_place: bool) -> None:
    """Opens one graph and runs it."""
    _run(GraphDecoder(Path(path), in_place=in_place, threads=1), ModelShape.from_json(shape), positions)
