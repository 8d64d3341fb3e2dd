"""Measures many runs at once.

A small model leaves the threads of one process idle between its many small products, so on a CPU each run gets a
process of one thread instead. The processes are forked: they share the model's memory, and nothing is sent to them.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from l2a_compress.evaluation.points import Bench, Tick, measure
from l2a_compress.evaluation.values import Measured, Run

__all__ = ["measure_runs", "worker_count"]

_SMALL = 50_000_000  # parameters; a larger model keeps the threads of one process busy
_work: tuple[Bench, Sequence[Run]] | None = None  # what a forked process works on


def worker_count(bench: Bench) -> int:
    """How many processes serve best here: one per thread for a small model on a CPU, else one."""
    size = sum(parameter.numel() for parameter in bench.gated.parameters())
    forks = "fork" in multiprocessing.get_all_start_methods()
    return torch.get_num_threads() if forks and bench.gated.model.device.type == "cpu" and size < _SMALL else 1


def measure_runs(bench: Bench, runs: Sequence[Run], tick: Tick, *, workers: int | None = None) -> list[Measured]:
    """One measurement per run, in order. ``tick`` is called batch by batch, or run by run with several workers."""
    workers = min(worker_count(bench) if workers is None else workers, len(runs))
    found = _measure_forked(bench, runs, tick, workers) if workers > 1 else {}
    # All of them in this process; or those of a process that was killed, for want of memory most likely.
    found |= {at: measure(bench, run, tick) for at, run in enumerate(runs) if at not in found}
    return [found[at] for at in range(len(runs))]


def _measure_forked(bench: Bench, runs: Sequence[Run], tick: Tick, workers: int) -> dict[int, Measured]:
    found: dict[int, Measured] = {}
    with warnings.catch_warnings():
        # Forking beside a progress bar's thread is safe: the children never touch the terminal.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(bench, runs)) as pool:
            futures = {pool.submit(_measure_nth, at): at for at in range(len(runs))}
            try:
                for future in as_completed(futures):
                    at = futures[future]
                    found[at] = future.result()
                    tick(runs[at].label, len(bench.problems))
            except BrokenProcessPool:
                pass
    return found


def _start(bench: Bench, runs: Sequence[Run]) -> None:
    global _work
    torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
    _work = bench, runs


def _measure_nth(at: int) -> Measured:
    assert _work is not None
    bench, runs = _work
    return measure(bench, runs[at])
