"""What the benchmarks share: interleaved timing, ratios with intervals, results on disk, the machine."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a_compress._machine import processor
from l2a_compress.files import write_atomic

if TYPE_CHECKING:
    from l2a_compress.evaluation.values import Point

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("l2a-compress", "torch", "transformers", "peft", "accelerate", "gguf")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")  # those that are installed


def interleaved(
    variants: Mapping[str, Callable[[int], object]], rounds: int, *, warm_up: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant in each round; every round runs all of them, in an order that turns by one.

    Args:
        variants: Functions of the round's number.
        rounds: That count.
        warm_up: Rounds before them that do not.

    Returns:
        By variant the process CPU time (``cpu``) and the wall-clock time (``wall``) of each round.
    """
    names = list(variants)
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in names}
    for number in range(-warm_up, rounds):
        for name in turned(names, number):
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name](number)
            spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            if number >= 0:
                for clock, seconds in spent.items():
                    found[name][clock].append(seconds)
        if number >= 0:
            print(f"  round {number + 1}/{rounds}", end="\r", flush=True)
    print(" " * 40, end="\r")
    return found


def turned(names: Sequence[str], number: int) -> list[str]:
    """The order of one round: it begins one name later than that of the round before."""
    turn = number % len(names)
    return [*names[turn:], *names[:turn]]


def ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Median over rounds of above / below, with a 95 % bootstrap interval of that median."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(medians[50], 4),
        "high": round(medians[1949], 4),
        "rounds": len(ratios),
    }


def shown(value: Mapping[str, float]) -> str:
    """``0.712 [0.705, 0.720]``."""
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def verdict(text: str, value: float, bar: float, *, at_most: bool) -> bool:
    """Prints one line that compares a figure with its bar, and says whether it is met."""
    met = value <= bar if at_most else value >= bar
    print(f"{text}  (bar {'<=' if at_most else '>='} {bar:g}: {'met' if met else 'MISSED'})", flush=True)
    return met


def machine(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    import torch  # here, so that a benchmark of the runtime alone does not hold it

    return {
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",  # the kernel's name would be that of a host
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES} | _runtimes(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _runtimes() -> dict[str, str]:
    found = {}
    for name in _RUNTIMES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def progress(label: str, done: int, total: int) -> None:
    """One line that says how far an evaluation is."""
    print(f"  {label}: {done}/{total} problems" + " " * 20, end="\r", flush=True)


def likelihood(point: Point) -> dict[str, Any]:
    """What a record keeps of a point that was measured by likelihood."""
    names = ("name", "budget", "cost", "layer_sparsity", "head_sparsity", "nll", "kl", "over_budget", "n", "seed")
    agreement = {"agreement": point.accuracy, "low": point.accuracy_low, "high": point.accuracy_high}
    return {name: getattr(point, name) for name in names} | agreement


class Peer:
    """A process that answers a line of JSON with one, and says first that it is ready. It asks for huge pages.

    Args:
        command: of the process.
        threads: of OpenMP; None for the process's own choice.
        log: what it writes to standard error is added to; None for our own.
        begin: what it does before it becomes the command.
    """

    def __init__(
        self,
        *command: str | Path,
        threads: int | None = None,
        log: Path | None = None,
        begin: Callable[[], object] | None = None,
    ) -> None:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") if log else nullcontext() as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                preexec_fn=begin,
            )
        self.log = log
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            where = f"; see {self.log}" if self.log else ""
            raise SystemExit(f"{self.process.args} stopped with code {self.process.wait()}{where}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Results:
    """Sections of one benchmark in one JSON file; one that was measured under the same settings is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The section, if it is there and was measured under these settings."""
        section: dict[str, Any] | None = self.sections.get(name)
        return section if section is not None and section.get("settings") == dict(settings) else None

    def put(self, name: str, section: Mapping[str, Any], settings: Mapping[str, Any], *, threads: int) -> None:
        """Writes the section, with its settings and the machine, at once."""
        self.sections[name] = {**section, "settings": dict(settings), "machine": machine(threads)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.sections, indent=2, sort_keys=True) + "\n")
