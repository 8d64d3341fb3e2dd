"""What the Python runtime promises, measured: tokens against PyTorch, its own cost, and caps on reasoning.

    python benchmarks/runtime_checks.py --artifact runs/mini/artifact --bundle BUNDLE [--checks parity overhead think]

- ``parity``: 64 prompts at 6 budgets each, alone and in continuous batches of 8 in random order, against the artifact's
  hard-gated model in PyTorch; streamed text against text at once; sampled text twice with one seed.
- ``overhead``: a decode step of the engine against the session's run in it; a decision of the selector; the import.
- ``think``: reasoning at half of the reference length, and at caps of 0 to 60 tokens, against no cap, on held-out
  problems of the embedded task.

Figures go to benchmarks/results/runtime_checks.json, under the bundle's name.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Results, ratio, shown, verdict

from l2a_compress.budget import Budget
from l2a_compress.embedded.task import problems
from l2a_compress.evaluation.answers import matches
from l2a_compress.evaluation.statistics import wilson
from l2a_compress.modeling.generation import GenerationConfig, generate
from l2a_compress.runtime import Limits, Policy, Runtime, Sampling
from l2a_compress.runtime.costs import cost_table
from l2a_compress.runtime.request import Request
from l2a_compress.runtime.sampling import Endless
from l2a_compress.runtime.selector import State, Work, select
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.store import LoadedArtifact, load_artifact

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
THINK, ANSWER = 64, 16


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="for parity")
    parser.add_argument("--base", help="the base model, where it is not at the place the artifact remembers")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--name", help="of the section (default: the bundle's base model and precision)")
    parser.add_argument("--checks", nargs="+", default=["parity", "overhead", "think"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_checks.json", help="figures (%(default)s)")
    options = parser.parse_args()
    runtime = Runtime.open(options.bundle, threads=options.threads)
    bundle = runtime.engine.bundle
    name = options.name or f"{Path(bundle.base['name']).name} {bundle.precision}"
    results = Results(options.out)
    for check in options.checks:
        found = {"parity": _parity, "overhead": _overhead, "think": _think}[check](options, runtime)
        results.put(f"{name}: {check}", found, {"prompts": options.prompts}, threads=options.threads)
    print(f"figures: {options.out}")


def _parity(options: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """How many of all requests got PyTorch's text and allocation."""
    loaded = load_artifact(options.artifact, base=options.base)
    chunks = calibration_prompts(loaded.recipe, loaded.tokenizer, options.prompts, batch_size=16)
    texts = [row[mask.bool()].tolist() for ids, masks in chunks for row, mask in zip(ids, masks, strict=True)]
    asked = list(itertools.product(texts, BUDGETS))
    random.Random(0).shuffle(asked)
    limits = Limits(max_think_tokens=THINK, max_answer_tokens=ANSWER)
    engine = runtime.engine
    together = engine.submit([ids for ids, _ in asked], [Budget(compute=b) for _, b in asked], limits=limits)
    while engine.busy:
        engine.step()
    alone = []
    for ids, budget in asked:
        alone += engine.submit([ids], [Budget(compute=budget)], limits=limits)
        while engine.busy:
            engine.step()
    streamed = sum(
        "".join(map(str, list(runtime.stream(ids, Budget(compute=budget), limits=limits))[:-1]))
        == runtime.text(request)
        for (ids, budget), request in zip(asked[:64], together[:64], strict=True)
    )
    drawn = Sampling(temperature=0.8, top_p=0.9, seed=5)
    twice = [runtime.generate([ids for ids, _ in asked[:32]], limits=limits, sampling=drawn) for _ in range(2)]
    reference = _reference(loaded, together)
    count = len(asked)
    found = {
        "requests": count,
        "together_equal": sum(_said(request) == reference[request.number] for request in together),
        "alone_equal": sum(_said(one) == reference[many.number] for one, many in zip(alone, together, strict=True)),
        "streamed_equal": streamed,
        "streamed": min(64, count),
        "seed_reproduces": twice[0] == twice[1],
        "tokens": sum(len(request.written) for request in together),
    }
    for key in ("together_equal", "alone_equal"):
        verdict(f"{key}: {found[key]} of {count} requests", found[key], count, at_most=False)
    verdict(f"streamed text: {streamed} of {found['streamed']}", streamed, found["streamed"], at_most=False)
    verdict("the same text for one seed", found["seed_reproduces"], 1, at_most=False)
    return found


def _said(request: Request) -> tuple[Any, ...]:
    return request.reasoning.think, request.reasoning.answer, request.kept


def _reference(loaded: LoadedArtifact, requests: list[Request]) -> dict[int, tuple[Any, ...]]:
    """Reasoning, answer and allocation of PyTorch's hard-gated model, by the request's number."""
    config = GenerationConfig(max_think_tokens=THINK, max_answer_tokens=ANSWER)
    found = {}
    ordered = sorted(requests, key=lambda request: request.budget.compute)
    for budget, group in itertools.groupby(ordered, key=lambda request: request.budget.compute):
        same = list(group)
        for part in (same[start : start + 16] for start in range(0, len(same), 16)):
            width = max(len(request.prompt) for request in part)
            padded = [[0] * (width - len(request.prompt)) + request.prompt for request in part]
            mask = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in part]
            made = generate(
                loaded.gated,
                requests[0].reasoning.tags,
                torch.tensor(padded),
                torch.tensor(mask),
                budgets=[Budget(compute=budget)] * len(part),
                config=config,
            )
            for request, one in zip(part, made, strict=True):
                kept = tuple(len(groups) for groups in one.allocation.groups) if one.allocation else None
                found[request.number] = (one.think, one.answer, kept)
    return found


