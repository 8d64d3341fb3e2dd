"""What memory of the process stands on, and when it goes back to the system.

onnxruntime packs each matrix into an allocation of its own, most of them smaller than a huge page. The C library maps
such allocations one by one, wherever there is room, so the kernel gives them no huge pages, and how fast a decode step
is depends on the places that they happen to get. So they are made to stand in the heap, one behind another, and Linux
6.1 and later put them on huge pages when asked: madvise(2), MADV_COLLAPSE.
"""

from __future__ import annotations

import ctypes
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
_GET_THP_DISABLE = 42
# mallopt(3): once a block is freed, blocks up to its size come from the heap. No larger one counts.
_LARGEST = (32 << 20) - (64 << 10)
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_ODD = bytes(value & 1 for value in range(256))
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

    They stand on huge pages where there are any, and those not written to take no memory; :func:`taken` says what the
    others do. What NumPy gives is neither where it stands in the heap, as large arrays do behind ``huge_pages``.

    Args:
        wanted: name -> (shape, dtype).

    Raises:
        MemoryError: there is no room.
    """
    whole = {name: mapped(math.prod(shape) * np.dtype(dtype).itemsize) for name, (shape, dtype) in wanted.items()}
    if sys.platform != "linux" or not sum(whole.values()):
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()}
    try:
        memory = mmap.mmap(-1, sum(whole.values()), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{sum(whole.values())} bytes: {error}") from error
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    found, start = {}, 0
    for name, (shape, dtype) in wanted.items():
        count = math.prod(shape)
        found[name] = np.frombuffer(memory, dtype, count, start).reshape(shape) if count else np.zeros(shape, dtype)
        start += whole[name]
    return found


def mapped(size: int) -> int:
    """Bytes from one array of :func:`zeros` to the next: no page is of two."""
    return -(-size // _PAGE) * _PAGE


def taken(low: int, high: int, starts: Array, ends: Array) -> int:
    """Bytes of memory that what is written of a mapping takes: a huge page that is begun is taken whole.

    Where the system has none left, it takes less: :func:`resident`.

    Args:
        low: where the mapping begins.
        high: where it ends.
        starts: [n], int64: of what is written, ascending.
        ends: [n], int64.
    """
    starts, before = _begun(low, high, starts, ends)
    return int(np.maximum(before[1:] - np.maximum(starts, before[:-1]), 0).sum())


def resident(low: int, high: int) -> float:
    """Bytes of a mapping of :func:`zeros` that have been given memory; infinite where that is known without asking."""
    if not high > low or not _has_huge_pages():
        return math.inf
    library, pages = ctypes.CDLL(None), -(-(high - low) // _PAGE)
    present = ctypes.create_string_buffer(pages)
    if library.mincore(ctypes.c_void_p(low), ctypes.c_size_t(high - low), present):
        return math.inf
    return (pages - present.raw[:pages].translate(_ODD).count(0)) * _PAGE


def give_back_rest(low: int, high: int, starts: Array, ends: Array) -> bool:
    """Gives back to the system what :func:`taken` does not count of a mapping of :func:`zeros`; it reads as zeros.

    Returns:
        Whether the system takes all of it back.
    """
    if sys.platform != "linux":
        return False
    starts, before = _begun(low, high, starts, ends)
    free, until = _up(before, mmap.PAGESIZE), np.append(starts, high) // mmap.PAGESIZE * mmap.PAGESIZE
    library, taken_back = ctypes.CDLL(None), True
    for start, end in zip(free[until > free].tolist(), until[until > free].tolist(), strict=True):
        failed = library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
        taken_back = taken_back and not failed
    return taken_back


def _begun(low: int, high: int, starts: Array, ends: Array) -> tuple[Array, Array]:
    """What is begun as :func:`taken` has it: [n] where each starts, [n + 1] where all before it ends."""
    first, last = _up(low), high // _SIZE * _SIZE if _has_huge_pages() else low  # between them all pages are huge
    starts = np.where((starts >= first) & (starts < last), starts // _SIZE * _SIZE, starts)
    ends = np.where((ends > first) & (ends < last), _up(ends), ends)
    before = np.maximum.accumulate(np.concatenate([[low], ends]))
    return starts, before


def _up(place: Any, size: int = _SIZE) -> Any:
    return -(-place // size) * size


def give_back() -> None:
    """Lets the C library return what is freed to the system, where it would keep it for later."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # not in every C library
        library.malloc_trim(ctypes.c_size_t(0))


def _has_huge_pages() -> bool:
    """Whether the system has them and gives them to this process. It may have none left all the same."""
    try:
        wanted = "[never]" not in _SETTING.read_text() and os.sysconf("SC_PAGE_SIZE") == _PAGE
    except OSError:
        return False
    return wanted and ctypes.CDLL(None).prctl(_GET_THP_DISABLE, 0, 0, 0, 0) == 0


def _spans() -> list[Span] | None:
    """Those of this process; None where there are no huge pages."""
    if not _has_huge_pages():
        return None
    try:
        return list(spans(_MAPS.read_text().splitlines()))
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
