"""Control groups of the benchmarks that squeeze memory: made as root, version 1 or 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MEGABYTE = 1 << 20
_EAT = """
import sys, time
open(sys.argv[2], "w").write("0")  # enters the group
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(held[::4096])
print("eaten", flush=True)
time.sleep(3600)
"""


@contextmanager
def group(name: str, limit: int) -> Iterator[Path]:
    """A group below this process's own, with that memory limit in bytes; gone at the end."""
    mount = Path("/sys/fs/cgroup")
    new = (mount / "cgroup.controllers").is_file()
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    inside = next(path for _, names, path in lines if (names == "" if new else "memory" in names.split(",")))
    above = (mount if new else mount / "memory") / inside.strip("/")
    made = (above if above.is_dir() else (mount if new else mount / "memory")) / name
    made.mkdir(exist_ok=True)
    (made / ("memory.max" if new else "memory.limit_in_bytes")).write_text(str(limit))
    try:
        yield made
    finally:
        for _ in range(50):
            try:
                made.rmdir()
                break
            except OSError:  # its last process is still going
                time.sleep(0.1)


def enter(group: Path) -> None:
    """Puts this process into a group, where it is the first to be ended if the group takes too much."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/oom_score_adj").write_text("1000")


def in_group(command: Sequence[str], group: Path, core: int) -> subprocess.Popen[str]:
    """Starts a process in a group, on one core."""

    def begin() -> None:
        enter(group)
        os.sched_setaffinity(0, {core})

    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=begin)


def available(group: Path, limit: int) -> int:
    """Bytes below the limit, without what the kernel can give back."""
    new = (group / "memory.current").is_file()
    used = int((group / ("memory.current" if new else "memory.usage_in_bytes")).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return limit - used + int(stat["inactive_file" if new else "total_inactive_file"])


def eat(group: Path, limit: int, left: int) -> subprocess.Popen[str]:
    """A process in a group that has taken memory until so many bytes of the limit are left."""
    taken = max(0, available(group, limit) - left)
    command = [sys.executable, "-c", _EAT, str(taken), str(group / "cgroup.procs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit(f"the process that takes memory ended with {process.wait()}")
    return process