def _overhead(options: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The engine's step over the run of the session in it, the selector and the import."""
    found: dict[str, Any] = {}
    engine = runtime.engine
    (lane,) = engine.lanes
    session, spent = lane._decoder.session, [0.0]

    class Timed:
        """The session, with the seconds of its last run."""

        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            began = time.perf_counter()
            session.run_with_iobinding(binding, options)
            spent[0] = time.perf_counter() - began

    lane._decoder.session = Timed()  # type: ignore[assignment]
    for rows in (1, 8):
        limits = Limits(max_think_tokens=256, max_answer_tokens=1, tau_threshold=None)
        prompt = [*range(1, 64), engine.tags.think]
        requests = engine.submit([prompt] * rows, [None] * rows, limits=limits)
        for request in requests:
            request.sampler = Endless(engine.tags)
        for _ in range(8):
            engine.step()
        whole, bare = [], []
        for _ in range(200):
            began = time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - began)
            bare.append(spent[0])
        for request in requests:
            engine.cancel(request)
        engine.step()
        found[f"rows_{rows}"] = {
            "step_over_run": ratio(whole, bare),
            "step_ms": 1000 * statistics.median(whole),
            "overhead_ms": 1000 * statistics.median(a - b for a, b in zip(whole, bare, strict=True)),
        }
        share = found[f"rows_{rows}"]["step_over_run"]
        verdict(f"{rows} rows: a step is {shown(share)} x the session's run", share["median"], 1.05, at_most=True)
    lane._decoder.session = session
    found["select_seconds"] = _select_seconds(runtime)
    verdict(f"a decision takes {1e6 * found['select_seconds']:.1f} us", found["select_seconds"], 50e-6, at_most=True)
    found["import_seconds"] = _import_seconds()
    verdict(f"the import takes {found['import_seconds']:.3f} s", found["import_seconds"], 0.3, at_most=True)
    return found


def _select_seconds(runtime: Runtime) -> float:
    """Median of a decision with every term in play."""
    steps, policy = cost_table(runtime.engine).steps, Policy(tpot_seconds=1.0)
    readings = {
        "request.seconds_left": 1.0,
        "spot.seconds_left": 30.0,
        "queue.depth": 4.0,
        "queue.oldest_seconds": 0.1,
        "pressure.cpu_some": 0.3,
        "service.contention": 0.1,
        "host.memory_available": 1e10,
        "cgroup.memory_available": 1e9,
    }
    work, state, spent = Work(prompt_tokens=60, new_tokens=60, think_tokens=50, rows=4), State(), []
    for number in range(3000):
        began = time.perf_counter()
        select(steps, readings, work, policy, state, now=float(number))
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def _import_seconds() -> float:
    """Best of five, without torch: another process may have held the machine up."""
    code = (
        "import sys, time; sys.modules.update(dict.fromkeys(('torch', 'transformers'))); start = time.perf_counter(); "
        "import l2a_compress.runtime; print(time.perf_counter() - start)"
    )
    runs = (subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5))
    return min(float(run.stdout) for run in runs)


def _think(options: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Reasoning under caps, on held-out problems of the embedded task."""
    asked = list(itertools.islice(problems(seed=11, split="heldout"), 400))
    reference = int(runtime.engine.bundle.gates["think_reference"])
    found: dict[str, Any] = {"reference": reference, "problems": len(asked), "caps": {}}
    over = total = 0
    for cap in (None, reference // 2, 60, 30, 15, 5, 0):
        answers = runtime.generate(
            [problem.prompt for problem in asked], Budget(think_tokens=cap), limits=Limits(max_think_tokens=160)
        )
        right = sum(matches(answer.answer, problem.answer) for answer, problem in zip(answers, asked, strict=True))
        mean = statistics.fmean(answer.think_tokens for answer in answers)
        if cap is not None:
            over += sum(answer.think_tokens > cap for answer in answers)
            total += len(answers)
        found["caps"][str(cap)] = {
            "think_tokens": mean,
            "accuracy": right / len(asked),
            "accuracy_interval": list(wilson(right, len(asked))),
            "answered": sum(bool(answer.answer) for answer in answers),
        }
        print(f"cap {cap}: {mean:.1f} tokens, {100 * right / len(asked):.1f} % right")
    dense, half = found["caps"]["None"], found["caps"][str(reference // 2)]
    found["over_cap"], found["capped_requests"] = over, total
    verdict(f"over their cap: {over} of {total} requests", over, 0, at_most=True)
    share = half["think_tokens"] / dense["think_tokens"]
    verdict(f"half of the reference: {share:.3f} x the tokens of no cap", share, 0.55, at_most=True)
    return found


if __name__ == "__main__":
    main()
