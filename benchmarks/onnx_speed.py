"""Speed of a bundle against what people use today: SmolLM2-135M on this machine's CPU, all engines in turns.

    python benchmarks/onnx_speed.py
    python benchmarks/onnx_speed.py --openvino PYTHON --llamacpp PYTHON

The two are interpreters that have openvino-genai and xllamacpp, each in an environment of its own.

onnxruntime-genai, which the development set-up installs, and Transformers in bf16 always take part. Columns: a prefill
of 512 tokens; decode steps of batch 1 and 8 behind 64 and 448 tokens. Every round runs all engines, in an order that
turns by one; a figure is the median over rounds of the ratio of wall-clock times, with a 95 % bootstrap interval.
Engines are started anew several times, since the place of the weights in memory alone changes their speed by a tenth;
all of them ask for huge pages (glibc.malloc.hugetlb). Peers run the dense base model; ours has adapters, merged, and
gates, neither of them trained, which is the work of a trained bundle. Bundles and peers' models are made once, in
--work; figures go to benchmarks/results/onnx_speed.json, a picture to docs/images.

A time is compared with two costs: of the layers alone, which is what a budget counts, and of the whole step, where the
output head and the attention over the context, which every budget pays, count as well. The bars are of the second.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE, fetch
from measure import RESULTS, Peer, Results, ratio, shown, turned, verdict
from stale import made
from untrained import CHECKPOINT, GROUPS, LAYERS, allocation, untrained

from l2a_compress.allocation import Allocation
from l2a_compress.bundle import Bundle
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.modeling.loading import load_base

HERE = Path(__file__).resolve().parent
COLUMNS = {
    "prefill 512": {"task": "prefill", "batch": 1, "length": 512, "tokens": 1},
    "decode b1 c64": {"task": "decode", "batch": 1, "length": 64, "tokens": 17},
    "decode b1 c448": {"task": "decode", "batch": 1, "length": 448, "tokens": 17},
    "decode b8 c64": {"task": "decode", "batch": 8, "length": 64, "tokens": 9},
    "decode b8 c448": {"task": "decode", "batch": 8, "length": 448, "tokens": 9},
}
BUNDLES = {  # name: (precision, block)
    "fp32": ("fp32", None),
    "int8": ("int8", None),
    "int4": ("int4", None),
    "int4/128": ("int4", 128),
}
LADDER = {1.0: 0, 0.85: 5, 0.7: 9, 0.55: 14, 0.4: 18}  # budget: skipped layers of 30
HEADS = {"2/3 heads": 2, "1/3 heads": 1}  # all layers, of 3 KV groups
IF_KINDS: dict[str, dict[str, bool]] = {  # what is exported otherwise
    "if": {},
    "lean-if": {"whole_cache": False},  # the cache holds the layers that ran alone
    "width-if": {"head_widths": True},  # a layer computes only the groups that are kept
}
IF_TOLD = {"if": ("b1", "b0.4", "1/3 heads"), "lean-if": ("b1", "b0.4"), "width-if": ("b1", "1/3 heads")}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    picture = HERE.parent / "docs" / "images" / "onnx_speed.png"
    parser.add_argument("--picture", type=Path, default=picture, help="(%(default)s)")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: tables and picture of the figures in --out"
    )
    beside = sys.executable if importlib.util.find_spec("onnxruntime_genai") else None
    parser.add_argument("--genai", default=beside, help="interpreter that has onnxruntime-genai (%(default)s)")
    parser.add_argument("--openvino", help="interpreter that has openvino-genai")
    parser.add_argument("--llamacpp", help="interpreter that has xllamacpp")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "speed", help="bundles (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (%(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="how often engines are started (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of each start (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_speed.json", help="figures (%(default)s)")
    options = parser.parse_args()
    if options.report:
        found = Results(options.out).sections
        print(tables(found))
        draw(found, options.picture)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    bundles = {name: _bundles(options, name) for name in BUNDLES}
    results = Results(options.out)
    for threads in options.threads:
        print(f"{threads} thread{'s' if threads > 1 else ''}")
        section = _measure(options, bundles, threads)
        settings = {"rounds": options.starts * options.rounds, "starts": options.starts, "columns": COLUMNS}
        results.put(f"threads_{threads}", section, settings, threads=threads)
    draw(results.sections, options.picture)
    print(f"figures: {options.out}, {options.picture}")


def tables(sections: dict[str, Any]) -> str:
    """The figures as Markdown: medians, and of the peers' ratios the intervals."""
    lines = []
    for name, section in sections.items():
        head = ["speed, " + name.replace("_", " "), *COLUMNS]
        rows = [[key, *(shown(values[column]) for column in COLUMNS)] for key, values in section["speed"].items()]
        lines += _table(head, rows)
        rows = []
        for key, values in section["time"].items():
            if key.endswith("b1"):
                continue
            pairs = (f"{values[column]['median']:.2f} / {section['cost'][key][column]:.2f}" for column in COLUMNS)
            rows.append([key, f"{section['cost'][key]['layers']:.2f}", *pairs])
        lines += _table(["time / cost of the step, " + name.replace("_", " "), "cost of the layers", *COLUMNS], rows)
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def draw(sections: dict[str, Any], path: Path) -> None:
    """One row a number of threads: speed against each peer, and time at each budget against its cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5 * len(sections)), layout="constrained")
    rows = figure.subplots(len(sections), 2, squeeze=False)
    for (name, section), (left, right) in zip(sections.items(), rows, strict=True):
        reference = "transformers bf16"
        dense = {f"{bundle} b1": f"this library, {bundle}" for bundle in BUNDLES}
        labels = dense | {key: key for key in section["seconds"] if key not in section["cost"] and key != reference}
        width = 0.8 / len(labels)
        for at, (key, label) in enumerate(labels.items()):
            found = _by_column(section["seconds"][reference], section["seconds"][key])
            values = [found[column] for column in COLUMNS]
            spread = [
                [value["median"] - value["low"] for value in values],
                [value["high"] - value["median"] for value in values],
            ]
            places = [place + at * width for place in range(len(COLUMNS))]
            colour, hatch = f"C{at % len(dense)}", "" if key in dense else "//"
            heights = [value["median"] for value in values]
            left.bar(places, heights, width, yerr=spread, label=label, capsize=2, color=colour, hatch=hatch, alpha=0.85)
        left.axhline(1, color="black", linewidth=0.8)
        left.set_xticks([place + 0.4 - width / 2 for place in range(len(COLUMNS))], list(COLUMNS))
        left.set_ylabel("speed / Transformers bf16")
        left.set_title(name.replace("_", " ") + ": dense graphs and peers (hatched)")
        left.set_ylim(top=1.35 * left.get_ylim()[1])  # room for the legend
        left.legend(fontsize=7, ncols=3)
        column = "decode b1 c64"
        for kind, marker in (("b", "o"), ("if b", "s"), ("lean-if b", "^")):
            for name in BUNDLES:
                points = [
                    (costs[column], section["time"][graph][column]["median"])
                    for graph, costs in section["cost"].items()
                    if graph.startswith(f"{name} {kind}")
                ]
                label = f"{name} {'variants' if kind == 'b' else kind.rpartition(' ')[0]}"
                right.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
        right.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, label="time = cost")
        right.set_xlabel("cost of the step, head and attention included / dense")
        right.set_ylabel("time of a token / dense")
        right.set_title("decode, batch 1, behind 64 tokens")
        right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bundles(options: argparse.Namespace, name: str) -> dict[str, Path]:
    """Of one precision: variants (``b``), kinds of ``If`` graphs, and variants of fewer heads; made once."""
    precision, block = BUNDLES[name]
    artifact = untrained(options.work / "artifact", options.models, heads=True)
    common = {"precision": precision, "block": block, "positions": 2048}
    ladder = tuple((budget, allocation(skipped=skipped)) for budget, skipped in LADDER.items())
    pruned = tuple((width / GROUPS, allocation(narrowed=LAYERS, width=width)) for width in HEADS.values())
    kinds: dict[str, dict[str, Any]] = {
        "b": {"allocations": ladder, "if_graph": False},
        **{kind: {"budgets": (), **more} for kind, more in IF_KINDS.items()},
        "heads": {"allocations": pruned, "if_graph": False},
    }
    folders = {kind: options.work / f"{name.replace('/', '-')}-{kind}" for kind in kinds}
    for kind, more in kinds.items():
        settings = ExportOptions(**common, **more)
        made(folders[kind], {"export": repr(settings)}, functools.partial(_export, artifact, folders[kind], settings))
    return folders


def _export(artifact: Path, folder: Path, settings: ExportOptions) -> None:
    print(f"exporting {folder}", flush=True)
    export(artifact, folder, settings)


def _base(options: argparse.Namespace) -> Path:
    """The dense base model as a Hugging Face folder."""
    folder: Path = options.work / "base"
    if not folder.exists():
        file = fetch(CHECKPOINT, options.models)
        model, tokenizer = load_base(str(file.parent), gguf_file=file.name, dtype="float32")
        tokenizer.save_pretrained(str(folder))
        model.save_pretrained(str(folder))
    return folder


def _genai(options: argparse.Namespace, precision: str) -> Path:
    """What genai's own model builder makes of the base model for a CPU."""
    folder: Path = options.work / f"genai-{precision}"
    if not folder.exists():
        builder = ["-m", "onnxruntime_genai.models.builder", "-i", str(_base(options)), "-o", str(folder)]
        subprocess.run(
            [sys.executable, *builder, "-p", precision, "-e", "cpu", "-c", str(options.work / "cache")], check=True
        )
    return folder


