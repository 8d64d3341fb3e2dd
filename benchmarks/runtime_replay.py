"""Replays a request trace against a bundle of the embedded model: is it in time, and are the answers right.

    python benchmarks/runtime_replay.py --bundle BUNDLE --trace AzureLLMInferenceTrace_conv.csv

Arrival times are the trace's, compressed so that the mean rate is a multiple of full capacity: what this machine serves
at full budget with the queue never empty, on one core, measured first. The request with the n-th most generated tokens
of the trace is the held-out problem with the n-th longest reasoning, and answers are checked. Where the run needs more
requests than the trace has, the trace starts again with other problems. The mean service time is max_rows over full
capacity; the service level is five times that, from a request's arrival in the trace to its last token.

Arms: ``auto`` (the selector), ``full`` and ``smallest`` (one budget of the ladder for all). ``halved`` is ``auto``
while another process takes half of the core for five windows of 4 % of the time each. Every run is real. Budgets that
do not change have no use for a deadline: those arms serve first come, first served.
Figures go to benchmarks/results/runtime_replay.json, the picture to docs/images/runtime_replay.png.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from measure import RESULTS, Results, verdict

from l2a_compress.budget import Budget
from l2a_compress.embedded.task import Problem, problems
from l2a_compress.evaluation.answers import matches
from l2a_compress.evaluation.statistics import wilson
from l2a_compress.runtime import Limits, Policy, Runtime, Tier
from l2a_compress.runtime.request import Request

LIMITS = Limits(max_think_tokens=110, max_answer_tokens=8)
SERVICE_LEVEL = 5.0  # mean service times
FLOOR = 0.7  # of the embedded model's budgets; below it, too many answers are wrong
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "runtime_replay.png"


@dataclass(frozen=True)
class Arrival:
    """A request of the trace: seconds since its begin, and the problem that stands for it."""

    at: float
    problem: Problem


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of the embedded model, with variants")
    parser.add_argument("--trace", type=Path, required=True, help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--arms", nargs="+", default=["auto:0.8", "auto:1.3", "full:1.3", "smallest:1.3", "halved:0.8"])
    parser.add_argument("--seconds", type=float, default=600.0, help="of each run (%(default)s)")
    parser.add_argument("--serve", default="if", choices=("variants", "if"))
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capacity", type=float, help="requests/s of an earlier run (default: measured first)")
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_replay.json", help="figures (%(default)s)")
    parser.add_argument("--report", action="store_true", help="only draw what is in --out")
    options = parser.parse_args()
    results = Results(options.out)
    if not options.report:
        _pin()
        settings = {"seconds": options.seconds, "serve": options.serve, "rows": options.max_rows, "seed": options.seed}
        pool = _pool(options.seed)
        capacity = options.capacity or statistics.median(_capacity(options, pool) for _ in range(5))
        level = SERVICE_LEVEL * options.max_rows / capacity
        print(f"full capacity {capacity:.1f} requests/s; service level {1000 * level:.0f} ms", flush=True)
        for arm in options.arms:
            kind, load = arm.split(":")
            arrivals = _arrivals(options, float(load) * capacity, pool)
            found = {"capacity": capacity, "service_level_seconds": level, **_replay(options, kind, arrivals, level)}
            results.put(arm, found, settings, threads=1)
            _say(arm, found)
    _judge(results.sections)
    _draw(results.sections)
    print(f"figures: {options.out}, {PICTURE}")


def _pin() -> None:
    """This process on one core, the last one."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _pool(seed: int) -> list[Problem]:
    """Held-out problems, the shortest reasoning first."""
    found = list(itertools.islice(problems(seed=seed, split="heldout"), 4000))
    return sorted(found, key=lambda problem: (len(problem.long.split()), problem.prompt))


def _open(options: argparse.Namespace, policy: Policy | None = None) -> Runtime:
    return Runtime.open(
        options.bundle,
        max_rows=options.max_rows,
        threads=1,
        serve=options.serve,
        max_graphs=8,
        policy=policy,
        sources=[],
    )


def _capacity(options: argparse.Namespace, pool: Sequence[Problem]) -> float:
    """Requests per second at full budget where all wait from the begin on."""
    runtime = _open(options)
    chosen = random.Random(options.seed).sample(pool, 600)
    budgets = [Budget()] * len(chosen)
    runtime.submit([problem.prompt for problem in chosen[:50]], budgets[:50], limits=LIMITS)
    while runtime.engine.busy:
        runtime.step()
    runtime.submit([problem.prompt for problem in chosen], budgets, limits=LIMITS)
    began, done = time.perf_counter(), 0
    while runtime.engine.waiting:
        runtime.step()
    done = len(chosen) - len(runtime.engine.running)
    return done / (time.perf_counter() - began)


