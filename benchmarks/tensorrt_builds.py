"""What engines of TensorRT-RTX cost to build, without a GPU: seconds, peak memory and size, for several models.

    python benchmarks/tensorrt_builds.py                      # all of them, an hour on two cores and 25 GB of disk
    python benchmarks/tensorrt_builds.py --models smollm2-135m

`smollm2-135m` has its real weights (``fetch_models.py``); the others are full in width, with random weights and fewer
layers. `llama-3-8b` is made with one and with two gated layers beside its two always-on ones, from which 32 layers are
extrapolated. Gates are not trained: what they choose does not change what is built. Each export and each build runs
alone in a process of its own, whose peak of resident memory is read when it ends. Every plan is checked for a clean
header. Figures go to benchmarks/results/tensorrt_builds.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import RESULTS, Results
from tensorrt_models import LAYERS, make_artifact, nested

from l2a_compress.bundle import WEIGHT_FILE, Bundle
from l2a_compress.engines import engines, open_engine
from l2a_compress.exporters.builders import TensorRTRTX
from l2a_compress.exporters.engine_recipes import EngineOptions
from l2a_compress.exporters.onnx import ExportOptions, export

GPUS = ("8.6", "8.9", "12.0")
BUDGETS = (1.0, 0.85, 0.7, 0.55, 0.4)
_DEEP = 32  # layers of the real Llama-3-8B


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "tensorrt_builds.json", help="figures (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for models and bundles; default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args()
    if options.child:
        _child(json.loads(options.child))
        return
    results = Results(options.out)
    settings = {"gpus": GPUS, "budgets": BUDGETS, "precision": "fp16", "version": TensorRTRTX().version}
    settings = json.loads(json.dumps(settings))
    for model in options.models:
        if results.get(model, settings) is None:
            found = {f"{layers} layers": _measured(model, layers, options.work) for layers in LAYERS[model]}
            results.put(model, found, settings, threads=len(os.sched_getaffinity(0)))
        _show(model, results.sections[model])
    print(f"figures: {options.out}")


def _measured(model: str, layers: int, work: Path | None) -> dict[str, Any]:
    """Export and all builds of one model."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        task = {"model": model, "layers": layers, "folder": name}
        _run(task | {"do": "artifact"})
        found: dict[str, Any] = {"export": _run(task | {"do": "export"})}
        shutil.rmtree(folder / "base", ignore_errors=True)
        bundle = folder / "bundle"
        names = [each.recipe.graph for each in engines(bundle, Bundle.load(bundle))]
        found["weight_bytes"] = (bundle / WEIGHT_FILE).stat().st_size
        found["engines"] = {graph: _run(task | {"do": "build", "graph": graph}) for graph in names}
        whole = Bundle.load(bundle)
        for graph, figures in found["engines"].items():
            figures |= _plan(bundle, whole, graph)
            print(f"{model} {layers} layers, {graph}: {_words(figures)}", flush=True)
        return found


def _plan(folder: Path, bundle: Bundle, graph: str) -> dict[str, Any]:
    """Bytes of an engine, and what TensorRT-RTX says of its header."""
    import tensorrt_rtx as trt

    version = TensorRTRTX().version
    _, data = open_engine(folder, bundle, graph, "trt-rtx", version=version, capability=GPUS[0])
    diagnostics = int(trt.Runtime(trt.Logger(trt.Logger.ERROR)).get_engine_validity(data)[1])
    if diagnostics:
        raise SystemExit(f"{graph}: the header of its engine has diagnostics {diagnostics}")
    return {"bytes": len(data), "diagnostics": diagnostics}


def _run(task: Mapping[str, Any]) -> dict[str, Any]:
    """Wall seconds, processor seconds and peak resident bytes of a task in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    began = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{task} failed")
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _child(task: Mapping[str, Any]) -> None:
    folder = Path(task["folder"])
    if task["do"] == "artifact":
        make_artifact(task["model"], task["layers"], folder)
    elif task["do"] == "export":
        first = task["layers"] == LAYERS[task["model"]][0]
        budgets = BUDGETS if first else BUDGETS[:1]  # a second depth is there for the slope alone
        export(
            folder / "artifact",
            folder / "bundle",
            ExportOptions(
                allocations=nested(folder / "artifact", budgets),
                dialect="standard",
                precision="fp16",
                head_widths=False,
                engines=EngineOptions(target="trt-rtx", capabilities=GPUS, kinds=("told", "variants")),
            ),
        )
    else:
        from l2a_compress.exporters.tensorrt import build_engines

        build_engines(folder / "bundle", only=task["graph"])


def _words(figures: Mapping[str, float]) -> str:
    size = f"{figures['bytes'] / 1e6:.0f} MB, " if "bytes" in figures else ""
    return f"{size}{figures['processor_seconds']:.0f} processor s, peak {figures['peak_bytes'] / 1e9:.1f} GB"


def _show(model: str, section: Mapping[str, Any]) -> None:
    """A table of a model's figures, and what they say of its full depth."""
    parts = {name: part for name, part in section.items() if name.endswith("layers")}
    for name, part in parts.items():
        print(f"\n{model}, {name}: weights {part['weight_bytes'] / 1e6:.0f} MB, export {_words(part['export'])}")
        print("| engine | MB | processor s | peak GB |\n|---|---|---|---|")
        for graph, figures in part["engines"].items():
            row = (figures["bytes"] / 1e6, figures["processor_seconds"], figures["peak_bytes"] / 1e9)
            print(f"| {graph} | {row[0]:.0f} | {row[1]:.0f} | {row[2]:.1f} |")
        static = sum(figures["bytes"] for graph, figures in part["engines"].items() if graph.startswith("b"))
        whole = part["engines"]["told"]["bytes"] + part["engines"]["router"]["bytes"]
        count = sum(graph.startswith("b") for graph in part["engines"])
        print(f"If engine and router over the sum of {count} static ones: {whole / static:.2f}")
    if len(parts) == 2:
        print(f"extrapolated to {_DEEP} layers: {_extrapolated(parts)}")


def _extrapolated(parts: Mapping[str, Any]) -> str:
    """Size and seconds by a line through both depths; the peak by its largest share of a plan, since it varies more."""
    (few, less), (many, more) = sorted((int(name.split()[0]), part) for name, part in parts.items())

    def deep(pick: Callable[[Any], float]) -> float:
        return pick(less) + (pick(more) - pick(less)) / (many - few) * (_DEEP - few)

    words = []
    for graph in ("told", "b1"):
        size, seconds = (
            deep(lambda part, key=key, graph=graph: float(part["engines"][graph][key]))
            for key in ("bytes", "processor_seconds")
        )
        share = max(part["engines"][graph]["peak_bytes"] / part["engines"][graph]["bytes"] for part in (less, more))
        words.append(
            f"{graph} {size / 1e9:.1f} GB, {seconds:.0f} processor s, peak {share:.2f} x = {share * size / 1e9:.0f} GB"
        )
    seconds, peak = (
        deep(lambda part, key=key: float(part["export"][key])) for key in ("processor_seconds", "peak_bytes")
    )
    return "; ".join([*words, f"export {seconds:.0f} processor s, peak {peak / 1e9:.0f} GB"])


if __name__ == "__main__":
    main()