def _measure(options: argparse.Namespace, bundles: dict[str, dict[str, Path]], threads: int) -> dict[str, Any]:
    """All engines in turns: seconds by engine and column, and the ratios that have a bar."""
    costs = {f"{name} {graph}": cost for name, made in bundles.items() for _, graph, _, cost in _graphs(made)}
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(options.starts):
        engines: dict[tuple[str, str, Path], Peer] = {}

        def start(python: str, kind: str, path: Path, engines: dict[Any, Peer] = engines) -> Peer:
            if (python, kind, path) not in engines:
                engines[python, kind, path] = Peer(
                    *(python, HERE / "engines.py", kind, path, str(threads)), log=options.work / "engines.log"
                )
            return engines[python, kind, path]

        try:
            runs = {}
            for name, made in bundles.items():
                for folder, graph, request, _ in _graphs(made):
                    runs[f"{name} {graph}"] = (start(sys.executable, "bundle", folder), request)
            runs["transformers bf16"] = (start(sys.executable, "transformers", _base(options)), {})
            for precision in ("fp32", "int4") if options.genai else ():
                runs[f"genai {precision}"] = (start(options.genai, "genai", _genai(options, precision)), {})
            for kind, python in (("openvino", options.openvino), ("llamacpp", options.llamacpp)):
                if python:
                    runs[f"{kind} gguf q4_1"] = (start(python, kind, fetch(CHECKPOINT, options.models)), {})
            print(f"  start {number + 1}/{options.starts}", flush=True)
            _rounds(runs, options.rounds, seconds)
        finally:
            for engine in engines.values():
                engine.close()
    return {"seconds": seconds, "cost": costs, **_ratios(seconds, costs)}


