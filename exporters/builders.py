"""TensorRT and TensorRT-RTX as builders: a graph and its recipe -> the bytes of an engine.

Both packages have one Python API. TensorRT builds on the GPU that is there and for it; TensorRT-RTX builds ahead of
time, without a GPU, for the compute capabilities it is told. Neither is needed to import this module, nor are onnx
and torch: engines are built on machines that have the bundle and TensorRT alone.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/ (10.15 and 11.x) and
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from l2a_compress.engines import BuildRecipe
from l2a_compress.errors import ConfigError, EngineError
from l2a_compress.gpu import capability

STRONGLY_TYPED = "STRONGLY_TYPED"
_MALFORMED = 1 | 32  # diagnostics of a header: another version, or no engine at all


class EngineBuilder(Protocol):
    """What builds engines of one target."""

    target: str

    @property
    def version(self) -> str:
        """Of the package."""

    def build(self, graph: Path, recipe: BuildRecipe) -> tuple[memoryview, tuple[str, ...]]:
        """The engine, and the compute capabilities that it runs on."""


class Builder:
    """What both packages share.

    Args:
        module: the package; None: as it is installed.

    Raises:
        EngineError: it is not installed, or cannot be loaded.
    """

    target = ""
    package = ""
    extra = ""

    def __init__(self, module: ModuleType | Any = None) -> None:
        self._trt: Any = module if module is not None else _load(self.package, self.target, self.extra)

    @property
    def version(self) -> str:
        """Of the package."""
        return str(self._trt.__version__)

    def build(self, graph: Path, recipe: BuildRecipe) -> tuple[memoryview, tuple[str, ...]]:
        """Parses a graph with its weights and builds its engine.

        Args:
            graph: the ONNX file; the weights lie beside it.
            recipe: what is to be built.

        Returns:
            The engine's bytes, and the compute capabilities that it runs on.

        Raises:
            ConfigError: the recipe asks for a flag or capability that this version does not know.
            EngineError: no such GPU is here, or the parser or the builder refuses the graph; says what it said.
        """
        capabilities = self._capabilities(recipe)  # first: to parse a graph is to read all weights
        trt, log = self._trt, self._log()
        builder = self._builder(log)
        network = builder.create_network(self._network_flags(recipe))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            errors = [parser.get_error(place) for place in range(parser.num_errors)]
            told = [f"{error.node_name()}: {error.desc()}".strip(": ") for error in errors]
            raise self._refused(graph, "parse", told or log.errors)
        config = builder.create_builder_config()
        for name, wanted in sorted(recipe.flags.items()):
            if name != STRONGLY_TYPED:
                flag = self._member(trt.BuilderFlag, name, "flag")
                (config.set_flag if wanted else config.clear_flag)(flag)
        self._aim(config, capabilities)
        for each in recipe.profiles:
            profile = builder.create_optimization_profile()
            for name, sizes in each.shapes.items():
                profile.set_shape(name, *sizes)
            if config.add_optimization_profile(profile) < 0:
                raise self._refused(graph, f"take the profile {each.name} of", log.errors)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise self._refused(graph, "build", log.errors)
        found = memoryview(engine)
        self.check(graph, found)
        return found, capabilities

    def check(self, graph: Path, engine: memoryview) -> None:
        """Raises an EngineError where bytes are no engine of this version."""
        if not engine.nbytes:
            raise self._refused(graph, "build", ["the engine is empty"])

    def _capabilities(self, recipe: BuildRecipe) -> tuple[str, ...]:
        raise NotImplementedError

    def _aim(self, config: Any, capabilities: tuple[str, ...]) -> None:
        """Tells the builder what it cannot find out itself."""

    def _builder(self, log: Any) -> Any:
        try:
            return self._trt.Builder(log)
        except (TypeError, RuntimeError) as error:  # pybind11's, of a constructor that returns nothing
            why = "; ".join([*log.errors[-3:], str(error)])
            raise EngineError(
                f"{self.package} {self.version} cannot start here ({why}); CUDA must start for it: see whether "
                "nvidia-smi lists a GPU and whether its driver is new enough"
            ) from error

    def _network_flags(self, recipe: BuildRecipe) -> int:
        # From TensorRT 11 on all networks are strongly typed, and the flag is one that does nothing.
        flag = getattr(self._trt.NetworkDefinitionCreationFlag, STRONGLY_TYPED, None)
        return 1 << int(flag) if recipe.flags.get(STRONGLY_TYPED) and flag is not None else 0

    def _member(self, group: Any, name: str, what: str) -> Any:
        found = getattr(group, name, None)
        if found is None:
            raise ConfigError(f"{self.package} {self.version} has no {what} {name}; install the version of the recipe")
        return found

    def _refused(self, graph: Path, action: str, told: list[str]) -> EngineError:
        lines = [" ".join(line.split()) for line in told] or ["it does not say why"]
        return EngineError(
            f"{graph}: {self.package} {self.version} cannot {action} it: {'; '.join(lines[-3:])}; "
            "`l2a compress verify` names graphs that break the export rules"
        )

    def _log(self) -> Any:
        """A logger that keeps errors; their severities are the package's own."""
        logger = self._trt.ILogger

        class Log(logger):  # type: ignore[misc, valid-type]  # the class is known only now
            def __init__(self) -> None:
                logger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (logger.ERROR, logger.INTERNAL_ERROR):
                    self.errors.append(message)

        return Log()


