"""Speed of a bundle against what people use today: SmolLM2-135M on this machine's CPU, all engines in turns.

    python benchmarks/onnx_speed.py --artifact runs/smollm2/artifact
    python benchmarks/onnx_speed.py --artifact A --openvino PYTHON     # an interpreter that has openvino-genai

onnxruntime-genai, which the development set-up installs, and Transformers in bf16 always take part. Columns: a prefill
of 512 tokens; decode steps of batch 1 and 8 behind 64 and 448 tokens. Every round runs all engines, in an order that
turns by one; a figure is the median over rounds of the ratio of wall-clock times, with a 95 % bootstrap interval.
Peers run the dense base model, ours has its adapters merged, which is the same work. Bundles and peers' models are
made once, in --work; figures and a picture go to benchmarks/results/onnx_speed.json and .png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE, fetch
from measure import RESULTS, Results, ratio, shown, verdict

from l2a_compress.bundle import Bundle
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.modeling.loading import load_base

HERE = Path(__file__).resolve().parent
CHECKPOINT = "smollm2-135m"
COLUMNS = {
    "prefill 512": {"task": "prefill", "batch": 1, "length": 512, "tokens": 1},
    "decode b1 c64": {"task": "decode", "batch": 1, "length": 64, "tokens": 17},
    "decode b1 c448": {"task": "decode", "batch": 1, "length": 448, "tokens": 17},
    "decode b8 c64": {"task": "decode", "batch": 8, "length": 64, "tokens": 9},
    "decode b8 c448": {"task": "decode", "batch": 8, "length": 448, "tokens": 9},
}
PRECISIONS = ("fp32", "int8", "int4")


class Engine:
    """A process of engines.py."""

    def __init__(self, python: str, kind: str, path: Path, threads: int, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / "engines.py"), kind, str(path), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.log = log
        self._answer()

    def seconds(self, request: dict[str, Any]) -> float:
        """What the engine measured."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine stopped with code {self.process.wait()}; see {self.log}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True, help="of SmolLM2-135M, e.g. of smollm2.py train")
    beside = sys.executable if importlib.util.find_spec("onnxruntime_genai") else None
    parser.add_argument("--genai", default=beside, help="interpreter that has onnxruntime-genai (%(default)s)")
    parser.add_argument("--openvino", help="interpreter that has openvino-genai")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "speed", help="bundles (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_speed.json", help="figures (%(default)s)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bundles = {precision: _bundle(options, precision) for precision in PRECISIONS}
    results = Results(options.out)
    for threads in options.threads:
        print(f"{threads} thread{'s' if threads > 1 else ''}")
        section = _measure(options, bundles, threads)
        settings = {"rounds": options.rounds, "columns": COLUMNS}
        results.put(f"threads_{threads}", section, settings, threads=threads)
    draw(results.sections, options.out.with_suffix(".png"))
    print(f"figures: {options.out}, {options.out.with_suffix('.png')}")


