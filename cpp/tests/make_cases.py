"""Bundles and what the Python runtime writes with them, for the tests of the C++ runtime.

    python cpp/tests/make_cases.py OUT                       # of a tiny random model, in seconds
    python cpp/tests/make_cases.py OUT --artifact ARTIFACT   # of a trained one

OUT gets a bundle of each precision, with two head levels and two variants of one budget, and cases.json: 64 prompts at
6 budgets by the If graph and by variants, alone; the same with budgets that change in the middle; sampled text. And
16 prompts with a bundle of a tiny model whose gates do not read them (``blind``), and the first bundle with an If graph
and variants that fail on the longer half of its texts (``fragile``), and with a last variant whose caches have another
type than those of the other graphs (``mixed``) or that has two weights in the places of one another (``apart``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "unit"))

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.bundle import describe_bundle
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.runtime.chooser import Serve
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.request import Limits, Request
from l2a_compress.runtime.sampling import Sampling
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.store import load_artifact
from toy_models import kept_groups, new_artifact

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
PRECISIONS = {"fp32": "fp32", "int8": "int8"}
CHANGES = ((5, 0.6), (11, 1.0), (16, 0.8))  # from so many tokens on: down, up to where keys are missing, down


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = _make(options, options.artifact or new_artifact(Path(folder), "llama"))
        blind = new_artifact(Path(folder) / "blind", "llama", summary="none")
        found += _make(options, blind, {"blind": "fp32"}, prompts=16)
    most = _fragile(options.out / "fp32", options.out / "fragile", found)
    _changed(options.out / "fp32", options.out / "mixed", _halve, last=True)
    _changed(options.out / "fp32", options.out / "apart", _exchange, last=True)
    (options.out / "cases.json").write_text(json.dumps({"cases": found, "fragile": most}) + "\n")
    print(f"{len(found)} cases: {options.out / 'cases.json'}")


def _make(
    options: argparse.Namespace, artifact: Path, bundles: Mapping[str, str] = PRECISIONS, prompts: int | None = None
) -> list[dict[str, Any]]:
    """Bundles of one artifact, by name and precision, and their cases."""
    loaded = load_artifact(artifact)
    chunks = calibration_prompts(loaded.recipe, loaded.tokenizer, prompts or options.prompts, batch_size=16)
    texts = [row[mask.bool()].tolist() for ids, masks in chunks for row, mask in zip(ids, masks, strict=True)]
    ladder = tuple(_ladder(loaded.gated))
    found = []
    for name, precision in bundles.items():
        block = 32 if precision == "int8" else None
        folder = options.out / name
        export(
            artifact,
            folder,
            ExportOptions(precision=precision, block=block, allocations=ladder, per_budget=2),
            force=True,
        )
        serves: tuple[Serve, ...] = ("if", "variants")
        found += [case for serve in serves for case in _cases(folder, serve, texts)]
    return found


def _fragile(whole: Path, folder: Path, cases: list[dict[str, Any]]) -> int:
    """A bundle whose graphs look their tokens' number up in a table that is too short for half of the cases.

    Returns how many tokens they can read.
    """
    most = int(statistics.median(len(case["prompt"]) + len(case["expect"]["written"]) for case in cases))
    _changed(whole, folder, lambda graph: _break(graph, most))
    return most


def _changed(whole: Path, folder: Path, change: Callable[[Any], None], *, last: bool = False) -> None:
    """A copy of a bundle whose If graph and variants are changed, or the last variant alone."""
    import onnx

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [folder / entry["file"] for entry in manifest["graphs"] if entry["kind"] in ("if", "variant")]
    for path in files[-1:] if last else files:
        model = onnx.load(path, load_external_data=False)
        change(model.graph)
        onnx.save(model, path)
    manifest["files"] = describe_bundle(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _break(graph: Any, most: int) -> None:
    """Lets an output of a graph depend on a look-up that fails on more tokens than ``most``."""
    from onnx import TensorProto, helper

    output = "tau" if any(each.name == "tau" for each in graph.output) else "logits"
    last = next(node for node in graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "alone"
    graph.initializer.append(helper.make_tensor("table", TensorProto.FLOAT, [most + 1], [0.0] * (most + 1)))
    graph.node.extend(
        [
            helper.make_node("Shape", ["attention_mask"], ["total_tokens"], start=1, end=2),
            helper.make_node("Gather", ["table", "total_tokens"], ["nothing"]),
            helper.make_node("Add", ["alone", "nothing"], [output]),
        ]
    )


def _halve(graph: Any) -> None:
    """Gives the caches of a graph 16 bits."""
    from onnx import TensorProto, helper

    caches = [each for each in (*graph.input, *graph.output) if each.name.startswith(("past_key_values", "present"))]
    for cache in caches:
        cache.type.tensor_type.elem_type = TensorProto.FLOAT16
    inside = {cache.name: f"{cache.name}.inside" for cache in caches}
    for node in graph.node:
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
    read = [each.name for each in graph.input if each.name in inside]
    written = [each.name for each in graph.output if each.name in inside]
    for place, name in enumerate(read):
        graph.node.insert(place, helper.make_node("Cast", [name], [inside[name]], to=TensorProto.FLOAT))
    graph.node.extend(helper.make_node("Cast", [inside[name]], [name], to=TensorProto.FLOAT16) for name in written)


def _exchange(graph: Any) -> None:
    """Lets two weights of a graph of one size stand in the places of one another."""
    weights = [each for each in graph.initializer if each.external_data]
    one, other = next(
        pair for pair in itertools.combinations(weights, 2) if pair[0].dims == pair[1].dims and len(pair[0].dims) == 2
    )
    one.name, other.name = other.name, one.name


def _ladder(gated: GatedModel) -> Iterator[tuple[float, Allocation]]:
    """Nested: all; without a layer; two with other layers; the latter's first with fewer groups; half."""
    layers, groups, cost = gated.shape.num_layers, gated.shape.num_groups, gated.cost

    def widths(skipped: set[int], narrow: set[int]) -> Allocation:
        return kept_groups(gated, [0 if at in skipped else 1 if at in narrow else groups for at in range(layers)])

    levels = [
        [widths(set(), set())],
        [widths({2}, set())],
        [widths({2, 3}, set()), widths({2, 4}, set())],
        [widths({2, 3}, {layers - 1, layers - 2})],
        [widths({2, 3, 4, *range(5, layers // 2)}, {layers - 1, layers - 2})],
    ]
    for level in levels:
        budget = max(math.ceil(cost.fraction(each) * 100) / 100 for each in level)
        yield from ((budget, each) for each in level)


def _cases(folder: Path, serve: Serve, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    engine = Engine(folder, max_rows=1, threads=1, serve=serve, max_graphs=16)
    limits = Limits(max_think_tokens=24, max_answer_tokens=6, tau_threshold=0.6)
    for number, (prompt, budget) in enumerate(itertools.product(prompts, BUDGETS)):
        think = 7 if number % 5 == 4 else None
        yield _case(engine, folder.name, prompt, Budget(compute=budget, think_tokens=think), limits, Sampling(), ())
    for number, prompt in enumerate(prompts):
        budget = Budget(compute=BUDGETS[number % 6])
        yield _case(engine, folder.name, prompt, budget, limits, Sampling(), CHANGES)
        sampling = Sampling(temperature=0.9, top_k=(0, 20)[number % 2], top_p=(1.0, 0.8)[number % 3 == 0], seed=number)
        yield _case(engine, folder.name, prompt, budget, limits, sampling, ())


def _case(
    engine: Engine,
    bundle: str,
    prompt: list[int],
    budget: Budget,
    limits: Limits,
    sampling: Sampling,
    changes: tuple[tuple[int, float], ...],
) -> dict[str, Any]:
    (request,) = engine.submit([prompt], [budget], limits=limits, sampling=sampling)
    left = list(changes)
    while not request.done:
        engine.step()
        while left and len(request.written) >= left[0][0]:
            engine.set_budget(request, Budget(compute=left.pop(0)[1]))
    if request.error is not None:
        raise request.error
    return {
        "bundle": bundle,
        "serve": engine.serve,
        "prompt": prompt,
        "budget": budget.compute,
        "think_tokens": budget.think_tokens,
        "limits": [limits.max_think_tokens, limits.max_answer_tokens, limits.tau_threshold],
        "sampling": [sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed],
        "changes": changes,
        "expect": _expected(request),
    }


def _expected(request: Request) -> dict[str, Any]:
    return {
        "written": request.written,
        "kept": request.kept,
        "stopped_by": ("model", "cap", "tau").index(request.reasoning.stopped_by),
        "think": len(request.reasoning.think),
    }


if __name__ == "__main__":
    main()