class TensorRT(Builder):
    """TensorRT 10 and 11. It builds on the GPU that is there, and for it."""

    target = "trt"
    package = "tensorrt"
    extra = "gpu"

    def _capabilities(self, recipe: BuildRecipe) -> tuple[str, ...]:
        here = capability()
        if here is None:
            raise EngineError("TensorRT builds on a GPU, and none is here; build on the machine that is to run it")
        if recipe.capabilities and here not in recipe.capabilities:
            wanted = ", ".join(recipe.capabilities)
            raise EngineError(
                f"the recipe of {recipe.graph} is for compute capability {wanted}, and the GPU here has {here}; build "
                "on such a GPU, or export with another --device"
            )
        return (here,)


class TensorRTRTX(Builder):
    """TensorRT-RTX. It builds ahead of time, for the compute capabilities that the recipe names."""

    target = "trt-rtx"
    package = "tensorrt_rtx"
    extra = "trt-rtx"

    def check(self, graph: Path, engine: memoryview) -> None:
        """As everywhere; also what the package says of the header. Whether it runs is known on a GPU alone."""
        super().check(graph, engine)
        _, diagnostics = self._trt.Runtime(self._log()).get_engine_validity(engine)
        if diagnostics & _MALFORMED:
            raise self._refused(graph, "read the header of", [f"diagnostics {diagnostics}"])

    def _capabilities(self, recipe: BuildRecipe) -> tuple[str, ...]:
        return recipe.capabilities

    def _aim(self, config: Any, capabilities: tuple[str, ...]) -> None:
        config.num_compute_capabilities = len(capabilities)
        for place, each in enumerate(capabilities):
            name = f"SM{each.replace('.', '')}"
            config.set_compute_capability(self._member(self._trt.ComputeCapability, name, "target"), place)


BUILDERS: dict[str, Callable[[], EngineBuilder]] = {each.target: each for each in (TensorRT, TensorRTRTX)}


def _load(package: str, target: str, extra: str) -> ModuleType:
    try:
        module = import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are loaded at once, and may lack the driver
        raise EngineError(
            f"{package} cannot be loaded ({error}), so no engine for {target} is built here; install it with "
            f"pip install 'l2a-compress[{extra}]', on the machine that is to run the engines"
        ) from error
    if not hasattr(module, "Builder"):
        raise EngineError(
            f"{package} is installed without its libraries, so no engine for {target} is built here; install it with "
            f"pip install 'l2a-compress[{extra}]', on the machine that is to run the engines"
        )
    return module
