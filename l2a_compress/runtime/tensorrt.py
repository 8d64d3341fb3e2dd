"""Engines of a bundle, run by TensorRT or TensorRT-RTX itself: the execution context, its addresses and its profiles.

    bundle --open_engine (digest, version, GPU)--> bytes --deserialize--> engine --> context --> steps

:class:`EngineDecoder` has the steps of :class:`~l2a_compress.runtime.decoder.GraphDecoder` and can stand in its place.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.bundle import Bundle
from l2a_compress.engines import open_engine
from l2a_compress.errors import ConfigError, EngineError, SessionError
from l2a_compress.gpu import capability
from l2a_compress.runtime.cuda import Buffer, Cuda
from l2a_compress.runtime.decoder import PAST

Array = np.ndarray[Any, np.dtype[Any]]
PACKAGES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
# Of what an engine reads and writes; NumPy has no bfloat16, and passes it on as it is.
_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}
PRESENT = "present."
Shape = tuple[int, ...]


class Engine:
    """One engine and its execution context, on a stream.

    Args:
        folder: the bundle's.
        bundle: as it was loaded.
        graph: name of the graph.
        target: ``trt`` or ``trt-rtx``.
        cuda: the device's memory and stream.
        module: the package; None: as it is installed.
        here: compute capability of the GPU; None: it is looked up.

    Raises:
        EngineError: the package is missing, or the engine is not for it or for this GPU; says how to rebuild it.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        graph: str,
        target: str,
        cuda: Cuda,
        *,
        module: Any = None,
        here: str | None = None,
    ) -> None:
        if target not in PACKAGES:
            raise ConfigError(f"target {target!r}: choose one of {', '.join(PACKAGES)}")
        self.path = folder / f"{graph}.{target}.engine"
        try:
            trt = module if module is not None else import_module(PACKAGES[target])
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(f"{self.path}: {PACKAGES[target]} cannot be loaded to run it: {error}") from error
        version, here = str(trt.__version__), here or capability()
        self.recipe, data = open_engine(folder, bundle, graph, target, version=version, capability=here)
        self.cuda = cuda
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{self.path}: {PACKAGES[target]} {version} does not open it, or lacks memory for it")
        names = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        reads = trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == reads]
        self.outputs = [name for name in names if name not in self.inputs]
        self.on_host = {name for name in names if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        self.types = {name: _TYPES[str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]] for name in names}
        self._profile = 0

    def shape(self, name: str) -> Shape:
        """Of a tensor, -1 where it is free."""
        return tuple(self._engine.get_tensor_shape(name))

    def use_profile(self, name: str) -> None:
        """Switches to a profile of the recipe."""
        place = next(place for place, each in enumerate(self.recipe.profiles) if each.name == name)
        if place != self._profile:
            self._check(self._context.set_optimization_profile_async(place, self.cuda.stream), f"take profile {name}")
            self._profile = place

    def set_input(self, name: str, shape: Shape, pointer: int) -> None:
        """Shape and address of an input."""
        if -1 in self.shape(name):
            self._check(self._context.set_input_shape(name, shape), f"take {name} of shape {shape}")
        self._check(self._context.set_tensor_address(name, pointer), f"take an address for {name}")

    def output_shape(self, name: str) -> Shape:
        """Of an output, once all inputs have shapes."""
        found = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in found):
            raise SessionError(f"{self.path}: {name} has the shape {found}: an input has none yet")
        return found

    def set_output(self, name: str, pointer: int) -> None:
        """Address of an output."""
        self._check(self._context.set_tensor_address(name, pointer), f"take an address for {name}")

    @property
    def capturable(self) -> bool:
        """Whether a step may be recorded as a CUDA graph; TensorRT-RTX cannot always, and says so."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or bool(check(self.cuda.stream))

    def run(self) -> None:
        """Asks the stream for one step."""
        self._check(self._context.execute_async_v3(self.cuda.stream), "run")

    def _check(self, done: bool, action: str) -> None:
        if not done:
            raise SessionError(
                f"{self.path}: TensorRT cannot {action}; its profiles are in {self.recipe.file}: keep to their sizes, "
                "or export with larger ones (--max-batch, --max-prompt, --max-context)"
            )


class Tensors:
    """Memory of the device by name, which grows where it must and is kept."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._buffers, self._kept = cuda, dict[str, Buffer](), dict[str, Array]()

    def room(self, name: str, size: int) -> int:
        """Address of at least so many bytes."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers.pop(name, None)  # first: there may be no room for both, and what it holds is not read again
            self._buffers[name] = self._cuda.allocate(size)
        return self._buffers[name].pointer

    def put(self, engine: Engine, name: str, value: Array) -> None:
        """A value from the host as an input; an engine may want some where the host is."""
        value = self._kept[name] = np.ascontiguousarray(value, dtype=engine.types[name])
        if name in engine.on_host:
            engine.set_input(name, value.shape, value.ctypes.data)
            return
        pointer = self.room(name, value.nbytes)
        self._cuda.put(pointer, value)
        engine.set_input(name, value.shape, pointer)

    def swap(self, one: str, other: str) -> None:
        """Lets two names change their memory."""
        self._buffers[one], self._buffers[other] = self._buffers[other], self._buffers[one]


class EngineDecoder:
    """Prefill and decode steps of an engine with profiles of these names, with keys and values on the device.

    Each step reads past keys and values from one buffer and writes them with the new ones behind to another; the two
    then change places. Arguments are those of :class:`Engine`.
    """

    in_place = False

    def __init__(self, folder: Path, bundle: Bundle, graph: str, target: str, **settings: Any) -> None:
        self._cuda: Cuda = settings.pop("cuda", None) or Cuda()
        self.engine = Engine(folder, bundle, graph, target, self._cuda, **settings)
        self._tensors = Tensors(self._cuda)
        self._caches = [name for name in self.engine.inputs if name.startswith(PAST)]
        self._fresh = [name for name in self.engine.outputs if not name.startswith(PRESENT)]
        self._batch = self._length = 0

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token of one row."""
        shapes = ((self.engine.shape(name), np.dtype(self.engine.types[name]).itemsize) for name in self._caches)
        return sum(shape[1] * shape[3] * size for shape, size in shapes)

    def start(self, batch: int, capacity: int) -> None:
        """Makes room for ``batch`` sequences of at most ``capacity`` slots; what was there is forgotten."""
        self._batch, self._length = batch, 0
        for name in self._caches:
            _, groups, _, size = self.engine.shape(name)
            needed = batch * groups * capacity * size * np.dtype(self.engine.types[name]).itemsize
            for each in (name, PRESENT + name.removeprefix(PAST)):
                self._tensors.room(each, needed)

    def step(self, input_ids: Array, attention_mask: Array, **inputs: Array) -> Mapping[str, Array]:
        """Runs the engine once. Arguments and result are those of ``GraphDecoder.step`` in the dialect ``standard``.

        Raises:
            SessionError: shapes are beyond the engine's profiles, or the run failed.
        """
        engine, tensors = self.engine, self._tensors
        engine.use_profile("decode" if self._length else "prefill")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        for name in engine.inputs:
            if name in self._caches:
                _, groups, _, size = engine.shape(name)
                engine.set_input(name, (self._batch, groups, self._length, size), tensors.room(name, 0))
            else:
                tensors.put(engine, name, given[name])
        found: dict[str, tuple[int, Array]] = {}
        for name in engine.outputs:
            shape, dtype = engine.output_shape(name), engine.types[name]
            pointer = tensors.room(name, int(np.prod(shape)) * np.dtype(dtype).itemsize)
            engine.set_output(name, pointer)
            if name in self._fresh:
                found[name] = (pointer, np.empty(shape, dtype=dtype))
        engine.run()
        for pointer, value in found.values():
            self._cuda.get(pointer, value)
        self._cuda.wait()
        for name in self._caches:
            tensors.swap(name, PRESENT + name.removeprefix(PAST))
        self._length += input_ids.shape[1] if self._caches else 0
        return {name: value for name, (_, value) in found.items()}
