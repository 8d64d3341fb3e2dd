"""A double of the package ``tensorrt``, with the calls of its documented API.

The builder writes down every call, and its engine is the name of the graph with its profiles. The runtime runs that
graph in onnxruntime, on memory of :class:`fake_cuda.FakeCuda`, within the sizes of the profile that is set.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from fake_cuda import FakeCuda

_TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(bool)": ("BOOL", np.bool_),
}


class FakeEngine:
    """An engine; with ``host``, the inputs that are wanted in the memory of the host."""

    def __init__(self, data: bytes, cuda: FakeCuda, host: tuple[str, ...] = (), *, capturable: bool = True) -> None:
        found = json.loads(data)
        self.cuda, self.host, self.profiles, self.capturable = cuda, host, found["profiles"], capturable
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(found["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.items = self.inputs | {item.name: item for item in self.session.get_outputs()}
        self.num_io_tensors = len(self.items)

    def get_tensor_name(self, place: int) -> str:
        return list(self.items)[place]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_location(self, name: str) -> str:
        return "HOST" if name in self.host else "DEVICE"

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{_TYPES[self.items[name].type][0]}"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.items[name].shape)

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    """Shapes, addresses and the profile of one engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = 0
        self.profiles: list[int] = []  # that were set
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        self.profile = place
        self.profiles.append(place)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known: dict[str, int] = {}
        for each, item in self.engine.inputs.items():
            shape = self.shapes.get(each)
            if shape:
                known |= {dim: size for dim, size in zip(item.shape, shape, strict=True) if isinstance(dim, str)}
        if "sequence" in known:
            known["present"] = known.get("past", 0) + known["sequence"]
        return tuple(known.get(dim, -1) if isinstance(dim, str) else dim for dim in self.engine.items[name].shape)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        addresses = dict(self.addresses)
        self.engine.cuda.later(lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        feed = {}
        for name, item in self.engine.inputs.items():
            shape = self.get_tensor_shape(name) if name not in self.shapes else self.shapes[name]
            feed[name] = np.empty(shape, dtype=_TYPES[item.type][1])
            ctypes.memmove(feed[name].ctypes.data, addresses[name], feed[name].nbytes)
        names = [name for name in self.engine.items if name not in self.engine.inputs]
        for name, value in zip(names, self.engine.session.run(names, feed), strict=True):
            assert value.shape == self.get_tensor_shape(name)
            ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


class _Profile:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def set_shape(self, *arguments: Any) -> None:
        self.calls.append(("set_shape", *arguments))


class FakeTensorRT(SimpleNamespace):
    """The module; ``calls`` is what was done with it.

    Args:
        version: 10.x has flags of precision and of typing, 11.x has neither.
        starts: whether CUDA starts; without it a builder is none, which pybind11 says so.
        parses: whether the parser takes the graph.
        engine: what the builder returns; ``graph``: what the runtime below takes.
        profile: what adding a profile returns; -1 is a refusal.
        cuda: whose memory the runtime uses.
        host: inputs that the runtime wants in the memory of the host.
        opens: whether the runtime opens engines.
        capturable: whether its steps can be recorded.
    """

    def __init__(
        self,
        version: str = "11.4.0.106",
        *,
        starts: bool = True,
        parses: bool = True,
        engine: bytes | str | None = b"engine",
        profile: int = 0,
        cuda: FakeCuda | None = None,
        host: tuple[str, ...] = (),
        opens: bool = True,
        capturable: bool = True,
    ) -> None:
        calls: list[Any] = []
        opened: list[FakeEngine] = []

        class Runtime:
            def __init__(self, logger: Any) -> None:
                pass

            def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
                if not opens or cuda is None:
                    return None
                opened.append(FakeEngine(data, cuda, host, capturable=capturable))
                return opened[-1]

        class ILogger:
            ERROR, INTERNAL_ERROR, WARNING = "ERROR", "INTERNAL_ERROR", "WARNING"

            def __init__(self) -> None:
                pass

        class Logger:
            ERROR = "ERROR"

            def __init__(self, severity: str) -> None:
                pass

        class Config:
            def set_flag(self, flag: Any) -> None:
                calls.append(("set_flag", flag))

            def clear_flag(self, flag: Any) -> None:
                calls.append(("clear_flag", flag))

            def add_optimization_profile(self, made: Any) -> int:
                calls.append(("add_optimization_profile",))
                return profile

        class Builder:
            def __init__(self, logger: Any) -> None:
                calls.append(("Builder",))
                if not starts:
                    logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self.logger = logger

            def create_network(self, flags: int) -> str:
                calls.append(("create_network", flags))
                return "network"

            def create_builder_config(self) -> Config:
                calls.append(("create_builder_config",))
                return Config()

            def create_optimization_profile(self) -> _Profile:
                calls.append(("create_optimization_profile",))
                return _Profile(calls)

            def build_serialized_network(self, network: str, config: Config) -> bytes | None:
                calls.append(("build_serialized_network", network))
                if engine is None:
                    self.logger.log(ILogger.WARNING, "not this one")
                    self.logger.log(ILogger.ERROR, "no kernel\nfor it")
                return _graph(calls) if engine == "graph" else engine

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: str, logger: Any) -> None:
                calls.append(("OnnxParser", network))

            def parse_from_file(self, path: str) -> bool:
                calls.append(("parse_from_file", path))
                return parses

            def get_error(self, place: int) -> Any:
                return SimpleNamespace(node_name=lambda: "v12", desc=lambda: "not supported")

        typing = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
        precisions = {"FP16": "FP16", "INT8": "INT8"} if version.startswith("10") else {}
        super().__init__(
            __version__=version,
            calls=calls,
            opened=opened,
            Runtime=Runtime,
            Logger=Logger,
            TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
            TensorLocation=SimpleNamespace(HOST="HOST", DEVICE="DEVICE"),
            ILogger=ILogger,
            Builder=Builder,
            OnnxParser=OnnxParser,
            BuilderFlag=SimpleNamespace(TF32="TF32", **precisions),
            NetworkDefinitionCreationFlag=SimpleNamespace(**typing),
        )


def _graph(calls: list[Any]) -> bytes:
    """The graph that was parsed last, with the profiles that were made for it."""
    start = max(place for place, call in enumerate(calls) if call[0] == "Builder")
    profiles: list[dict[str, Any]] = []
    for call in calls[start:]:
        if call[0] == "create_optimization_profile":
            profiles.append({})
        if call[0] == "set_shape":
            profiles[-1][call[1]] = call[2:]
    path = next(call[1] for call in calls[start:] if call[0] == "parse_from_file")
    return json.dumps({"graph": str(Path(path)), "profiles": profiles}).encode()
