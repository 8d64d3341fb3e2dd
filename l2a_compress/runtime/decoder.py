"""One graph of a bundle in onnxruntime, with key/value caches that it owns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array = np.ndarray[Any, np.dtype[Any]]
_CACHES = {"tensor(float)": (np.float32, 1), "tensor(float16)": (np.float16, 10), "tensor(bfloat16)": (np.uint16, 16)}
_PAST, _PRESENT = "past_key_values.", "present."


class GraphDecoder:
    """Prefill and decode steps of one graph.

    Args:
        path: the graph; its weight file lies beside it.
        in_place: whether keys and values are written into buffers of a fixed size (dialect ``ort``), or each step gives
            larger ones (dialect ``standard``).
        threads: of one operator; None leaves it to onnxruntime.
        providers: execution providers in order of preference.
    """

    def __init__(
        self,
        path: Path,
        *,
        in_place: bool = True,
        threads: int | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=list(providers))
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.in_place = in_place
        self._binding = self.session.io_binding()
        self._buffers: dict[str, ort.OrtValue] = {}
        self._given: dict[str, Array] = {}

    def start(self, batch: int, capacity: int) -> None:
        """Makes room for ``batch`` sequences of at most ``capacity`` slots; what was there is forgotten."""
        self._buffers = {}
        for name, item in self.inputs.items():
            if name.startswith(_PAST):
                _, groups, _, size = item.shape
                dtype, number = _CACHES[item.type]
                room = np.zeros((batch, groups, capacity if self.in_place else 0, size), dtype=dtype)
                self._buffers[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(room, number)

    def step(self, input_ids: Array, attention_mask: Array, **inputs: Array) -> Mapping[str, Array]:
        """Runs the graph once.

        Args:
            input_ids: [batch, sequence], int64.
            attention_mask: [batch, total], int64; what it means is up to the dialect (docs/bundle.md).
            inputs: the graph's other inputs by name.

        Returns:
            All outputs but the buffers, by name.
        """
        binding = self._binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        self._given = {name: np.ascontiguousarray(value) for name, value in given.items()}  # the binding only borrows
        for name, value in self._given.items():
            binding.bind_cpu_input(name, value)
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name in self.outputs:
            if self.in_place and name.startswith(_PRESENT):
                binding.bind_ortvalue_output(name, self._buffers[_past_of(name)])
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        if not self.in_place:
            self._buffers = {_past_of(name): value for name, value in values.items() if name.startswith(_PRESENT)}
        return {name: value.numpy() for name, value in values.items() if not name.startswith(_PRESENT)}


def _past_of(present: str) -> str:
    return _PAST + present.removeprefix(_PRESENT)
