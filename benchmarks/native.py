"""The C++ runtime: memory, speed against the Python runtime and onnxruntime-genai, switches, threads.

    cpp/prepare && python benchmarks/native.py [--parts memory kept speed skipped switch threads]

Builds cpp/bench, fetches a checkpoint, and exports bundles of it with gates that say the same for every prompt, as
training by search leaves them: speed and memory are those of trained bundles. Every figure compares processes that are
measured in turns. Figures go to benchmarks/results/native.json.

All processes ask for huge pages (glibc.malloc.hugetlb): without them the place of the weights alone decides.

- ``memory``: PSS and anonymous memory of the If graph, its router and five variants, over those of one dense variant
  opened the same way; with layers skipped alone (``layers``), the same with an If graph that writes no keys and values
  of layers that it skips (``lean``), and with two levels of heads among the variants (``heads``).
- ``kept``: what is held once all graphs have worked, and by the Python runtime with one variant open at a time
  (``python at``).
- ``speed``: processor time of a prefill of 512 tokens and of decode steps, one thread, which other work on the machine
  does not stretch much. onnxruntime-genai runs the very same dense graph and weights.
- ``skipped``: processor time of the If graph where 18 of 30 layers are skipped (budget 0.4) over that with all of them,
  where it writes keys and values of skipped layers, and where it does not (``lean``).
- ``switch``: a budget that changes in the middle of a request, and the step after it.
- ``threads``: processor time of a token where 8 threads share a runtime, over that of one thread: 1 without contention.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE, SOURCES
from measure import RESULTS, Peer, Results, ratio, shown, turned, verdict
from stale import made
from untrained import CHECKPOINT, allocation, untrained

from l2a_compress.artifact import ArtifactConfig
from l2a_compress.exporters.onnx import ExportOptions, export

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "cpp-bench"
PRECISIONS = ("fp32", "int8")
COLUMNS = {
    "prefill 512": {"batch": 1, "length": 512, "tokens": 1},
    "decode b1 c64": {"batch": 1, "length": 64, "tokens": 24},
    "decode b1 c448": {"batch": 1, "length": 448, "tokens": 24},
    "decode b8 c64": {"batch": 8, "length": 64, "tokens": 8},
}
LONG_BATCH = {"decode b8 c448": {"batch": 8, "length": 448, "tokens": 8}}
LADDER = {1.0: (0, 3), 0.9: (1, 3), 0.8: (2, 2), 0.7: (3, 2), 0.6: (4, 1)}  # tenths of layers skipped; thirds of heads
BUDGETS = tuple(LADDER)
ROUNDS_OF_A_PROCESS = 3  # then another takes its place, as the places of its weights in memory are a matter of luck
BARS = {"layers": 1.10, "lean": 1.10, "heads": 1.25}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--checkpoint", choices=sorted(SOURCES), default=CHECKPOINT, help="what serves (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "native", help="bundles (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of one operator (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of each figure (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "native.json", help="figures (%(default)s)")
    options = parser.parse_args()
    options.work = options.work / options.checkpoint
    build_bench()
    export_bundles(options)
    results = Results(options.out)
    for part in options.parts:
        measure = PARTS[part]
        found = {precision: measure(options, precision) for precision in PRECISIONS}
        settings = {"rounds": options.rounds, "ladder": LADDER, "columns": COLUMNS}
        section = part if options.threads == 1 else f"{part}_threads_{options.threads}"
        results.put(section, found, settings, threads=options.threads)
    print(f"figures: {options.out}")


def build_bench() -> None:
    """Builds the program that is measured."""
    for command in (["-S", ROOT / "cpp", "-B", BUILD, "-DL2A_BUILD_BENCHMARKS=ON"], ["--build", BUILD]):
        subprocess.run(["cmake", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def _native(options: argparse.Namespace, kind: str, precision: str, graphs: int = 7) -> Peer:
    folder = options.work / f"{kind}-{precision}"
    return Peer(BUILD / "bench" / "l2a_bench", folder, str(options.threads), str(graphs), threads=1)


def _peer(options: argparse.Namespace, kind: str, precision: str) -> Peer:
    folder = options.work / f"layers-{precision}"
    return Peer(sys.executable, HERE / "native_peers.py", kind, folder, str(options.threads), threads=1)


def export_bundles(options: argparse.Namespace) -> None:
    """Bundles of one dense variant, of layers skipped, twice, and of fewer heads besides; made once."""
    for kind in ("dense", *BARS):
        heads = kind == "heads"
        folder = options.work / f"artifact-{'heads' if heads else 'layers'}"
        artifact = untrained(folder, options.models, heads=heads, checkpoint=options.checkpoint)
        shape = ArtifactConfig.load(artifact).shape
        layers, groups = shape.num_layers, shape.num_groups
        kept = tuple(
            (
                budget,
                allocation(
                    skipped=-(-tenths * layers // 10),
                    narrowed=8 if heads else 0,
                    width=-(-thirds * groups // 3),
                    layers=layers,
                    groups=groups,
                ),
            )
            for budget, (tenths, thirds) in LADDER.items()
            if kind != "dense" or budget == BUDGETS[0]
        )
        for precision in PRECISIONS:
            settings = ExportOptions(
                precision=precision, allocations=kept, if_graph=kind != "dense", whole_cache=kind != "lean"
            )
            folder = options.work / f"{kind}-{precision}"
            made(folder, {"export": repr(settings)}, functools.partial(_export, artifact, folder, settings))


def _export(artifact: Path, folder: Path, settings: ExportOptions) -> None:
    print(f"exporting {folder.name}", flush=True)
    export(artifact, folder, settings)


def _memory(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Kilobytes of each kind of bundle, opened."""
    found: dict[str, Any] = {}
    for kind in ("dense", *BARS):
        worker = _native(options, kind, precision)
        found[kind] = worker.ask(task="memory")
        worker.close()
    for kind, bar in BARS.items():
        for name in ("Pss", "Anonymous"):
            share = found[kind][name] / found["dense"][name]
            text = f"{precision} {kind}: {name} {found[kind][name] / 1000:.0f} MB, {share:.3f} x dense"
            found[f"{kind} {name} / dense"] = round(share, 4)
            verdict(text, share, bar, at_most=True)
    return found


