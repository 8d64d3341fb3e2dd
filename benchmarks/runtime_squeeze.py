"""A real squeeze: memory inside a control group, then the processor, while a runtime serves from a bundle.

    python benchmarks/runtime_squeeze.py --bundle BUNDLE      (root: it makes a control group, version 1 or 2)

A process of its own serves ``--rows`` requests at a time from the bundle's variants, on one core, in a control group
whose memory limit leaves ``--spare`` megabytes beside what the largest variant needs. Then, after each other: another
process in the same group takes memory until ``--left`` megabytes are left; two processes share its core. The budget,
the signals and the pace are written down ten times a second. Quality is measured, not looked up: the
mean log-likelihood of a token of each finished text under the dense variant, computed afterwards.
Figures go to benchmarks/results/runtime_squeeze.json, the picture to docs/images/runtime_squeeze.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from groups import MEGABYTE, available, eat, group, in_group
from measure import RESULTS, Results, verdict

from l2a_compress.runtime import Limits, Policy, Runtime
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.runtime.request import Request
from l2a_compress.runtime.signals import Cgroup, Host, Pressure

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "runtime_squeeze.png"
LIMITS = Limits(max_think_tokens=40, max_answer_tokens=12, tau_threshold=None)
PHASES = ("calm", "memory", "calm again", "processor", "calm at the end")
PROMPTS = [
    f"{name} has {first} {things} and buys {second} more. How many {things} does {name} have?"
    for name, first, second, things in (
        ("Ann", 3, 4, "apples"),
        ("Bob", 12, 7, "books"),
        ("Cal", 5, 9, "pens"),
        ("Dan", 21, 6, "coins"),
        ("Eve", 8, 8, "cards"),
        ("Fay", 2, 15, "eggs"),
        ("Gus", 30, 11, "stamps"),
        ("Hal", 14, 3, "balls"),
    )
]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="with variants")
    parser.add_argument("--rows", type=int, default=4, help="requests at a time (%(default)s)")
    parser.add_argument("--spare", type=int, default=300, help="megabytes (%(default)s)")
    parser.add_argument("--left", type=int, default=60, help="megabytes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each phase (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_squeeze.json", help="figures (%(default)s)")
    parser.add_argument("--report", action="store_true", help="only draw what is in --out")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # the process that serves: where it logs to
    options = parser.parse_args()
    if options.serve is not None:
        _serve(options)
        return
    results = Results(options.out)
    if not options.report:
        settings = {name: getattr(options, name) for name in ("rows", "spare", "left", "seconds")}
        results.put("squeeze", _squeeze(options), settings, threads=1)
    found = results.sections["squeeze"]
    _judge(found)
    _draw(found)
    print(f"figures: {options.out}, {PICTURE}")


def _runtime(options: argparse.Namespace) -> Runtime:
    policy = Policy(
        memories=("cgroup.memory_available",),
        memory_reserve_bytes=100.0 * MEGABYTE,
        pressures=("pressure.cpu_some", "service.contention"),
        dwell_seconds=2.0,
        target_seconds=1e6,
    )
    sources = [Host(), Pressure(), Cgroup()]
    return Runtime.open(
        options.bundle, max_rows=options.rows, threads=1, serve="variants", policy=policy, sources=sources
    )


def _squeeze(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the course and reads what the service wrote down."""
    mine = os.sched_getaffinity(0)
    core = max(mine)
    os.sched_setaffinity(0, {core})  # as the service, for whose processors the table is
    table = _runtime(options).controller.table  # measured here, outside of the group, and kept
    os.sched_setaffinity(0, mine)
    need = max(step.memory_bytes for step in table.steps)
    limit = int(need + options.spare * MEGABYTE)
    with group("l2a_squeeze", limit) as inside, tempfile.TemporaryDirectory() as work:
        log = Path(work) / "log"
        command = [sys.executable, __file__, "--bundle", str(options.bundle), "--rows", str(options.rows)]
        service = in_group([*command, "--serve", str(log)], inside, core)
        eaters: list[subprocess.Popen[str]] = []
        marks: dict[str, float] = {}
        try:
            _await(lambda: log.is_file(), 120, service)
            for phase in PHASES:
                marks[phase] = time.monotonic()
                print(f"{phase}: {available(inside, limit) / MEGABYTE:.0f} MB are left in the group", flush=True)
                if phase == "memory":
                    eaters = [eat(inside, limit, options.left * MEGABYTE)]
                    marks["memory taken"] = time.monotonic()
                elif phase == "processor":
                    hog = [sys.executable, "-c", "while True: pass"]
                    eaters = [
                        subprocess.Popen(hog, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}))
                        for _ in range(2)
                    ]
                time.sleep(options.seconds)
                if service.poll() is not None:
                    raise SystemExit(
                        f"the service ended with {service.returncode}: {log.read_text().splitlines()[-3:]}"
                    )
                for eater in eaters:
                    eater.kill()
                    eater.wait()
                eaters = []
            marks["end"] = time.monotonic()
            log.with_suffix(".stop").touch()
            service.wait(timeout=120)
        finally:
            for process in [*eaters, service]:
                process.kill()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    begin = marks["calm"]
    return {
        "limit_bytes": limit,
        "exit": service.returncode,
        "marks": {name: at - begin for name, at in marks.items()},
        "course": [{**line, "at": line["at"] - begin} for line in lines if "budget" in line],
        "requests": _scored(
            options.bundle, [{**line, "at": line["at"] - begin} for line in lines if "written" in line]
        ),
        "decisions": [{**line, "at": line["at"] - begin} for line in lines if "decided" in line],
        "switches": lines[-1]["switches"],
        "unfinished": lines[-1]["unfinished"],
        "ladder": [
            {"name": f"b{step.budget:g}", "budget": step.budget, "memory_bytes": step.memory_bytes}
            for step in table.steps
        ],
    }


