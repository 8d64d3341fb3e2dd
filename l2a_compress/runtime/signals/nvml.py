"""An NVIDIA GPU, or one MIG instance of it, through NVML (the package nvidia-ml-py)."""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module
from types import MappingProxyType
from typing import Any

from l2a_compress.gpu import handle, visible
from l2a_compress.runtime.signals.reading import Source, each

# Clocks that are low because there is nothing to do, because somebody set them, or because a GPU that is busy keeps to
# its power limit, as it did when costs were measured, are no throttling: it is a slowdown by hardware, of heat (by
# software or hardware), or by a power brake.
_THROTTLED = 0x8 | 0x20 | 0x40 | 0x80


class Gpu(Source):
    """Memory, utilization and throttling of one device.

    Readings: ``gpu.memory_free`` and ``gpu.memory_total`` in bytes; ``gpu.utilization``, the share of the last sample
    period in which a kernel ran (not supported on a MIG instance); ``gpu.throttled``, 1 where clocks are held down by
    heat or hardware, else 0. Source: https://docs.nvidia.com/deploy/nvml-api/

    NVML is initialized at the first reading and never shut down, as other users of the process may need it.

    Args:
        device: an index, or the UUID of a device or of a MIG instance (``MIG-...``); None: the first of
            ``CUDA_VISIBLE_DEVICES``, else 0.
        nvml: the module; None: ``pynvml``, where it is installed.
    """

    units = MappingProxyType(
        {
            "gpu.memory_free": "bytes",
            "gpu.memory_total": "bytes",
            "gpu.utilization": "share",
            "gpu.throttled": "share",
        }
    )

    def __init__(self, device: int | str | None = None, nvml: Any = None) -> None:
        self._device, self._nvml, self._handle = device, nvml, None
        self._lock = threading.Lock()

    def _values(self) -> dict[str, float | str]:
        with self._lock:
            if self._handle is None:
                self._open()
        nvml, handle = self._nvml, self._handle

        def throttled() -> float:
            return float(int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) & _THROTTLED != 0)

        return each(
            {
                "gpu.memory_free": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).free),
                "gpu.memory_total": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                "gpu.utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                "gpu.throttled": throttled,
            }
        )

    def _open(self) -> None:
        if self._nvml is None:
            self._nvml = import_module("pynvml")
        self._nvml.nvmlInit()
        device = visible() if self._device is None else self._device
        found = handle(self._nvml, device)
        self._handle = self._instance(found) if isinstance(device, int) else found

    def _instance(self, gpu: Any) -> Any:
        """The first MIG instance of a GPU that is cut into some, which CUDA then shows; else the GPU."""
        nvml = self._nvml
        with suppress(Exception):  # NVMLError: it knows no MIG
            if nvml.nvmlDeviceGetMigMode(gpu)[0]:
                for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                    with suppress(Exception):  # no instance at this place
                        return nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
        return gpu
