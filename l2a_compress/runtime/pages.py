"""What memory of the process stands on, and when it goes back to the system.

onnxruntime packs each matrix into an allocation of its own, most of them smaller than a huge page. The C library maps
such allocations one by one, wherever there is room, so the kernel gives them no huge pages, and how fast a decode step
is depends on the places that they happen to get. So they are made to stand in the heap, one behind another, and Linux
6.1 and later put them on huge pages when asked: madvise(2), MADV_COLLAPSE.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_SIZE, _PAGE = 2 << 20, 4096  # of a huge page and of others; elsewhere the kernel refuses
_MOSTLY = 448  # pages of 512: what is emptier would take more memory than it did
_COLLAPSE = 25
# mallopt(3): once a block is freed, blocks up to its size come from the heap. No larger one counts.
_LARGEST = (32 << 20) - (64 << 10)
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
Span = tuple[int, int]
Array = np.ndarray[Any, np.dtype[Any]]


@contextmanager
def huge_pages() -> Iterator[None]:
    """Asks for huge pages for the memory that the process got within. Where there are none, nothing changes."""
    if sys.platform != "linux":
        yield
        return
    give_back()
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free(ctypes.c_void_p(library.malloc(_LARGEST)))
    before = _spans()
    yield
    give_back()
    if before is None or (after := _spans()) is None:
        return
    present, size = ctypes.create_string_buffer(_SIZE // _PAGE), ctypes.c_size_t(_SIZE)
    for start, end in added(before, after):
        for at in range(-(-start // _SIZE) * _SIZE, end // _SIZE * _SIZE, _SIZE):
            place = ctypes.c_void_p(at)
            if not library.mincore(place, size, present) and present.raw.count(b"\x01") >= _MOSTLY:
                library.madvise(place, size, _COLLAPSE)


def zeros(wanted: Mapping[str, tuple[Sequence[int], Any]]) -> dict[str, Array]:
    """Arrays of zeros in memory of their own, which goes back to the system with the last of them.

    They stand on huge pages where there are any, from the beginning of one on, and pages that nothing was written to
    take no memory. What NumPy gives is neither where it stands in the heap, as large arrays do behind ``huge_pages``.

    Args:
        wanted: name -> (shape, dtype).

    Raises:
        MemoryError: there is no room.
    """
    starts, total = places([math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in wanted.values()])
    if sys.platform != "linux" or not total:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()}
    huge = total >= _SIZE
    try:
        memory = mmap.mmap(-1, total + huge * _SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{total} bytes: {error}") from error
    first = 0
    if huge:
        first = -np.frombuffer(memory, np.uint8).ctypes.data % _SIZE
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    found = {}
    for start, (name, (shape, dtype)) in zip(starts, wanted.items(), strict=True):
        count = math.prod(shape)
        part = np.frombuffer(memory, dtype, count, first + start) if count else np.zeros(0, dtype)
        found[name] = part.reshape(shape)
    return found


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of so many bytes begin in what ``zeros`` sets aside, and its end: no page is of two of them."""
    *starts, end = itertools.accumulate((-(-size // _PAGE) * _PAGE for size in sizes), initial=0)
    return starts, end


def taken(starts: Array, ends: Array, total: int) -> int:
    """Bytes that spans of such an array take once they are written to: those of whole huge pages, where there are any.

    Args:
        starts: of the spans, ascending.
        ends: of the spans, none behind the start of the next.
        total: of what was set aside.
    """
    page = _SIZE if total >= _SIZE and _wanted() else 1
    starts, ends = starts[starts < ends] // page, -(-ends[starts < ends] // page)
    return page * int((ends - np.maximum(starts, np.concatenate([starts[:1], ends[:-1]]))).sum())


def give_back() -> None:
    """Lets the C library return what is freed to the system, where it would keep it for later."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # not in every C library
        library.malloc_trim(ctypes.c_size_t(0))


def _wanted() -> bool:
    """Whether the system has huge pages and wants them used."""
    try:
        return "[never]" not in _SETTING.read_text() and os.sysconf("SC_PAGE_SIZE") == _PAGE
    except OSError:
        return False


def _spans() -> list[Span] | None:
    """Those of this process; None where the system has no huge pages or does not want them used."""
    try:
        return list(spans(_MAPS.read_text().splitlines())) if _wanted() else None
    except OSError:
        return None


def spans(lines: list[str]) -> Iterator[Span]:
    """Private memory without a file, of the lines of ``/proc/PID/maps``; ascending."""
    for line in lines:
        fields = line.split()
        if fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]"):
            start, end = fields[0].split("-")
            yield int(start, 16), int(end, 16)


def added(before: list[Span], after: list[Span]) -> Iterator[Span]:
    """What the spans ``after`` hold and those ``before`` do not; each list ascending, without overlaps."""
    for start, end in after:
        for low, high in before:
            if high <= start or low >= end:
                continue
            if low > start:
                yield start, low
            start = high
        if start < end:
            yield start, end
