"""Graphs of a bundle run by the C++ runtime, through its C interface: all of them over one copy of the weights.

The library is built from ``cpp/`` and is not part of the wheel. It is looked for at ``L2A_LIBRARY``, then where the
system's loader looks. docs/cpp.md says how to build it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.errors import BudgetError, BundleError, ConfigError, L2AError, OutOfMemoryError, SessionError
from l2a_compress.limits import Contract

Array = np.ndarray[Any, np.dtype[Any]]

_NAME, _ABI = "libl2a.so.1", 1
_ERRORS = {1: BudgetError, 2: ConfigError, 3: BundleError, 4: SessionError, 5: OutOfMemoryError}
_TYPES = {1: "tensor(float)", 10: "tensor(float16)", 16: "tensor(bfloat16)"}
_FLOATS, _INTEGERS = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int64)


class _Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("contract", ctypes.c_int32),
        ("graphs", ctypes.c_uint32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("num_layers", "num_groups", "vocab_size", "positions")),
        *((name, ctypes.c_int64) for name in ("think", "end_think", "answer", "end_answer")),
    )


class _CacheInfo(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("groups", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("batch", ctypes.c_int64),
        ("sequence", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("input_ids", _INTEGERS),
        ("mask", _INTEGERS),
        ("budget", _FLOATS),
        ("limits", _INTEGERS),
        ("price", _FLOATS),
        ("allocation", _INTEGERS),
        ("caches", ctypes.POINTER(ctypes.c_void_p)),
        ("capacity", ctypes.c_int64),
        ("logits", _FLOATS),
        ("kept_groups", _INTEGERS),
        ("tau", _FLOATS),
        ("variant", _INTEGERS),
    )


@dataclass(frozen=True)
class Input:
    """An input of a graph, as onnxruntime describes one."""

    name: str
    shape: tuple[Any, ...]
    type: str


class Native:
    """An open bundle. Any thread may run its graphs.

    Args:
        folder: the bundle.
        threads: of one operator; None leaves it to onnxruntime.
        contract: under which the gates allocate.

    Raises:
        ConfigError: the library is not there, or was built for another interface.
        BundleError: the folder is not a whole bundle.
        SessionError: a graph cannot be loaded; OutOfMemoryError where memory is what it lacks.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, contract: Contract = "cap") -> None:
        self.library = library()
        options = _Options()
        self.library.l2a_runtime_options_init(ctypes.byref(options), ctypes.c_size_t(ctypes.sizeof(options)))
        options.threads, options.contract = threads or 0, ("cap", "mean").index(contract)
        self._runtime = ctypes.c_void_p()
        path = os.fsencode(folder)
        self.check(self.library.l2a_runtime_open(path, ctypes.byref(options), ctypes.byref(self._runtime)))
        count = self.library.l2a_runtime_graph_count(self._runtime)
        self._graphs = {self.library.l2a_runtime_graph_name(self._runtime, at).decode(): at for at in range(count)}

    def __del__(self) -> None:
        if getattr(self, "_runtime", None):
            self.library.l2a_runtime_free(self._runtime)

    def decoder(self, name: str) -> NativeDecoder:
        """The graph of that name, with nothing bound."""
        return NativeDecoder(self, self._graphs[name])

    def caches(self, graph: int) -> dict[str, Input]:
        """The past keys and values that a graph reads, by name."""
        found, info = {}, _CacheInfo()
        for place in range(self.library.l2a_runtime_cache_count(self._runtime, graph)):
            self.check(self.library.l2a_runtime_cache(self._runtime, graph, place, ctypes.byref(info)))
            name = info.name.decode()
            found[name] = Input(name, ("batch", info.groups, "past", info.head_dim), _TYPES[info.type])
        return found

    def run(self, graph: int, run: _Run) -> None:
        """Runs a graph once; other threads go on meanwhile."""
        run.struct_size = ctypes.sizeof(_Run)
        self.check(self.library.l2a_runtime_run(self._runtime, graph, ctypes.byref(run)))

    def words_and_layers(self) -> tuple[int, int]:
        """Sizes of the vocabulary and of the model."""
        info = _Model(struct_size=ctypes.sizeof(_Model))
        self.check(self.library.l2a_runtime_model(self._runtime, ctypes.byref(info)))
        return info.vocab_size, info.num_layers

    def check(self, status: int | None) -> None:
        """Raises what a status says."""
        if status is None:
            return
        code = self.library.l2a_status_code(status)
        message = self.library.l2a_status_message(status).decode(errors="replace")
        self.library.l2a_status_free(status)
        kind: type[L2AError] = _ERRORS.get(code, SessionError)
        raise kind(message)


