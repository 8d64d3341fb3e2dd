"""The host: memory and load by psutil, and how long tasks wait (PSI) from ``/proc/pressure``."""

from __future__ import annotations

import os
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
    """Pressure stall information: the share of the last ten seconds in which some, or all, tasks waited.

    Readings, each a share: ``pressure.RESOURCE_some`` for cpu, memory and io, ``pressure.RESOURCE_full`` for memory and
    io. Needs Linux 4.20 with PSI switched on. Source: https://docs.kernel.org/accounting/psi.html

    Args:
        folder: where ``cpu``, ``memory`` and ``io`` stand.
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

    def __init__(self, folder: str | Path = "/proc/pressure") -> None:
        self._folder = Path(folder)

    def _values(self) -> dict[str, float | str]:
        return each({name: partial(self._share, *name.partition(".")[2].split("_")) for name in self.units})

    def _share(self, resource: str, kind: str) -> float:
        for line in (self._folder / resource).read_text().splitlines():
            first, *rest = line.split()
            if first == kind:
                return float(dict(item.split("=") for item in rest)["avg10"]) / 100
        raise ValueError(f"{self._folder / resource} has no line {kind!r}")
