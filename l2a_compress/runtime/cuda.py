"""The few calls of the CUDA runtime that engines need, by the package cuda-python; errors are this library's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from l2a_compress.errors import OutOfMemoryError, SessionError

Array = np.ndarray[Any, np.dtype[Any]]
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_LEAST = 256  # bytes: TensorRT wants an address also for what is empty


class Cuda:
    """One stream, and memory of the device.

    Args:
        runtime: the module; None: ``cuda.bindings.runtime`` of the package cuda-python.

    Raises:
        SessionError: it is not installed, or there is no device.
    """

    def __init__(self, runtime: Any = None) -> None:
        try:
            self._api = runtime if runtime is not None else import_module("cuda.bindings.runtime")
        except (ImportError, OSError, RuntimeError) as error:
            raise SessionError(f"CUDA cannot be used ({error}); pip install 'l2a-compress[gpu]'") from error
        kinds = self._api.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._on_device = kinds.cudaMemcpyDeviceToDevice
        self.stream = int(self._call("cudaStreamCreate"))

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a call returns besides its error code."""
        code, *found = getattr(self._api, name)(*arguments)
        if int(code) == _OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{name}: the GPU has not enough memory; free some, or lower batch and context")
        if int(code) != 0:
            raise SessionError(f"{name} failed with CUDA's error {int(code)} ({code})")
        return found[0] if found else None

    def allocate(self, size: int) -> Buffer:
        """Memory of the device, freed with its last reference."""
        return Buffer(self, int(self._call("cudaMalloc", max(size, _LEAST))), size)

    def free(self, pointer: int) -> None:
        """Gives memory back."""
        self._call("cudaFree", pointer)

    def put(self, pointer: int, value: Array) -> None:
        """Copies from the host; ``value`` must stay until the stream is synchronized."""
        if value.nbytes:
            self._call("cudaMemcpyAsync", pointer, value.ctypes.data, value.nbytes, self._to_device, self.stream)

    def get(self, pointer: int, value: Array) -> None:
        """Copies to the host."""
        self._call("cudaMemcpyAsync", value.ctypes.data, pointer, value.nbytes, self._to_host, self.stream)

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies ``width`` bytes of each of ``rows`` rows that begin ``pitch`` bytes apart."""
        self._call("cudaMemcpy2DAsync", target, pitch, source, source_pitch, width, rows, self._on_device, self.stream)

    def wait(self) -> None:
        """Until all that was asked for is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what ``work`` asks of the stream as a CUDA graph, and returns what asks for all of it at once."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        made = self._call("cudaGraphInstantiate", graph, 0)
        return lambda: self._call("cudaGraphLaunch", made, self.stream)


class Buffer:
    """Memory of the device: its address and its bytes."""

    def __init__(self, cuda: Cuda, pointer: int, size: int) -> None:
        self._cuda, self.pointer, self.size = cuda, pointer, size

    def __del__(self) -> None:
        self._cuda.free(self.pointer)