def _serve(options: argparse.Namespace) -> None:
    """Serves without a pause until told to stop; a line for each tenth of a second and for each request."""
    runtime = _runtime(options)
    engine, controller = runtime.engine, runtime.controller
    asked: dict[int, str] = {}
    live: list[Request] = []
    number, last, budget, stop = 0, 0.0, 0.0, options.serve.with_suffix(".stop")
    with options.serve.open("w", buffering=1) as file:

        def tell(**values: Any) -> None:
            file.write(json.dumps({"at": time.monotonic(), **values}) + "\n")

        while live or not stop.exists():
            while len(live) < options.rows and not stop.exists():
                prompt = PROMPTS[number % len(PROMPTS)]
                live += runtime.submit([prompt], ["auto"], limits=LIMITS)
                asked[live[-1].number] = prompt
                number += 1
            controller.update()
            if (decided := controller.budget().compute) != budget:
                budget = decided
                tell(decided=budget)
            began = time.monotonic()
            runtime.step()
            ended = time.monotonic()
            for request in [request for request in live if request.done]:
                live.remove(request)
                tell(prompt=asked[request.number], written=request.written, error=request.error and str(request.error))
            if ended - last >= 0.1:
                last = ended
                readings = {name: controller.readings[name].value for name in SIGNALS}
                decision = controller.decision
                tell(
                    budget=controller.budget().compute,
                    ms=1000 * (ended - began),
                    graphs=engine.graphs,
                    why=decision.binding.name if decision else "",
                    **readings,
                )
        tell(switches=controller.switches, unfinished=len(live))


