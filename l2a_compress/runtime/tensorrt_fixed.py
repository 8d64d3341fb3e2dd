"""Engines of fixed shapes: a prefill and a decode step that never change, the latter as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.bundle import Bundle
from l2a_compress.errors import BundleError, ConfigError, SessionError
from l2a_compress.runtime.cuda import Cuda
from l2a_compress.runtime.decoder import PAST
from l2a_compress.runtime.tensorrt import PRESENT, Engine, Tensors

Array = np.ndarray[Any, np.dtype[Any]]


class FixedDecoder:
    """A variant's pair of engines of fixed shapes: prompts padded to their length, decode steps as one CUDA graph.

    Keys and values stand in buffers of ``sequence`` slots. A decode step gives one slot more; the new one is copied
    into the first slot that no row uses, and the mask then marks it.

    Args:
        folder: the bundle's.
        bundle: as it was loaded.
        graph: the variant, ``b0.7``.
        target: ``trt`` or ``trt-rtx``.
        batch: rows.
        sequence: tokens of prompt and text.
        settings: further arguments of :class:`Engine`.

    Raises:
        BundleError: there are no engines of these sizes.
    """

    in_place = False

    def __init__(
        self, folder: Path, bundle: Bundle, graph: str, target: str, *, batch: int, sequence: int, **settings: Any
    ) -> None:
        self._cuda: Cuda = settings.pop("cuda", None) or Cuda()
        names = {phase: f"{graph}.{phase}.batch{batch}.seq{sequence}" for phase in ("prefill", "decode")}
        if not set(names.values()) <= {entry.name for entry in bundle.graphs}:
            raise BundleError(
                f"{folder}: has no graphs of {graph} for {batch} rows of {sequence} tokens; export with --static-shapes"
            )
        self._engines = {
            phase: Engine(folder, bundle, name, target, self._cuda, **settings) for phase, name in names.items()
        }
        self._batch, self._sequence = batch, sequence
        self._tensors = Tensors(self._cuda)
        self._mask = np.zeros((batch, sequence + 1), dtype=np.int64)
        self._used = 0
        self._replay: Callable[[], None] | None = None
        self._bind()

    def start(self, batch: int, capacity: int) -> None:
        """Begins anew; both must be within what the engines were built for."""
        if batch != self._batch or capacity > self._sequence:
            raise ConfigError(
                f"{batch} rows of {capacity} tokens: these engines are for {self._batch} of {self._sequence}"
            )
        self._used = 0

    def step(self, input_ids: Array, attention_mask: Array) -> Mapping[str, Array]:
        """The prompt at first, one token of each row after that.

        Args:
            input_ids: [batch, sequence], int64.
            attention_mask: [batch, total], int64: 1 on real tokens, those of the past included.

        Returns:
            ``logits`` [batch, 1, vocabulary].
        """
        if not self._used:
            return {"logits": self._prefill(input_ids, attention_mask)}
        if self._used >= self._sequence:
            raise SessionError(f"all {self._sequence} slots are used; export with a larger --static-shapes")
        engine = self._engines["decode"]
        self._tensors.put(engine, "input_ids", input_ids)
        self._tensors.put(engine, "attention_mask", self._mask)
        if self._replay is not None:
            self._replay()
        else:
            engine.run()  # once as it is: TensorRT puts some of its work off to the first run
            self._cuda.wait()
            self._replay = self._cuda.capture(engine.run) if engine.capturable else engine.run
        return {"logits": self._finish("decode", self._used)}

    def _prefill(self, ids: Array, mask: Array) -> Array:
        engine, length = self._engines["prefill"], ids.shape[1]
        missing = ((0, 0), (0, self._sequence - length))
        self._tensors.put(engine, "input_ids", np.pad(ids, missing))
        self._tensors.put(engine, "attention_mask", np.pad(mask, missing))
        engine.run()
        self._mask[:] = 0
        self._mask[:, :length] = mask
        self._mask[:, -1] = 1  # where a decode step sees its own token
        self._used = length
        return self._finish("prefill", None)

    def _bind(self) -> None:
        """Gives all but tokens and mask their addresses, for good. What prefill writes is what decode steps read."""
        for phase, engine in self._engines.items():
            for name in engine.inputs:
                if name.startswith(PAST):
                    engine.set_input(name, engine.shape(name), self._room(engine, name, name))
            for name in engine.outputs:
                past = PAST + name.removeprefix(PRESENT)
                own = phase == "decode" or not name.startswith(PRESENT)
                engine.set_output(name, self._room(engine, name, f"{phase}.{name}" if own else past))

    def _finish(self, phase: str, slot: int | None) -> Array:
        """The logits. After a decode step, also puts what it found for its token into a free slot, and marks it."""
        engine = self._engines[phase]
        found: Array = np.empty(engine.shape("logits"), dtype=engine.types["logits"])
        self._cuda.get(self._room(engine, "logits", f"{phase}.logits"), found)
        for name in engine.outputs if slot is not None else ():
            if not name.startswith(PRESENT):
                continue
            batch, groups, slots, size = engine.shape(name)
            width = size * np.dtype(engine.types[name]).itemsize
            past = self._tensors.room(PAST + name.removeprefix(PRESENT), 0)
            new = self._tensors.room(f"{phase}.{name}", 0) + (slots - 1) * width
            pitch, source = (slots - 1) * width, slots * width
            self._cuda.copy_rows(past + (slot or 0) * width, pitch, new, source, width, batch * groups)
        self._cuda.wait()
        if slot is not None:
            self._mask[:, slot] = 1
            self._used += 1
        return found

    def _room(self, engine: Engine, name: str, owner: str) -> int:
        """Address of a tensor of a fixed shape."""
        return self._tensors.room(owner, int(np.prod(engine.shape(name))) * np.dtype(engine.types[name]).itemsize)
