"""Which GPU is here."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def capability(device: int = 0, nvml: Any = None) -> str | None:
    """Return the compute capability of a GPU as text such as ``8.9``; None where there is no GPU, driver or NVML.

    Args:
        device: its index.
        nvml: the module; None: ``pynvml``, where it is installed.
    """
    try:
        nvml = nvml or import_module("pynvml")
        nvml.nvmlInit()
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(device))
    except Exception:  # NVMLError has no base outside of the module that may be missing
        return None
    return f"{major}.{minor}"
