"""Where onnxruntime runs a graph: which execution providers, in which order, and whether that is what happened.

onnxruntime falls back silently from a provider that it cannot load, and names providers that it was built with whether
or not they can be loaded. So the order is written here, and what a session really has is compared with it and told.
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from l2a_compress.errors import ConfigError, SessionError
from l2a_compress.runtime.pages import huge_pages

log = logging.getLogger(__name__)
Provider = Literal["cpu", "cuda", "trt", "trt-rtx"]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"
ORDERS: dict[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "trt": (TENSORRT, CUDA, CPU),  # what TensorRT does not take runs on CUDA, and what CUDA does not on the processor
    "trt-rtx": (RTX, CPU),
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"  # onnxruntime's wheels do not hold this provider; this package does


def open_session(
    path: Path,
    options: ort.SessionOptions,
    provider: Provider = "cpu",
    *,
    strict: bool = True,
    onnxruntime: Any = ort,
) -> ort.InferenceSession:
    """A session on a provider.

    Args:
        path: the graph.
        options: of the session; changed.
        provider: the preferred one.
        strict: whether to refuse a session that lacks the preferred provider; else it is told, and runs on the next.
        onnxruntime: the module.

    Raises:
        ConfigError: no such provider.
        SessionError: the provider is not installed, or cannot be loaded here.
    """
    if provider not in ORDERS:
        raise ConfigError(f"provider {provider!r}: choose one of {', '.join(ORDERS)}")
    order = ORDERS[provider]
    if provider == "trt-rtx":
        _add_plugin(options, onnxruntime)
        session = onnxruntime.InferenceSession(str(path), options)
    else:
        if provider != "cpu" and (preload := getattr(onnxruntime, "preload_dlls", None)) is not None:
            preload()  # CUDA and cuDNN that came as packages are found by this alone
        with huge_pages():
            session = onnxruntime.InferenceSession(str(path), options, providers=list(order))
    _compare(path, provider, order, session.get_providers(), strict=strict)
    return session


def _add_plugin(options: ort.SessionOptions, onnxruntime: Any) -> None:
    """Of TensorRT-RTX. Source: https://nvidia.github.io/TensorRT-RTX-EP-ABI/installation.html."""
    try:
        plugin = import_module(_PLUGIN)
        name = plugin.get_ep_name()
        if not any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # the library's loader raises nothing more precise
        raise SessionError(
            f"{RTX} cannot be loaded ({error}); pip install onnxruntime-ep-nv-tensorrt-rtx beside onnxruntime >= 1.24, "
            "on a machine with an NVIDIA RTX GPU"
        ) from error
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise SessionError(f"{RTX} finds no GPU here that it knows; choose another --provider")
    options.add_provider_for_devices(devices, {})


def _compare(path: Path, provider: str, order: tuple[str, ...], found: list[str], *, strict: bool) -> None:
    missing = [name for name in order[:-1] if name not in found]
    told = f"{path}: asked for {', '.join(order)}, and onnxruntime runs it on {', '.join(found)}"
    if order[0] not in found and strict:
        raise SessionError(
            f"{told}; install what {order[0]} needs (CUDA, cuDNN, TensorRT), or choose another --provider"
        )
    if missing:
        log.warning("%s", told)
    else:
        log.info("%s", told)
