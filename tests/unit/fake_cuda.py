"""A double of ``cuda.bindings.runtime`` whose device is this process: memory is memory, a graph is a list of calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class FakeCuda(SimpleNamespace):
    """The module. ``log`` names what was called; ``live`` holds what was allocated and not freed."""

    def __init__(self, *, memory: int = 1 << 30, fails: str = "") -> None:
        self.log: list[str] = []
        self.live: dict[int, Any] = {}
        self.recorded: list[Callable[[], None]] | None = None
        self._memory, self._fails = memory, fails
        copies = ("HostToDevice", "DeviceToHost", "DeviceToDevice")
        super().__init__(
            cudaMemcpyKind=SimpleNamespace(**{f"cudaMemcpy{name}": name for name in copies}),
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal="local"),
        )

    def later(self, work: Callable[[], None]) -> None:
        """Does what is asked of the stream, or writes it down."""
        work() if self.recorded is None else self.recorded.append(work)

    def _code(self, name: str) -> int:
        self.log.append(name)
        return 700 if name == self._fails else 0

    def cudaStreamCreate(self) -> tuple[int, int]:
        return self._code("create"), 7

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if sum(len(each) for each in self.live.values()) + size > self._memory:
            return 2, 0
        room = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(room)] = room
        return self._code("malloc"), ctypes.addressof(room)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.live[pointer]
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        assert self.recorded is None, "host memory is copied outside of what is recorded"
        assert (target if kind == "HostToDevice" else source) in self.live
        ctypes.memmove(target, source, size)
        return (self._code("copy"),)

    def cudaMemcpy2DAsync(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: str, stream: int
    ) -> tuple[int]:
        for row in range(rows):
            ctypes.memmove(target + row * pitch, source + row * source_pitch, width)
        return (self._code("copy_rows"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (self._code("wait"),)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:
        self.recorded = []
        return (self._code("begin"),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        found, self.recorded = self.recorded, None
        return self._code("end"), found

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return self._code("instantiate"), graph

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        for work in graph:
            work()
        return (self._code("launch"),)