class NativeDecoder:
    """Prefill and decode steps of one graph, with keys and values in place. As ``GraphDecoder`` has it.

    Attributes:
        inputs: The past keys and values, by name.
        providers: What it runs on.
    """

    providers = ("the C++ runtime",)

    def __init__(self, native: Native, graph: int) -> None:
        self._native, self._graph = native, graph
        self.inputs = native.caches(graph)
        self._words, self._layers = native.words_and_layers()
        self._buffers: list[Array] = []
        self._addresses = (ctypes.c_void_p * max(1, len(self.inputs)))()

    def bind(self, buffers: Mapping[str, Array]) -> None:
        """Reads and writes keys and values in these buffers, by the names of the inputs."""
        self._buffers = [buffers[name] for name in self.inputs]
        for place, buffer in enumerate(self._buffers):
            self._addresses[place] = buffer.ctypes.data

    def step(self, input_ids: Array, attention_mask: Array, **inputs: Array) -> Mapping[str, Array]:
        """Runs the graph once. Arguments, result and errors are those of ``GraphDecoder.step``."""
        batch, sequence = input_ids.shape
        run = _Run(batch=batch, sequence=sequence, total=attention_mask.shape[1], caches=self._addresses)
        run.capacity = self._buffers[0].shape[2] if self._buffers else 0
        held = {  # as long as the run
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "mask": np.ascontiguousarray(attention_mask, np.int64),
            **{name: np.ascontiguousarray(value) for name, value in inputs.items()},
        }
        made: dict[str, Array] = {
            "logits": np.empty((batch, 1, self._words), np.float32),
            "kept_groups": np.empty((batch, self._layers), np.int64),
            "tau": np.empty(batch, np.float32),
            "variant": np.empty(batch, np.int64),
        }
        for name, value in (held | made).items():
            setattr(run, name, value.ctypes.data_as(_FLOATS if value.dtype == np.float32 else _INTEGERS))
        self._native.run(self._graph, run)
        if not inputs:
            return {"logits": made["logits"]}
        return made if "allocation" in inputs else {name: made[name] for name in ("kept_groups", "variant")}


def library() -> ctypes.CDLL:
    """The C++ runtime's library, its functions declared.

    Raises:
        ConfigError: it is not there, or was built for another interface.
    """
    place = os.environ.get("L2A_LIBRARY") or _NAME
    try:
        found = ctypes.CDLL(place)
    except OSError as error:
        raise ConfigError(
            f"engine 'native' needs the C++ runtime, and {place} cannot be loaded ({error}); build cpp/ and give the "
            "library's path as L2A_LIBRARY, or leave the engine at 'python'"
        ) from error
    version = found.l2a_abi_version()
    if version != _ABI:
        raise ConfigError(f"{place}: has version {version} of the interface instead of {_ABI}; build cpp/ again")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("runtime_open", pointer, (ctypes.c_char_p, pointer, pointer)),
        ("runtime_free", None, (pointer,)),
        ("runtime_model", pointer, (pointer, pointer)),
        ("runtime_graph_count", size, (pointer,)),
        ("runtime_graph_name", ctypes.c_char_p, (pointer, size)),
        ("runtime_cache_count", size, (pointer, size)),
        ("runtime_cache", pointer, (pointer, size, size, pointer)),
        ("runtime_run", pointer, (pointer, size, pointer)),
        ("verify", pointer, (ctypes.c_char_p,)),
        ("status_code", ctypes.c_int, (pointer,)),
        ("status_message", ctypes.c_char_p, (pointer,)),
        ("status_free", None, (pointer,)),
    ):
        function = getattr(found, f"l2a_{name}")
        function.restype, function.argtypes = result, arguments
    return found
