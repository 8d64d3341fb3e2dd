"""One graph of a bundle in onnxruntime, with key/value caches that it owns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from l2a_compress.errors import L2AError, OutOfMemoryError, SessionError
from l2a_compress.runtime.arena import giving_back, share_arena
from l2a_compress.runtime.pages import zeros
from l2a_compress.runtime.providers import CPU, Provider, open_session

Array = np.ndarray[Any, np.dtype[Any]]
# What NumPy and ONNX call the elements of keys and values.
CACHE_TYPES = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
MANY_TOKENS = 64  # a run of more takes far more memory than the steps behind it
PAST, _PRESENT = "past_key_values.", "present."
# What onnxruntime says where memory is short; its messages name tensors and files too, such as `allocation`.
_SHORT = re.compile(
    "bad_alloc|bad allocation|failed to allocate|unable to allocate|cannot allocate memory|out of memory", re.IGNORECASE
)


class GraphDecoder:
    """Prefill and decode steps of one graph.

    Args:
        path: the graph; its weight file lies beside it.
        in_place: whether keys and values are written into buffers of a fixed size (dialect ``ort``), or each step gives
            larger ones (dialect ``standard``).
        threads: of one operator; None leaves it to onnxruntime.
        provider: what onnxruntime is to run it on.

    Attributes:
        providers: What it runs on, in order.

    Raises:
        ConfigError: no such provider.
        SessionError: onnxruntime cannot load the graph; OutOfMemoryError where memory is what it lacks.
    """

    def __init__(
        self,
        path: Path,
        *,
        in_place: bool = True,
        threads: int | None = None,
        provider: Provider = "cpu",
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Else threads of one session go on spinning for a while behind a run, and the session that runs next waits.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Else a session remembers a plan for each shape of its inputs, and each step of a request has a new one.
        options.enable_mem_pattern = False
        share_arena(options)
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if not in_place:  # onnxruntime 1.32 fuses DequantizeLinear of weights in a branch into what is wrong
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._path = path
        try:
            self.session = open_session(path, options, provider)
        except L2AError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no class in common
            raise session_error(path, "load", error) from error
        self.providers: list[str] = self.session.get_providers()
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.in_place = in_place
        # onnxruntime copies an input from the host to a device as it is bound, not as a graph runs.
        self._copied = in_place and self.providers[0] != CPU
        names = [item.name for item in self.session.get_outputs()]
        self._fresh = [name for name in names if not (in_place and name.startswith(_PRESENT))]  # made by each step
        self._binding = self.session.io_binding()
        self._buffers: Mapping[str, ort.OrtValue] = {}  # what the binding borrows
        self._given: dict[str, Array] = {}

    def start(self, batch: int, capacity: int) -> None:
        """Makes room for ``batch`` sequences of at most ``capacity`` slots; what was there is forgotten."""
        wanted: dict[str, tuple[Sequence[int], Any]] = {}
        for name, item in self.inputs.items():
            if name.startswith(PAST):
                _, groups, _, size = item.shape
                wanted[name] = ((batch, groups, capacity if self.in_place else 0, size), CACHE_TYPES[item.type][0])
        self.bind(zeros(wanted))

    def bind(self, buffers: Mapping[str, Array]) -> None:
        """Reads, and where in place also writes, keys and values in these buffers, by the names of the inputs."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._buffers = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, CACHE_TYPES[self.inputs[name].type][1])
            for name, buffer in buffers.items()
        }
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            if self.in_place:
                self._binding.bind_ortvalue_output(_PRESENT + name.removeprefix(PAST), buffer)

    def step(self, input_ids: Array, attention_mask: Array, **inputs: Array) -> Mapping[str, Array]:
        """Runs the graph once.

        Args:
            input_ids: [batch, sequence], int64.
            attention_mask: [batch, total], int64; what it means is up to the dialect (docs/bundle.md).
            inputs: the graph's other inputs by name.

        Returns:
            All outputs but the buffers, by name.

        Raises:
            SessionError: the run failed, and may be tried again; OutOfMemoryError where memory is what it lacks.
        """
        binding = self._binding
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        self._given = {name: np.ascontiguousarray(value) for name, value in given.items()}
        try:
            for name, buffer in self._buffers.items() if self._copied else ():
                binding.bind_ortvalue_input(name, buffer)
            for name, value in self._given.items():
                binding.bind_cpu_input(name, value)
            for name in self._fresh:
                binding.bind_output(name, "cpu")
            self.session.run_with_iobinding(binding, giving_back() if input_ids.size >= MANY_TOKENS else None)
        except Exception as error:
            raise session_error(self._path, "run", error) from error
        found = binding.get_outputs_as_ortvaluevector()  # in the order they were bound in: the buffers stand first
        first = len(found) - len(self._fresh)
        values = {name: ort.OrtValue(found[first + at]) for at, name in enumerate(self._fresh)}
        presents = [name for name in values if name.startswith(_PRESENT)]
        for name in presents:
            binding.bind_ortvalue_input(PAST + name.removeprefix(_PRESENT), values.pop(name))
        return {name: value.numpy() for name, value in values.items()}


def predicates(allocation: Array, stem: int, widths: Sequence[int]) -> dict[str, Array]:
    """Which ``If`` nodes of the graph ``told`` run, as its inputs, for an allocation [rows, layers] of kept groups."""
    found = {}
    for layer, widest in enumerate(allocation.max(axis=0).tolist()):
        if layer < stem:
            continue
        below = 0
        for width in widths:
            last = width == widths[-1]
            found[f"runs.{layer}.{width}"] = np.array(below < widest and (last or widest <= width))
            below = width
    return found


def session_error(path: Path, action: str, error: Exception) -> SessionError:
    """What onnxruntime says, as an error of this library; its words tell whether memory was short."""
    text = f"{type(error).__name__}: {error}".strip()
    if isinstance(error, MemoryError) or _SHORT.search(text.replace(str(path), "")):
        return OutOfMemoryError(f"{path}: not enough memory to {action} it ({text}); free some, or lower the budget")
    return SessionError(f"{path}: onnxruntime cannot {action} it: {text}")
