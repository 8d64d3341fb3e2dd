"""What head gates are worth at equal measured latency: an artifact with them against one of layer gates alone.

    python benchmarks/frontier.py run short && python benchmarks/frontier.py run layers
    python benchmarks/head_latency.py --heads DIR/short-s0/artifact --layers DIR/layers-s0/artifact

Both are exported, a static variant at each budget, and all variants take turns at the same requests in onnxruntime.
Each point of the layer gates is then compared, problem by problem, with the largest point of the other artifact that
takes no more time (to 2 %). Figures go to benchmarks/results/head_latency.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Results, interleaved, progress

from l2a_compress.evaluation.frontier import evaluate
from l2a_compress.evaluation.statistics import paired
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.store import load_artifact

BUDGETS = (1.0, 0.92, 0.87, 0.84, 0.8, 0.75, 0.71, 0.67, 0.64, 0.59, 0.55, 0.5)
BATCHES = (1, 16)
PROMPT, TOKENS = 96, 32
EVEN = 1.02  # times that differ by no more count as equal


def request(decoder: GraphDecoder, batch: int, vocabulary: int, _: int) -> None:
    """A prefill and the decode steps behind it."""
    tokens = np.arange(batch * PROMPT, dtype=np.int64).reshape(batch, PROMPT) % vocabulary
    decoder.start(batch, PROMPT + TOKENS)
    decoder.step(tokens, np.ones((batch, PROMPT), dtype=np.int64))
    for step in range(TOKENS):
        decoder.step(tokens[:, step : step + 1], np.ones((batch, PROMPT + step + 1), dtype=np.int64))


def quality(artifact: Path, problems: int) -> list[dict[str, Any]]:
    """The points of one artifact under the cap contract."""
    loaded = load_artifact(artifact)
    settings = replace(loaded.recipe.evaluation, budgets=BUDGETS, contracts=("cap",), problems=problems, baselines=())
    report = evaluate(loaded, settings, data=DataConfig(), seed=7, think_shares=(), progress=progress)
    names = ("budget", "cost", "layer_sparsity", "head_sparsity", "accuracy", "outcomes", "distinct_allocations")
    return [{name: getattr(point, name) for name in names} for point in report.points]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=Path, required=True, help="an artifact with head gates")
    parser.add_argument("--layers", type=Path, required=True, help="one without")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "head_latency.json", help="figures (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    artifacts = {"heads": options.heads, "layers": options.layers}
    found = {name: quality(artifact, options.problems) for name, artifact in artifacts.items()}
    with tempfile.TemporaryDirectory() as work:
        runs = {}
        for name, artifact in artifacts.items():
            bundle = export(artifact, Path(work) / name, ExportOptions(budgets=BUDGETS, if_graph=False))
            for point, variant in zip(found[name], bundle.variants, strict=True):
                if point["distinct_allocations"] != 1 or abs(point["cost"] - variant.cost) > 1e-6:
                    raise SystemExit(f"{name} at {point['budget']}: the variant is not what was measured")
                decoder = GraphDecoder(Path(work) / name / variant.file, in_place=True, threads=options.threads)
                for batch in BATCHES:
                    runs[f"{name} {point['budget']} {batch}"] = partial(
                        request, decoder, batch, bundle.shape.vocab_size
                    )
        spent = interleaved(runs, options.rounds)
    for name, points in found.items():
        for point in points:
            for batch in BATCHES:
                times = spent[f"{name} {point['budget']} {batch}"]["wall"]
                point[f"seconds_batch{batch}"] = statistics.median(times)
    rows = []
    for batch in BATCHES:
        key = f"seconds_batch{batch}"
        for theirs in found["layers"]:
            within = [point for point in found["heads"] if point[key] <= EVEN * theirs[key]]
            if not within:
                continue
            ours = max(within, key=lambda point: point["cost"])
            delta, low, high = paired(ours["outcomes"], theirs["outcomes"])
            names = ("budget", "cost", "accuracy", key)
            sides = {side: [point[name] for name in names] for side, point in (("heads", ours), ("layers", theirs))}
            rows.append({"batch": batch, **sides, "delta": delta, "low": low, "high": high})
            print(
                f"batch {batch}: layers alone {theirs['cost']:.3f} of the compute, {1e3 * theirs[key]:.2f} ms, "
                f"{100 * theirs['accuracy']:.2f} %; heads {ours['cost']:.3f}, {1e3 * ours[key]:.2f} ms, "
                f"{100 * ours['accuracy']:.2f} %: {100 * delta:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
            )
    settings = {name: getattr(options, name) for name in ("problems", "rounds", "threads")}
    settings |= {"budgets": BUDGETS, "prompt": PROMPT, "tokens": TOKENS}
    Results(options.out).put("head_latency", {"points": found, "compared": rows}, settings, threads=options.threads)


if __name__ == "__main__":
    main()
