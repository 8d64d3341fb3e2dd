"""Huge pages for packed weights: asked for where they are, and only for what is new and in use."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress.runtime import pages
from l2a_compress.runtime.pages import added, huge_pages, spans, zeros

MAPS = """\
55d0c0000000-55d0c0800000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0001000000-7f0001400000 r--p 00000000 08:01 1234                       /opt/weights.bin
7f0002000000-7f0002400000 rw-p 00000000 08:01 1234                       /opt/data file
7f0003000000-7f0003400000 rw-p 00000000 00:00 0                          [stack]
"""
places = st.lists(st.integers(0, 40), unique=True, max_size=12).map(sorted)


def test_spans_are_private_memory_without_a_file() -> None:
    heap, other = (0x55D0C0000000, 0x55D0C0800000), (0x7F0000000000, 0x7F0000800000)
    assert list(spans(MAPS.splitlines())) == [heap, other]


@given(places, places)
def test_what_is_added_is_the_difference(before: list[int], after: list[int]) -> None:
    first, second = (list(zip(part[::2], part[1::2], strict=False)) for part in (before, after))
    found = [place for span in added(first, second) for place in range(*span)]
    wanted = {place for span in second for place in range(*span)} - {place for span in first for place in range(*span)}
    assert found == sorted(wanted)


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
asked = pytest.mark.skipif(
    sys.platform != "linux" or not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this kernel has no huge pages, or gives them unasked",
)


@asked
def test_small_allocations_come_to_stand_on_huge_pages() -> None:
    before = _memory("AnonHugePages")
    with huge_pages():
        kept = [np.ones(3 << 17) for _ in range(64)]  # 3 MB each, as a packed matrix
    gained = _memory("AnonHugePages") - before
    if not gained and tuple(map(int, re.findall(r"\d+", Path("/proc/version").read_text())[:2])) < (6, 1):
        pytest.skip("the kernel is older than MADV_COLLAPSE")
    assert gained > 100 << 20
    assert all((one == 1).all() for one in kept)


@asked
def test_memory_that_is_hardly_used_does_not_grow() -> None:
    before = _memory("AnonHugePages")
    with huge_pages():
        kept = [np.empty(3 << 17) for _ in range(64)]
        for one in kept:
            one[:: 1 << 13] = 1.0  # a page of sixteen
    assert _memory("AnonHugePages") <= before


@asked
@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_nothing_is_asked_where_huge_pages_are_not_wanted(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    monkeypatch.setattr(pages, "_SETTING", file)
    before = _memory("AnonHugePages")
    with huge_pages():
        kept = [np.ones(3 << 17) for _ in range(16)]
    assert _memory("AnonHugePages") <= before
    assert len(kept) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_zeros_take_memory_where_they_are_written_to_and_as_long_as_they_are_there() -> None:
    with huge_pages():  # large arrays of NumPy's come from the heap behind this
        pass
    before = _memory("Anonymous")
    arrays = zeros({"one": ((16, 1 << 20), np.uint8), "other": ((4, 16, 1 << 18), np.float32)})
    assert arrays["one"].shape == (16, 1 << 20)
    assert not arrays["other"][:, ::5, ::1024].any()
    assert _memory("Anonymous") - before < 8 << 20
    view = arrays["other"][1:3]
    view[:] = 1
    assert not arrays["one"].any()
    del arrays
    assert 30 << 20 < _memory("Anonymous") - before < 40 << 20
    del view
    assert _memory("Anonymous") - before < 8 << 20


def test_zeros_have_any_shape_and_type_or_say_that_there_is_no_room() -> None:
    shapes = {"none": ((2, 3, 0, 8), np.float32), "some": ((3, 5), np.float16), "more": ((7,), np.int64)}
    found = zeros(shapes)
    assert {name: (array.shape, array.dtype.type) for name, array in found.items()} == shapes
    found["some"][:] = 1
    assert not found["more"].any()
    assert zeros({"none": ((0, 3), np.float32)})["none"].shape == (0, 3)
    with pytest.raises(MemoryError):
        zeros({"large": ((1 << 30, 1 << 30), np.float32)})


def _memory(kind: str) -> int:
    """Bytes of a kind that this process has; 0 where the system does not say."""
    rollup = Path("/proc/self/smaps_rollup")
    found = re.search(rf"^{kind}: *(\d+) kB$", rollup.read_text(), re.MULTILINE) if rollup.exists() else None
    return int(found[1]) << 10 if found else 0