def _scored(bundle: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests with the mean log-likelihood of their tokens under the dense variant, in nats."""
    runtime = Runtime.open(bundle, threads=1, sources=[])
    entry = runtime.engine.bundle.variants[0]
    decoder, known = GraphDecoder(bundle / entry.file, threads=1), dict[tuple[Any, ...], float]()
    for request in requests:
        written = request.pop("written")
        key = (request["prompt"], *written)
        if key not in known and written:
            prompt, scores = runtime.encode(request["prompt"]), []
            decoder.start(1, len(prompt) + len(written))
            fed, length = np.array([prompt]), len(prompt)
            for token in written:
                logits = decoder.step(fed, np.ones((1, length), dtype=np.int64))["logits"][0, 0].astype(np.float64)
                top = logits.max()
                scores.append(logits[token] - top - np.log(np.exp(logits - top).sum()))
                fed, length = np.array([[token]]), length + 1
            known[key] = float(np.mean(scores))
        request["likelihood"] = known.get(key)
        request["tokens"] = len(written)
    return requests


SIGNALS = ("cgroup.memory_available", "pressure.cpu_some", "service.contention")


def _judge(found: dict[str, Any]) -> None:
    marks, course = found["marks"], found["course"]
    top = found["ladder"][0]["budget"]
    verdict(f"the service ended with {found['exit']}", abs(found["exit"]), 0, at_most=True)
    failed = sum(item["error"] is not None for item in found["requests"]) + found["unfinished"]
    verdict(f"{failed} of {len(found['requests'])} requests failed", failed, 0, at_most=True)
    for name, start, end in (
        ("memory", marks["memory taken"], marks["calm again"]),
        ("processor", marks["processor"], marks["calm at the end"]),
    ):
        lower = [item["at"] for item in found["decisions"] if item["at"] >= start and item["decided"] < top]
        decided = min(lower, default=float("inf")) - start
        verdict(f"{name}: a lower budget after {decided:.2f} s", decided, 1.0, at_most=True)
        runs = [item["at"] for item in course if item["at"] >= start and item["graphs"] != [found["ladder"][0]["name"]]]
        print(f"{name}: a smaller graph has run its first step after {min(runs, default=float('inf')) - start:.2f} s")
        after = [item for item in course if item["at"] >= end and item["budget"] == top]
        back = after[0]["at"] - end if after else float("inf")
        print(f"{name}: the full budget {back:.1f} s after the squeeze")
    verdict("the last budget", course[-1]["budget"], top, at_most=False)
    rate = 60 * found["switches"] / marks["end"]
    verdict(f"{found['switches']} switches, {rate:.1f} a minute", rate, 30, at_most=True)


def _draw(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    course, marks = found["course"], found["marks"]
    at = [item["at"] for item in course]
    figure, axes = plt.subplots(5, 1, figsize=(9, 10), sharex=True)
    rows = (
        ("budget", [item["budget"] for item in course], "share of dense compute"),
        ("memory left in the group", [_value(item, SIGNALS[0], 1 / MEGABYTE) for item in course], "MB"),
        ("processor: waiting tasks (PSI)", [_value(item, SIGNALS[1]) for item in course], "share of the time"),
        ("a step of all rows", _median([item["ms"] for item in course]), "ms"),
    )
    for axis, (title, values, unit) in zip(axes, rows, strict=False):
        axis.plot(at, values, color="tab:blue")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
    axes[2].plot(at, [_value(item, SIGNALS[2]) for item in course], color="tab:red", label="by its own pace")
    axes[2].legend(fontsize=8)
    axes[3].set_ylim(0, None)
    ended = [item for item in found["requests"] if item["likelihood"] is not None]
    axes[4].plot([item["at"] for item in ended], [item["likelihood"] for item in ended], ".", color="0.7")
    axes[4].plot([item["at"] for item in ended], _mean([item["likelihood"] for item in ended]), color="tab:orange")
    axes[4].set_title("finished texts: mean log-likelihood of a token under the dense model", fontsize=10)
    axes[4].set_ylabel("nats")
    axes[4].set_xlabel("seconds; grey: squeezed")
    for axis in axes:
        axis.axvspan(marks["memory"], marks["calm again"], color="0.9")
        axis.axvspan(marks["processor"], marks["calm at the end"], color="0.9")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _value(item: dict[str, Any], name: str, scale: float = 1.0) -> float:
    value = item[name]
    return float("nan") if value is None else float(value) * scale


def _median(values: Sequence[float], width: int = 4) -> list[float]:
    return [statistics.median(values[max(0, place - width) : place + width + 1]) for place in range(len(values))]


def _mean(values: Sequence[float], width: int = 4) -> list[float]:
    return [statistics.fmean(values[max(0, place - width) : place + width + 1]) for place in range(len(values))]


def _await(ready: Any, seconds: float, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > ends or process.poll() is not None:
            raise SystemExit("the service does not start")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
