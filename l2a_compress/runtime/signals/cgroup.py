"""The control group this process is in, version 1 or 2: what a container may use of the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

from l2a_compress.runtime.signals.reading import Source, each

Files = tuple[str, str, str]  # how memory.stat calls pages of files: inactive, active, and mapped ones among both
_FILES_2: Files = ("inactive_file", "active_file", "file_mapped")
_FILES_1: Files = ("total_inactive_file", "total_active_file", "total_mapped_file")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2^63 for no limit


class Cgroup(Source):
    """Memory and CPU limits and how they are used; of several nested groups the tightest limit counts.

    Readings: ``cgroup.memory_limit`` and ``cgroup.memory_high`` (infinite where there is none);
    ``cgroup.memory_used`` without what the kernel can give back, and ``cgroup.memory_available``, the least that is
    left below a limit or, in version 2, a high mark, above which tasks are held back, all in bytes;
    ``cgroup.memory_hits``, how often the limit or high mark was reached, and ``cgroup.oom_kills``, both since the group
    began; ``cgroup.cpu_limit`` in cores (infinite where there is none); ``cgroup.cpu_throttled``, seconds that its
    tasks were held back since the group began.

    The kernel gives back pages of files that no process maps, be they active or not: what was read twice is active.

    Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html

    Args:
        root: of the file system, for tests.
    """

    units = MappingProxyType(
        {
            "cgroup.memory_limit": "bytes",
            "cgroup.memory_high": "bytes",
            "cgroup.memory_used": "bytes",
            "cgroup.memory_available": "bytes",
            "cgroup.memory_hits": "count",
            "cgroup.oom_kills": "count",
            "cgroup.cpu_limit": "cores",
            "cgroup.cpu_throttled": "seconds",
        }
    )

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)

    def _values(self) -> dict[str, float | str]:
        mount = self._root / "sys/fs/cgroup"
        groups = self._groups()
        if (mount / "cgroup.controllers").is_file():
            return _version_2(_levels(mount, groups.get("", "/")))
        memory = _levels(mount / "memory", groups.get("memory", "/"))
        cpu = _levels(mount / "cpu", groups.get("cpu", "/"))
        return _version_1(memory, cpu)

    def _groups(self) -> dict[str, str]:
        """Path of this process's group by controller; version 2 has the controller ``""``."""
        found: dict[str, str] = {}
        for line in (self._root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found |= dict.fromkeys(controllers.split(","), path)
        return found


def _levels(mount: Path, path: str) -> list[Path]:
    """The group's folder and those around it, the innermost first.

    A container often sees its own group as the root of the mount while ``/proc/self/cgroup`` names its path outside.
    """
    group = mount / path.strip("/")
    if ".." in Path(path).parts or not group.is_dir():
        group = mount
    return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]


def _version_2(levels: list[Path]) -> dict[str, float | str]:
    def events(*keys: str) -> float:
        return float(sum(_table(_first(levels, "memory.events")).get(key, 0) for key in keys))

    return each(
        {
            "cgroup.memory_limit": lambda: _least(levels, "memory.max"),
            "cgroup.memory_high": lambda: _least(levels, "memory.high"),
            "cgroup.memory_used": lambda: _used(_first(levels, "memory.current"), _FILES_2),
            "cgroup.memory_available": lambda: _left(levels, ("memory.max", "memory.high"), "memory.current", _FILES_2),
            "cgroup.memory_hits": lambda: events("high", "max"),
            "cgroup.oom_kills": lambda: events("oom_kill"),
            "cgroup.cpu_limit": lambda: min(_quotas(levels), default=math.inf),
            "cgroup.cpu_throttled": lambda: _table(_first(levels, "cpu.stat"))["throttled_usec"] / 1e6,
        }
    )


def _version_1(memory: list[Path], cpu: list[Path]) -> dict[str, float | str]:
    return each(
        {
            "cgroup.memory_limit": lambda: _least(memory, "memory.limit_in_bytes"),
            "cgroup.memory_high": lambda: _least(memory, "memory.soft_limit_in_bytes"),
            "cgroup.memory_used": lambda: _used(_first(memory, "memory.usage_in_bytes"), _FILES_1),
            "cgroup.memory_available": lambda: _left(
                memory, ("memory.limit_in_bytes",), "memory.usage_in_bytes", _FILES_1
            ),
            "cgroup.memory_hits": lambda: _number(_first(memory, "memory.failcnt").read_text()),
            "cgroup.oom_kills": lambda: float(_table(_first(memory, "memory.oom_control"))["oom_kill"]),
            "cgroup.cpu_limit": lambda: min(_quotas_1(cpu), default=math.inf),
            "cgroup.cpu_throttled": lambda: _table(_first(cpu, "cpu.stat"))["throttled_time"] / 1e9,
        }
    )


def _first(levels: list[Path], name: str) -> Path:
    """The innermost group that has the file; the root has few of them."""
    for level in levels:
        if (level / name).is_file():
            return level / name
    raise FileNotFoundError(f"no {name} in {levels[0]}")


def _least(levels: list[Path], name: str) -> float:
    _first(levels, name)
    return min(_number((level / name).read_text()) for level in levels if (level / name).is_file())


def _used(file: Path, files: Files) -> float:
    """Without what the kernel can give back."""
    stat = _table(file.with_name("memory.stat"))
    inactive, active, mapped = (stat.get(name, 0) for name in files)
    return max(0.0, _number(file.read_text()) - max(inactive, inactive + active - mapped))


def _left(levels: list[Path], limits: Sequence[str], used: str, files: Files) -> float:
    """Groups around this one may be nearer to their limit than this one to its own."""
    _first(levels, limits[0])
    whole = [level for level in levels if (level / limits[0]).is_file() and (level / used).is_file()]
    return max(0.0, min(_limit(level, limits) - _used(level / used, files) for level in whole))


def _limit(level: Path, names: Sequence[str]) -> float:
    return min(_number((level / name).read_text()) for name in names if (level / name).is_file())


def _quotas(levels: list[Path]) -> Iterator[float]:
    for level in levels:
        if (level / "cpu.max").is_file():
            quota, period = (level / "cpu.max").read_text().split()
            yield math.inf if quota == "max" else int(quota) / int(period)


def _quotas_1(levels: list[Path]) -> Iterator[float]:
    for level in levels:
        if (level / "cpu.cfs_quota_us").is_file():
            quota = int((level / "cpu.cfs_quota_us").read_text())
            yield math.inf if quota < 0 else quota / int((level / "cpu.cfs_period_us").read_text())


def _number(text: str) -> float:
    text = text.strip()
    value = math.inf if text == "max" else int(text)
    return math.inf if value >= _UNLIMITED else float(value)


def _table(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