def draw(sections: dict[str, Any], path: Path) -> None:
    """One row a number of threads: speed against each peer, and time at each budget against its cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5 * len(sections)), layout="constrained")
    rows = figure.subplots(len(sections), 2, squeeze=False)
    for (name, section), (left, right) in zip(sections.items(), rows, strict=True):
        speeds = {key: value for key, value in section["speed"].items() if not key.endswith("transformers bf16")}
        width = 0.8 / len(speeds)
        for at, (key, columns) in enumerate(speeds.items()):
            values = [columns[column] for column in COLUMNS]
            spread = [
                [value["median"] - value["low"] for value in values],
                [value["high"] - value["median"] for value in values],
            ]
            places = [place + at * width for place in range(len(COLUMNS))]
            left.bar(places, [value["median"] for value in values], width, yerr=spread, label=key, capsize=2)
        left.axhline(1, color="black", linewidth=0.8)
        left.set_xticks([place + 0.4 - width / 2 for place in range(len(COLUMNS))], list(COLUMNS))
        left.set_ylabel("speed, ratio")
        left.set_title(name.replace("_", " ") + ": dense graph / peer")
        left.legend(fontsize=7, ncols=2)
        for kind, marker in (("", "o"), ("if ", "s")):
            for precision in PRECISIONS:
                points = [
                    (cost, section["time"][f"{precision} {graph}"]["decode b1 c64"]["median"])
                    for graph, cost in section["cost"].items()
                    if graph.startswith("if ") == bool(kind)
                ]
                right.plot(*zip(*sorted(points), strict=True), marker=marker, label=f"{precision} {kind or 'variants'}")
        right.plot([0.3, 1], [0.3, 1], color="black", linewidth=0.8, label="time = cost")
        right.set_xlabel("cost fraction")
        right.set_ylabel("time of a token / dense")
        right.set_title("decode, batch 1, behind 64 tokens")
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _bundle(options: argparse.Namespace, precision: str) -> Path:
    folder: Path = options.work / f"bundle-{precision}"
    if not folder.exists():
        print(f"exporting {folder}")
        export(options.artifact, folder, ExportOptions(precision=precision, positions=2048))
    return folder


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


def _measure(options: argparse.Namespace, bundles: dict[str, Path], threads: int) -> dict[str, Any]:
    """All engines in turns: seconds by engine and column, and the ratios that have a bar."""
    log, engines, runs = options.work / "engines.log", [], {}

    def start(python: str, kind: str, path: Path) -> Engine:
        engines.append(Engine(python, kind, path, threads, log))
        return engines[-1]

    costs: dict[str, float] = {}
    try:
        for precision, folder in bundles.items():
            ours = start(sys.executable, "bundle", folder)
            for name, request, cost in _graphs(Bundle.load(folder)):
                runs[f"{precision} {name}"] = (ours, request)
                costs[name] = cost
        runs["transformers bf16"] = (start(sys.executable, "transformers", _base(options)), {})
        for precision in ("fp32", "int4") if options.genai else ():
            runs[f"genai {precision}"] = (start(options.genai, "genai", _genai(options, precision)), {})
        if options.openvino:
            file = fetch(CHECKPOINT, options.models)
            runs["openvino gguf q4_1"] = (start(options.openvino, "openvino", file), {})
        seconds = _rounds(runs, options.rounds)
    finally:
        for engine in engines:
            engine.close()
    return {"seconds": seconds, "cost": costs, **_ratios(seconds, costs)}


def _graphs(bundle: Bundle) -> list[tuple[str, dict[str, Any], float]]:
    """Each variant, and the ``If`` graph told to run what the variant runs."""
    found: list[tuple[str, dict[str, Any], float]] = []
    for entry in bundle.graphs:
        if entry.allocation is not None:
            kept = [len(groups) for groups in entry.allocation.groups]
            found.append((entry.name, {"graph": entry.name}, entry.cost))
            found.append((f"if {entry.name}", {"graph": "if", "kept": kept}, entry.cost))
    return found


def _rounds(runs: dict[str, tuple[Engine, dict[str, Any]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by run and column; one round more, which is thrown away, comes first."""
    names, seconds = list(runs), {name: {column: [] for column in COLUMNS} for name in runs}
    for number in range(-1, rounds):
        for column, task in COLUMNS.items():
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                engine, request = runs[name]
                took = engine.seconds({**task, **request})
                if number >= 0:
                    seconds[name][column].append(took)
        print(f"  round {number + 1}/{rounds}", end="\r", flush=True)
    return seconds


def _ratios(seconds: dict[str, dict[str, list[float]]], costs: dict[str, float]) -> dict[str, Any]:
    """Speeds against peers, and times of each budget against the dense graph of the same kind."""
    peers, budgets = {}, {}
    others = [name for name in seconds if not name.startswith(PRECISIONS)]
    for precision in PRECISIONS:
        dense = seconds[f"{precision} b1"]
        for other in others:
            peers[f"{precision} / {other}"] = _by_column(seconds[other], dense)
        peers[f"{precision} if / {precision}"] = _by_column(dense, seconds[f"{precision} if b1"])
        for name in costs:
            kind = "if b1" if name.startswith("if ") else "b1"
            budgets[f"{precision} {name}"] = _by_column(seconds[f"{precision} {name}"], seconds[f"{precision} {kind}"])
    _report(peers, budgets, costs)
    return {"speed": peers, "time": budgets}


def _by_column(above: dict[str, list[float]], below: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {column: ratio(above[column], below[column]) for column in COLUMNS}


def _report(peers: dict[str, Any], budgets: dict[str, Any], costs: dict[str, float]) -> None:
    for name, columns in peers.items():
        print(f"speed {name:32}", *(f"{column}: {shown(value)}" for column, value in columns.items()), sep="  ")
    bars: Sequence[tuple[str, str, float]] = (("fp32", "genai fp32", 0.97), ("int4", "genai int4", 0.97))
    for precision, other, bar in bars:
        for column, value in peers.get(f"{precision} / {other}", {}).items():
            verdict(f"{precision} / {other}, {column}: {shown(value)}", value["median"], bar, at_most=False)
    for precision in PRECISIONS:
        for column, value in peers[f"{precision} if / {precision}"].items():
            verdict(f"{precision} if / straight, {column}: {shown(value)}", value["median"], 0.96, at_most=False)
    for name, columns in budgets.items():
        graph = name.partition(" ")[2]
        bar = costs[graph] + (0.06 if graph.startswith("if ") else 0.03)
        for column, value in columns.items():
            if graph not in ("b1", "if b1"):
                verdict(f"time {name}, {column}: {shown(value)}", value["median"], round(bar, 3), at_most=True)


if __name__ == "__main__":
    main()