def _graphs(made: dict[str, Path]) -> Iterator[tuple[Path, str, dict[str, Any], dict[str, float]]]:
    """Each variant, and ``If`` graphs told to run what some of them run: (folder, name, request, costs)."""
    bundle = Bundle.load(made["b"])
    ladder = {entry.name: (made["b"], entry) for entry in bundle.variants}
    narrow = Bundle.load(made["heads"]).variants
    ladder |= {label: (made["heads"], entry) for label, entry in zip(HEADS, narrow, strict=True)}
    for name, (folder, entry) in ladder.items():
        assert entry.allocation is not None
        cost = _costs(bundle, entry.allocation)
        yield folder, name, {"graph": entry.name}, cost
        for kind, told in IF_TOLD.items():
            if name in told:
                kept = [len(groups) for groups in entry.allocation.groups]
                yield made[kind], f"{kind} {name}", {"graph": "if", "kept": kept}, cost


def _costs(bundle: Bundle, allocation: Allocation) -> dict[str, float]:
    """Shares of the dense model's cost: of its layers, and of a whole step of each column."""
    cost, shape = bundle.cost, bundle.shape
    dense = Allocation.dense(shape.num_layers, shape.num_groups)

    def step(kept: Allocation, task: dict[str, Any]) -> int:
        if task["task"] == "decode":
            return cost.flops(kept, task["length"])
        head = cost.flops(kept, 0) - cost.units(kept)  # of the last token alone
        return head + sum(cost.flops(kept, seen) - head for seen in range(1, task["length"] + 1))

    steps = {column: round(step(allocation, task) / step(dense, task), 4) for column, task in COLUMNS.items()}
    return {"layers": cost.fraction(allocation), **steps}


