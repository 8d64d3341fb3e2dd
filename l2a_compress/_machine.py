"""What a figure that was measured needs beside it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from l2a_compress.errors import OutOfMemoryError, SessionError

_ARM = ("CPU implementer", "CPU variant", "CPU part")  # which it tells in the place of a name


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    said = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    names = [value for name, value in said if name == "model name"]
    parts = [f"{name.removeprefix('CPU ')} {value}" for name, value in said if name in _ARM]
    return names[0] if names else " ".join([platform.machine(), *dict.fromkeys(parts)])


def processors() -> int | None:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell."""
    return _held("VmHWM")


def held_bytes() -> int | None:
    """The memory that this process holds; None where the system does not tell."""
    return _held("VmRSS")


def _held(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(name)), None)  # not all systems do
    return None if line is None else int(line.split()[1]) * 1024


def first_to_go() -> None:
    """Where memory ends, the system takes this process before others."""
    with suppress(OSError):  # another system, or one that does not allow it
        Path("/proc/self/oom_score_adj").write_text("1000")


def peak_of(code: str) -> int | None:
    """The most memory of a process of its own that runs so many lines of Python; None where the system does not tell.

    Raises:
        OutOfMemoryError: the system killed it.
        SessionError: it failed; its own error is in the message.
    """
    own = f"from {__name__} import first_to_go, peak_bytes"
    code = f"{own}; first_to_go(); {code}; print(peak_bytes() or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode < 0:
        raise OutOfMemoryError(f"a process that measures memory was killed by signal {-done.returncode}; free some")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise SessionError(f"a process that measures memory failed: {said}")
    return int(done.stdout.splitlines()[-1]) or None
