"""Which GPU is here."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any


def capability(device: int | str | None = None, nvml: Any = None) -> str | None:
    """Return the compute capability of a GPU as text such as ``8.9``; None where there is no GPU, driver or NVML.

    Args:
        device: an index or a UUID; None: the one that :func:`visible` finds.
        nvml: the module; None: ``pynvml``, where it is installed.
    """
    try:
        nvml = nvml or import_module("pynvml")
        nvml.nvmlInit()
        device = visible() if device is None else device
        found = handle(nvml, device)
        if str(device).startswith("MIG-"):  # has none of its own
            found = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(found)
    except Exception:  # NVMLError has no base outside of the module that may be missing
        return None
    return f"{major}.{minor}"


def visible() -> int | str:
    """The first device that CUDA shows to this process: an index, or the UUID of a device or a MIG instance.

    It is the first of ``CUDA_VISIBLE_DEVICES``, 0 where that is not set. Indexes are taken in the order of the bus, as
    NVML counts them and CUDA with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; UUIDs mean the same to both.

    Raises:
        ValueError: it shows none.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return 0
    first = text.split(",")[0].strip()
    if first.isdecimal():
        return int(first)
    if first.startswith(("GPU-", "MIG-")):
        return first
    raise ValueError(f"CUDA_VISIBLE_DEVICES = {text!r} shows no GPU; set it to an index or a UUID")


def handle(nvml: Any, device: int | str) -> Any:
    """NVML's handle of a device; of a UUID of a GPU its beginning is enough, as it is for CUDA.

    Raises:
        ValueError: no device has that UUID.
    """
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    if not device.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(device)
    for index in range(nvml.nvmlDeviceGetCount()):
        found = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(found)
        if (uuid.decode() if isinstance(uuid, bytes) else uuid).startswith(device):
            return found
    raise ValueError(f"no GPU has the UUID {device}; `nvidia-smi -L` lists those that are here")