def _rounds(
    runs: dict[str, tuple[Peer, dict[str, Any]]], rounds: int, seconds: dict[str, dict[str, list[float]]]
) -> None:
    """Adds to the seconds by run and column; short runs, which are thrown away, come first."""
    names = list(runs)
    for engine, request in runs.values():
        for task, length in (("prefill", 64), ("decode", 64)):
            engine.ask(task=task, batch=1, length=length, tokens=3, **request)
    for number in range(rounds):
        for column, task in COLUMNS.items():
            for name in turned(names, number):
                engine, request = runs[name]
                took = float(engine.ask(**task, **request)["seconds"])
                seconds.setdefault(name, {key: [] for key in COLUMNS})[column].append(took)
        print(f"  round {number + 1}/{rounds}", flush=True)


def _ratios(seconds: dict[str, dict[str, list[float]]], costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Speeds against peers, and times of each budget against the dense graph of the same kind."""
    peers, budgets = {}, {}
    others = [name for name in seconds if name not in costs]
    for name in BUNDLES:
        dense = seconds[f"{name} b1"]
        for other in others:
            peers[f"{name} / {other}"] = _by_column(seconds[other], dense)
        for kind in IF_KINDS:
            peers[f"{name} {kind} / {name}"] = _by_column(dense, seconds[f"{name} {kind} b1"])
    for graph in costs:
        name, _, kind = graph.partition(" ")
        first = kind.partition(" ")[0]
        dense = f"{first} b1" if first in IF_KINDS else "b1"
        budgets[graph] = _by_column(seconds[graph], seconds[f"{name} {dense}"])
    _report(peers, budgets, costs)
    return {"speed": peers, "time": budgets}


def _by_column(above: dict[str, list[float]], below: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {column: ratio(above[column], below[column]) for column in COLUMNS}


def _report(peers: dict[str, Any], budgets: dict[str, Any], costs: dict[str, dict[str, float]]) -> None:
    """Prints every figure that has a bar."""
    for name, columns in peers.items():
        print(f"speed {name:32}", *(f"{column}: {shown(value)}" for column, value in columns.items()), sep="  ")
    bars: Sequence[tuple[str, float]] = (("fp32 / genai fp32", 0.97), ("int4 / genai int4", 0.97))
    bars = (*bars, *((f"{name} {kind} / {name}", 0.96) for name in BUNDLES for kind in IF_KINDS))
    for name, bar in bars:
        for column, value in peers.get(name, {}).items():
            verdict(f"{name}, {column}: {shown(value)}", value["median"], bar, at_most=False)
    for column in list(COLUMNS)[1:]:  # decode: our fastest precision against the fastest peer
        others = {name.partition(" / ")[2] for name in peers if "if /" not in name}
        best = max(BUNDLES, key=lambda name: peers[f"{name} / transformers bf16"][column]["median"])
        value, peer = min((peers[f"{best} / {other}"][column]["median"], other) for other in others)
        verdict(f"best of all, {column}: {best} / {peer} {value:.3f}", value, 1.0, at_most=False)
    for name, columns in budgets.items():
        kind = name.partition(" ")[2]
        if kind.endswith("b1"):
            continue
        allowed = 0.06 if kind.partition(" ")[0] in IF_KINDS else 0.03
        for column, value in columns.items():
            cost = costs[name][column]
            bar = (1 + cost) / 2 if kind in HEADS else cost + allowed
            text = f"time {name}, {column}: {shown(value)}, cost {cost:.3f} (layers alone {costs[name]['layers']:.3f})"
            verdict(text, value["median"], round(bar, 3), at_most=True)


if __name__ == "__main__":
    main()
