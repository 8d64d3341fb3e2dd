"""A double of the package ``tensorrt`` that writes down every call. Flags and calls are those of the documented API."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

INPUTS = {"input_ids": (-1, -1), "past_key_values.0.key": (-1, 2, -1, 16)}


class _Profile:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def set_shape(self, *arguments: Any) -> None:
        self.calls.append(("set_shape", *arguments))


class FakeTensorRT(SimpleNamespace):
    """The module; ``calls`` is what was done with it.

    Args:
        version: 10.x has flags of precision and of typing, 11.x has neither.
        parses: whether the parser takes the graph.
        engine: what the builder returns.
        profile: what adding a profile returns; -1 is a refusal.
    """

    def __init__(
        self, version: str = "11.4.0.106", *, parses: bool = True, engine: bytes | None = b"engine", profile: int = 0
    ) -> None:
        calls: list[Any] = []

        class ILogger:
            ERROR, INTERNAL_ERROR, WARNING = "ERROR", "INTERNAL_ERROR", "WARNING"

            def __init__(self) -> None:
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
                return engine

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
            ILogger=ILogger,
            Builder=Builder,
            OnnxParser=OnnxParser,
            BuilderFlag=SimpleNamespace(TF32="TF32", **precisions),
            NetworkDefinitionCreationFlag=SimpleNamespace(**typing),
        )
