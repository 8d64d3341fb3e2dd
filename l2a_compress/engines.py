"""TensorRT engines of a bundle: what each is built from and for, and whether it may be opened here.

For each engine there is a build recipe ``NAME.TARGET.recipe.json``, written at export, and, once it is built, the
engine ``NAME.TARGET.engine`` with a record of its build, ``NAME.TARGET.built.json``. An engine runs with the version
that built it, on the GPUs it was built for; the recipe builds it again anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from l2a_compress import _validate
from l2a_compress.bundle import WEIGHT_FILE, Bundle
from l2a_compress.errors import BundleError, EngineError

__all__ = ["TARGETS", "BuildRecipe", "Built", "Engine", "Profile", "engines", "open_engine", "rebuild_command"]

TARGETS = ("trt", "trt-rtx")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
Shape = tuple[int, ...]
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimization profile: the smallest, the usual and the largest shape of each input whose shape is free."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        _validate.line(self.name, "profile.name", BundleError)
        for name, sizes in self.shapes.items():
            low, usual, high = sizes
            ranks = {len(low), len(usual), len(high)}
            if len(ranks) > 1 or not all(0 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
                raise BundleError(f"profile {self.name}: {name} must have three shapes that do not fall, found {sizes}")

    @classmethod
    def from_json(cls, data: object) -> Profile:
        """Read a profile from a JSON object."""
        values = _plain(cls, data)
        shapes = _validate.json_object(values["shapes"], "profile.shapes", BundleError)
        try:
            values["shapes"] = {name: tuple(tuple(shape) for shape in sizes) for name, sizes in shapes.items()}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, BundleError) else BundleError(f"profile.shapes: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Built:
    """How an engine was built.

    Attributes:
        version: Of the builder's package.
        capabilities: Compute capabilities of the GPUs that it runs on.
        sha256: Of the engine.
        seconds: What it took.
    """

    version: str
    capabilities: tuple[str, ...]
    sha256: str
    seconds: float

    def __post_init__(self) -> None:
        _validate.line(self.version, "built.version", BundleError)
        object.__setattr__(self, "capabilities", _capabilities(self.capabilities))
        _validate.sha256(self.sha256, "built.sha256", BundleError)
        _validate.positive(self.seconds, "built.seconds", BundleError)

    def text(self) -> str:
        """The content of its file."""
        return _text({item.name: getattr(self, item.name) for item in fields(self)})


@dataclass(frozen=True, kw_only=True)
class BuildRecipe:
    """All that an engine is built from.

    Attributes:
        graph: Name of the graph in the manifest.
        target: ``trt`` (TensorRT) or ``trt-rtx`` (TensorRT-RTX).
        capabilities: Compute capabilities to build for, as texts such as ``8.9``; none: of the GPU it is built on.
        flags: Flags of the network and of the builder by name, on or off; all others stay as the builder has them.
        profiles: Optimization profiles; none where all shapes are fixed.
        graph_sha256: Of the graph's file.
        weights_sha256: Of the weight file.

    Raises:
        BundleError: A field has a wrong type or value.
    """

    graph: str
    target: str
    capabilities: tuple[str, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    graph_sha256: str
    weights_sha256: str

    def __post_init__(self) -> None:
        _validate.line(self.graph, "recipe.graph", BundleError)
        if self.target not in TARGETS:
            found = _validate.shown(self.target)
            raise BundleError(f"recipe.target must be one of {', '.join(TARGETS)}, found {found}")
        object.__setattr__(self, "capabilities", _capabilities(self.capabilities))
        for name, flag in self.flags.items():
            _validate.flag(flag, f"recipe.flags.{name}", BundleError)
        for name in ("graph_sha256", "weights_sha256"):
            _validate.sha256(getattr(self, name), f"recipe.{name}", BundleError)

    @property
    def file(self) -> str:
        """Name of the recipe's own file."""
        return f"{self.graph}.{self.target}.recipe.json"

    @property
    def engine(self) -> str:
        """Name of the engine's file."""
        return f"{self.graph}.{self.target}.engine"

    @property
    def record(self) -> str:
        """Name of the file that says how the engine was built."""
        return f"{self.graph}.{self.target}.built.json"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal recipe."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data["capabilities"] = list(self.capabilities)
        data["profiles"] = [{"name": each.name, "shapes": each.shapes} for each in self.profiles]
        return data

    def text(self) -> str:
        """The content of its file."""
        return _text(self.to_json())

    @classmethod
    def from_json(cls, data: object) -> BuildRecipe:
        """Read a recipe from a JSON object; an unknown or missing key is a ``BundleError``."""
        values = _plain(cls, data)
        if not isinstance(values["profiles"], list):
            raise BundleError(f"recipe.profiles must be a list, found {_validate.shown(values['profiles'])}")
        values["profiles"] = tuple(Profile.from_json(each) for each in values["profiles"])
        values["flags"] = _validate.json_object(values["flags"], "recipe.flags", BundleError)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A recipe, and how its engine was built; None: not yet."""

    recipe: BuildRecipe
    built: Built | None


def engines(folder: str | Path, bundle: Bundle, target: str | None = None) -> tuple[Engine, ...]:
    """Return the engines of a bundle that ``Bundle.load`` has verified, in the order of its graphs.

    Raises:
        BundleError: A recipe is broken, or is of a graph or weights that the bundle does not hold.
    """
    found = []
    for graph in bundle.graphs:
        for each in TARGETS if target is None else (target,):
            name = f"{graph.name}.{each}.recipe.json"
            if name not in bundle.files:
                continue
            recipe = _read(Path(folder) / name, BuildRecipe.from_json)
            digests = (bundle.files[graph.file]["sha256"], bundle.files[WEIGHT_FILE]["sha256"])
            named = (recipe.graph, recipe.target) == (graph.name, each)
            if not named or digests != (recipe.graph_sha256, recipe.weights_sha256):
                raise BundleError(f"{folder}/{name}: is of another graph or of other weights; export the bundle again")
            whole = recipe.engine in bundle.files and recipe.record in bundle.files
            built = _read(Path(folder) / recipe.record, lambda data: Built(**_plain(Built, data))) if whole else None
            found.append(Engine(recipe=recipe, built=built))
    return tuple(found)


def _read(path: Path, parse: Callable[[object], Content]) -> Content:
    try:
        return parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not what export and build-engines write ({error}); export the bundle again"
        ) from None


def open_engine(
    folder: str | Path, bundle: Bundle, graph: str, target: str, *, version: str, capability: str | None
) -> tuple[BuildRecipe, bytes]:
    """Read an engine, once it is certain that it is what was built, by the version and for the GPU that are here.

    Args:
        folder: the bundle's.
        bundle: as it was loaded.
        graph: name of the graph.
        target: ``trt`` or ``trt-rtx``.
        version: of the package that will run it.
        capability: of the GPU that is here; None where there is none.

    Raises:
        BundleError: There is no recipe of such an engine, or the recipe is broken.
        EngineError: It is not built, not what was built, or built for other circumstances; says how to rebuild it.
    """
    found = next((each for each in engines(folder, bundle, target) if each.recipe.graph == graph), None)
    if found is None:
        raise BundleError(f"{folder}: has no engine of {graph} for {target}; export it with --target {target}")
    recipe, built = found.recipe, found.built
    path, again = Path(folder) / recipe.engine, rebuild_command(folder, target)
    if built is None:
        raise EngineError(f"{path}: is not built yet; on the machine that is to run it: {again}")
    if built.version != version:
        raise EngineError(f"{path}: was built by {target} {built.version}, and here is {version}; {again}")
    if capability not in built.capabilities:
        wanted = ", ".join(built.capabilities)
        here = "no GPU is here" if capability is None else f"the GPU here has {capability}"
        raise EngineError(f"{path}: was built for compute capability {wanted}, and {here}; {again}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; {again}") from error
    if hashlib.sha256(data).hexdigest() != built.sha256:  # of the very bytes that will be opened
        raise EngineError(f"{path}: is not what was built: its SHA-256 is another one; {again}")
    return recipe, data


def rebuild_command(folder: str | Path, target: str) -> str:
    """What to type to build all engines of a bundle again."""
    return f"rebuild it: l2a compress build-engines {folder} --target {target} --force"


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _plain(cls: type[Any], data: object) -> dict[str, Any]:
    return _validate.keywords(cls, data, BundleError, optional=frozenset())


def _capabilities(value: object) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(text, str) and _CAPABILITY.fullmatch(text) for text in texts):
        raise BundleError(f"capabilities must be texts such as '8.9', found {_validate.shown(value)}")
    return texts
