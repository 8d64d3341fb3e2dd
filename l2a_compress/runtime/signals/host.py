"""The host: memory and load by psutil, and how long tasks wait (PSI) from ``/proc/pressure``."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType

import psutil

from l2a_compress.runtime.signals.reading import Source, each


class Host(Source):
    """Memory and load of the whole host; in a container the limits of :class:`Cgroup` are tighter.

    Readings: ``host.memory_available`` and ``host.memory_total`` in bytes, ``host.load`` (the one-minute load average
    as a share of the cores; above 1 tasks wait), ``host.cores``.
    """

    units = MappingProxyType(
        {
            "host.memory_available": "bytes",
            "host.memory_total": "bytes",
            "host.load": "share",
            "host.cores": "cores",
        }
    )

    def _values(self) -> dict[str, float | str]:
        return each(
            {
                "host.memory_available": lambda: float(psutil.virtual_memory().available),
                "host.memory_total": lambda: float(psutil.virtual_memory().total),
                "host.load": lambda: psutil.getloadavg()[0] / (os.cpu_count() or 1),
                "host.cores": lambda: float(os.cpu_count() or 1),
            }
        )


class Pressure(Source):
    """Pressure stall information: the share of about the last second in which some, or all, tasks waited.

    Readings, each a share: ``pressure.RESOURCE_some`` for cpu, memory and io, ``pressure.RESOURCE_full`` for memory and
    io. They come from the kernel's running totals between two readings, as a squeeze must be seen sooner than the
    kernel's average of ten seconds shows it; the first one, and one behind a longer pause, is that average. Needs Linux
    4.20 with PSI switched on. Source: https://docs.kernel.org/accounting/psi.html

    Args:
        folder: where ``cpu``, ``memory`` and ``io`` stand.
        clock: in seconds.
    """

    units = MappingProxyType(
        {
            "pressure.cpu_some": "share",
            "pressure.memory_some": "share",
            "pressure.memory_full": "share",
            "pressure.io_some": "share",
            "pressure.io_full": "share",
        }
    )
    _SECONDS = 1.0
    _AVERAGE = 10.0  # seconds of avg10, which is newer than what a longer pause shows

    def __init__(self, folder: str | Path = "/proc/pressure", clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = Path(folder), clock
        self._totals: dict[str, deque[tuple[float, int]]] = {name: deque() for name in self.units}

    def _values(self) -> dict[str, float | str]:
        return each({name: partial(self._share, name) for name in self.units})

    def _share(self, name: str) -> float:
        resource, kind = name.partition(".")[2].split("_")
        for line in (self._folder / resource).read_text().splitlines():
            first, *rest = line.split()
            if first == kind:
                values, now, totals = dict(item.split("=") for item in rest), self._clock(), self._totals[name]
                if totals and totals[-1][0] < now - self._AVERAGE:
                    totals.clear()
                totals.append((now, int(values["total"])))
                while len(totals) > 2 and totals[1][0] <= now - self._SECONDS:
                    totals.popleft()
                began, waited = totals[0]
                if now - began < self._SECONDS / 10:
                    return float(values["avg10"]) / 100
                return min(1.0, (totals[-1][1] - waited) / 1e6 / (now - began))
        raise ValueError(f"{self._folder / resource} has no line {kind!r}")