def _arrivals(options: argparse.Namespace, rate: float, pool: Sequence[Problem]) -> list[Arrival]:
    """The trace at ``rate`` requests per second, for the seconds asked for."""
    with options.trace.open() as file:
        rows = [(_seconds(row["TIMESTAMP"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    begin = rows[0][0]
    span = rows[-1][0] - begin
    squeezed = len(rows) / span / rate  # seconds of the run for a second of the trace
    order = sorted(range(len(rows)), key=lambda place: rows[place][1])
    rank = {place: number / len(rows) for number, place in enumerate(order)}
    draw, found = random.Random(options.seed), list[Arrival]()
    for turn in itertools.count():
        for place, (at, _) in enumerate(rows):
            when = (at - begin + turn * span) * squeezed
            if when >= options.seconds:
                return found
            near = rank[place] * len(pool) + draw.uniform(-20, 20)
            found.append(Arrival(when, pool[min(len(pool) - 1, max(0, round(near)))]))
    raise AssertionError


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp[:26]).timestamp()


def _replay(options: argparse.Namespace, kind: str, arrivals: Sequence[Arrival], level: float) -> dict[str, Any]:
    policy = Policy(
        target_seconds=0.6 * level,
        dwell_seconds=0.2 * level,
        pressures=(),
        tiers={"default": Tier(floor=FLOOR)},
    )
    runtime = _open(options, policy)
    engine = runtime.engine
    asked: Any = {"full": Budget(), "smallest": Budget(compute=engine.ladder[-1])}.get(kind, "auto")
    for budget in engine.ladder:  # graphs are loaded before the trace begins
        runtime.generate(["how many ?"], Budget(compute=budget), limits=LIMITS)
    if asked == "auto":
        runtime.controller._seconds = level / 20
    prompts: dict[str, list[int]] = {}
    made: list[tuple[Arrival, Request]] = []
    series: list[dict[str, float]] = []
    place, second, began = 0, 0, time.monotonic()
    hogs = _Hog(options.seconds if kind == "halved" else 0.0)
    try:
        while True:
            now = time.monotonic() - began
            hogs.at(now)
            while place < len(arrivals) and arrivals[place].at <= now:
                arrival = arrivals[place]
                text = arrival.problem.prompt
                ids = prompts[text] = prompts.get(text) or runtime.encode(text)
                left = max(1e-3, arrival.at + level - now) if asked == "auto" else None
                (request,) = runtime.submit([ids], [asked], limits=LIMITS, seconds=left)
                request.submitted = began + arrival.at
                made.append((arrival, request))
                place += 1
            if place == len(arrivals) and (not engine.busy or now > arrivals[-1].at + level):
                break
            if now >= second:
                budgets = [request.budget.compute for request in engine.running]
                series.append(
                    {
                        "second": second,
                        "budget": statistics.fmean(budgets) if budgets else 1.0,
                        "waiting": len(engine.waiting) + len(engine.hopeless),
                        "hog": float(hogs.runs),
                    }
                )
                second += 1
            if engine.busy:
                runtime.step()
            elif place < len(arrivals):
                time.sleep(min(0.001, max(0.0, arrivals[place].at - now)))
    finally:
        hogs.stop()
    return _figures(runtime, made, series, began, level, asked)


class _Hog:
    """Another process that takes half of this core, in five windows of 4 % of the time."""

    def __init__(self, seconds: float) -> None:
        self._windows = [(seconds * (0.1 + 0.2 * number), 0.04 * seconds) for number in range(5)] if seconds else []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    def at(self, now: float) -> None:
        wanted = any(start <= now < start + length for start, length in self._windows)
        if wanted and self._process is None:
            self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same core
        elif not wanted:
            self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _figures(
    runtime: Runtime,
    made: Sequence[tuple[Arrival, Request]],
    series: list[dict[str, float]],
    began: float,
    level: float,
    asked: Any,
) -> dict[str, Any]:
    """Shares with their intervals, and the course by the second."""
    latencies, right, think, failed = [], 0, [], 0
    for arrival, request in made:
        failed += request.error is not None
        if request.ended is None or request.error is not None:
            continue
        answer = runtime.answer(request)
        latencies.append(request.ended - began - arrival.at)
        right += matches(answer.answer, arrival.problem.answer)
        think.append(answer.think_tokens)
        course = series[min(len(series) - 1, int(arrival.at))]
        course["requests"] = course.get("requests", 0) + 1
        course["met"] = course.get("met", 0) + (latencies[-1] <= level)
        course["right"] = course.get("right", 0) + matches(answer.answer, arrival.problem.answer)
    met = sum(value <= level for value in latencies)
    ranked = sorted(latencies)
    accuracy, low, high = right / max(1, len(latencies)), *wilson(right, max(1, len(latencies)))
    return {
        "requests": len(made),
        "finished": len(latencies),
        "failed": failed,
        "met": met / len(made),
        "met_interval": list(wilson(met, len(made))),
        "accuracy": accuracy,
        "accuracy_interval": [low, high],
        "latency_seconds": {name: ranked[int(share * (len(ranked) - 1))] for name, share in SHARES.items()},
        "think_tokens": statistics.fmean(think),
        "mean_budget": statistics.fmean(item["budget"] for item in series),
        "switches": runtime.controller.switches if asked == "auto" else 0,
        "series": series,
    }


SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def _say(arm: str, found: dict[str, Any]) -> None:
    print(
        f"{arm}: {found['requests']} requests, {100 * found['met']:.2f} % in time, {found['failed']} failed, accuracy "
        f"{100 * found['accuracy']:.2f} %, p99 {1000 * found['latency_seconds']['p99']:.0f} ms, mean budget "
        f"{found['mean_budget']:.2f}, {found['think_tokens']:.1f} think tokens, {found['switches']} switches",
        flush=True,
    )


def _judge(sections: dict[str, Any]) -> None:
    """The figures against what the runtime promises."""

    def told(arm: str, bar: float, *, at_most: bool = False) -> None:
        if arm in sections:
            verdict(f"{arm}: {100 * sections[arm]['met']:.2f} % in time", sections[arm]["met"], bar, at_most=at_most)

    told("auto:1.3", 0.99)
    told("full:1.3", 0.2, at_most=True)
    told("halved:0.8", 0.98)
    for arm in sections:
        verdict(f"{arm}: {sections[arm]['failed']} failed", sections[arm]["failed"], 0, at_most=True)
    if {"auto:1.3", "full:1.3", "smallest:1.3"} <= set(sections):
        auto, full, small = (sections[f"{arm}:1.3"]["accuracy"] for arm in ("auto", "full", "smallest"))
        share = (auto - small) / (full - small)
        verdict(
            f"quality {auto:.4f} between {small:.4f} and {full:.4f}: {share:.2f} of the gap", share, 0.5, at_most=False
        )


def _draw(sections: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    arms = [arm for arm in sections if arm.startswith(("auto", "halved"))]
    if not arms:
        return
    figure, axes = plt.subplots(len(arms), 2, figsize=(11, 2.3 * len(arms)), squeeze=False, sharex="col")
    for (left, right), arm in zip(axes, arms, strict=True):
        series = sections[arm]["series"]
        seconds = [item["second"] for item in series]
        for span in _spans(series):
            left.axvspan(*span, color="0.85")
            right.axvspan(*span, color="0.85")
        left.plot(seconds, _smooth([item["budget"] for item in series]), color="tab:blue", label="budget")
        left.set_ylim(0.3, 1.05)
        left.set_ylabel("mean budget")
        left.set_title(f"{arm.partition(':')[0]} at {arm.partition(':')[2]} x full capacity", fontsize=10)
        for key, color, label in (("met", "tab:green", "in time"), ("right", "tab:orange", "right")):
            counts = _smooth([item.get("requests", 0) for item in series])
            hits = _smooth([item.get(key, 0) for item in series])
            shares = [hit / count if count else float("nan") for hit, count in zip(hits, counts, strict=True)]
            right.plot(seconds, shares, color=color, label=label)
        right.set_ylim(0.5, 1.02)
        right.set_ylabel("share of requests")
        right.legend(loc="lower right", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds; grey: another process takes half of the core")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _spans(series: Sequence[dict[str, float]]) -> Iterator[tuple[float, float]]:
    for busy, items in itertools.groupby(series, key=lambda item: item["hog"]):
        if busy:
            seconds = [item["second"] for item in items]
            yield seconds[0], seconds[-1] + 1


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    total = [0.0, *itertools.accumulate(values)]
    ends = ((max(0, place - width), min(len(values), place + width + 1)) for place in range(len(values)))
    return [(total[end] - total[start]) / (end - start) for start, end in ends]


if __name__ == "__main__":
    main()