def _kept(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Kilobytes once each graph of a process has run."""
    found: dict[str, Any] = {}
    for kind in ("dense", "layers"):
        worker = _native(options, kind, precision)
        found[kind] = _worked(worker, BUDGETS[:1] if kind == "dense" else BUDGETS, kind != "dense")
        worker.close()
    python = _peer(options, "python", precision)  # its two engines hold the If graph and one variant
    found["python"] = _worked(python, BUDGETS, True)
    python.close()
    variants = _peer(options, "variants", precision)
    for budget, turn in ((BUDGETS[0], ""), (BUDGETS[-1], ""), (BUDGETS[0], " again")):
        found[f"python at {budget:g}{turn}"] = _worked(variants, [budget], False)
    variants.close()
    for name, memory in found.items():
        print(f"{precision} {name}: {memory['Anonymous'] / 1000:.0f} MB once it has worked")
    return found


def _worked(worker: Peer, budgets: Sequence[float], if_graph: bool) -> dict[str, int]:
    """Kilobytes once each budget has computed four prompts at a time, and written some tokens."""
    for serve in ("variants", "if") if if_graph else ("variants",):
        for budget in budgets:
            worker.ask(task="step", serve=serve, batch=4, length=512, tokens=8, budget=budget, finish=True)
    return worker.ask(task="memory")


def _in_turns(
    start: Mapping[str, Callable[[], Peer]],
    runs: Mapping[str, tuple[str, dict[str, Any]]],
    columns: Mapping[str, dict[str, Any]],
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """Seconds by run and column. ``runs`` name a process of ``start`` and what it is asked besides the column."""
    names = list(runs)
    seconds: dict[str, dict[str, list[float]]] = {name: {column: [] for column in columns} for name in names}
    for first in range(0, rounds, ROUNDS_OF_A_PROCESS):
        workers = {name: make() for name, make in start.items()}
        for number in range(first - 1, min(first + ROUNDS_OF_A_PROCESS, rounds)):
            for column, task in columns.items():
                for name in turned(names, number):
                    process, asked = runs[name]
                    answer = workers[process].ask(task="step", **task, **asked)
                    if number >= first:  # the one before warms up
                        seconds[name][column].append(answer["prefill" if column.startswith("prefill") else "decode"])
        for worker in workers.values():
            worker.close()
    return seconds


def _speed(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Seconds of all engines in turns, and ratios of speed."""
    start = {
        "native": functools.partial(_native, options, "layers", precision),
        "python": functools.partial(_peer, options, "python", precision),
        "genai": functools.partial(_peer, options, "genai", precision),
    }
    runs: dict[str, tuple[str, dict[str, Any]]] = {"genai": ("genai", {})}
    for process in ("native", "python"):
        runs[process], runs[f"{process} if"] = ((process, {"serve": serve}) for serve in ("variants", "if"))
    seconds = _in_turns(start, runs, COLUMNS, options.rounds)
    found: dict[str, Any] = {"seconds": seconds}
    for ours, peer, bar in (("native", "python", 1.0), ("native if", "python if", 1.0), ("native", "genai", 0.97)):
        for column in COLUMNS:
            speed = ratio(seconds[peer][column], seconds[ours][column])
            found[f"{ours} / {peer}: {column}"] = speed
            verdict(f"{precision} {ours} / {peer}, {column}: {shown(speed)}", speed["median"], bar, at_most=False)
    return found


def _skipped(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Time of the If graph at 0.4 of the compute over that at 1.0."""
    kinds = ("layers", "lean")
    start = {kind: functools.partial(_native, options, kind, precision) for kind in kinds}
    runs = {f"{kind} {budget:g}": (kind, {"serve": "if", "budget": budget}) for kind in kinds for budget in (1.0, 0.4)}
    seconds = _in_turns(start, runs, COLUMNS | LONG_BATCH, options.rounds)
    found: dict[str, Any] = {"seconds": seconds}
    for kind in kinds:
        for column in COLUMNS | LONG_BATCH:
            time = found[f"{kind}: {column}"] = ratio(seconds[f"{kind} 0.4"][column], seconds[f"{kind} 1"][column])
            print(f"{precision} {kind}, {column}: time at 0.4 / at 1: {shown(time)}")
    return found


def _switch(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Milliseconds of a change of budget down a ladder, and of the step after it, against a step without one."""
    found: dict[str, Any] = {}
    worker = _native(options, "layers", precision)
    for serve, turns in (("variants", 1), ("if", 6)):
        asked = {"serve": serve, "length": 64, "budgets": BUDGETS, "turns": turns, "rounds": 60 if turns == 1 else 20}
        answer = worker.ask(task="switch", **asked)
        calls = answer["first"] if serve == "variants" else answer["again"]
        step, p99 = statistics.median(answer["plain"]) * 1e3, _p99(calls) * 1e3
        found[serve] = {
            "p50_ms": statistics.median(calls) * 1e3,
            "p99_ms": p99,
            "first_p99_ms": _p99(answer["first"]) * 1e3,  # of the If graph: the router reads the prompt
            "step_ms": step,
            "step_after_ms": statistics.median(answer["after"]) * 1e3,
            "switches": len(calls),
        }
        verdict(f"{precision} {serve}: switch p99 {p99:.3f} ms of {len(calls)}", p99, min(1.0, step), at_most=True)
        first = found[serve]["first_p99_ms"]
        print(f"  first time p99 {first:.3f} ms, step {step:.2f} ms, step after {found[serve]['step_after_ms']:.2f} ms")
    worker.close()
    return found


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def _threads(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Processor time of a token with 8 threads over that with one."""
    worker = _native(options, "layers", precision)
    one, eight = [], []
    for _ in range(options.rounds):
        one.append(worker.ask(task="threads", serve="variants", threads=1, tokens=32)["cpu"])
        eight.append(worker.ask(task="threads", serve="variants", threads=8, tokens=4)["cpu"])
    worker.close()
    found = ratio(eight, one)
    verdict(
        f"{precision}: processor time of a token, 8 threads / 1: {shown(found)}", found["median"], 1.1, at_most=True
    )
    return {"one": one, "eight": eight, "ratio": found}


PARTS = {"memory": _memory, "kept": _kept, "speed": _speed, "skipped": _skipped, "switch": _switch, "threads": _threads}


if __name__ == "__main__":
    main()
