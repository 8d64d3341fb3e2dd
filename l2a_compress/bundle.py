"""What export leaves: the description of a bundle folder, and its check. No graph is loaded here.

A bundle folder holds ``manifest.json`` beside one weight file, the graphs over it and the tokenizer. The published
schema of the file is ``l2a_compress/schemas/manifest.schema.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l2a_compress import _bundle_fields as check
from l2a_compress import _listing as listing
from l2a_compress import _validate
from l2a_compress._listing import FileEntry
from l2a_compress.allocation import Allocation
from l2a_compress.cost import CostModel, ModelShape
from l2a_compress.errors import AllocationError, BundleError, ConfigError
from l2a_compress.split import Split

__all__ = ["COSTS_FILE", "MANIFEST_FILE", "WEIGHT_FILE", "Bundle", "GraphEntry", "describe_bundle"]

MANIFEST_FILE = "manifest.json"
WEIGHT_FILE = "weights.bin"
COSTS_FILE = "costs.json"  # what was measured at export, where it was
SCHEMA_VERSION = 1
MOST_VARIANTS = 256
MOST_POSITIONS = 2**31 - 1  # which runtimes in C++ add and multiply in 64 bits
KINDS = ("if", "told", "variant", "static", "router")
SIZES = ("batch", "sequence", "total", "past", "present")
DIALECTS = ("ort", "standard")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
_BASE = ("name", "family", "digest")

_KIND = listing.Kind(
    what="bundle", file=MANIFEST_FILE, maker="export", remedy="copy the folder or export it again", error=BundleError
)


@dataclass(frozen=True, kw_only=True)
class GraphEntry:
    """One graph of a bundle.

    Attributes:
        name: What it is called: ``if``, ``told``, ``router``, or ``b0.7`` for the variant of budget 0.7.
        file: Its path in the folder.
        kind: ``if`` (any allocation), ``told`` (any, which the host says), ``variant`` (one), ``static`` (a variant in
            fixed shapes), or ``router`` (what the gates choose, and which variant suits a prompt).
        budget: The compute budget that a variant is for; None for the other kinds.
        allocation: What a variant runs; None for the other kinds.
        cost: A variant's cost as a share of the dense model's; 1.0 for the other kinds.
        sizes: Of a static graph, what stands for the free dimensions of docs/bundle.md; None for the other kinds.

    Raises:
        BundleError: The fields do not fit together.
    """

    name: str
    file: str
    kind: str
    budget: float | None
    allocation: Allocation | None
    cost: float
    sizes: dict[str, int] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "file"):
            _validate.line(getattr(self, name), f"graph.{name}", BundleError)
        what = f"graph {self.name}"
        if self.kind not in KINDS:
            raise BundleError(f"{what}: kind must be one of {', '.join(KINDS)}, found {_validate.shown(self.kind)}")
        fixed = self.kind in ("variant", "static")
        if fixed != (self.allocation is not None) or fixed != (self.budget is not None):
            raise BundleError(f"{what}: a variant has a budget and an allocation, other graphs neither")
        if (self.kind == "static") != (self.sizes is not None):
            raise BundleError(f"{what}: a static graph has sizes, other graphs none")
        if self.sizes is not None:
            for name, size in check.keys(self.sizes, SIZES, f"{what}: sizes").items():
                _validate.integer(size, f"{what}: {name}", BundleError, minimum=0 if name == "past" else 1)
        object.__setattr__(self, "cost", _validate.share(self.cost, f"{what}: cost", BundleError))
        if self.budget is not None:
            object.__setattr__(self, "budget", _validate.share(self.budget, f"{what}: budget", BundleError))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal entry."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["allocation"] = None if self.allocation is None else self.allocation.to_json()
        return data

    @classmethod
    def from_json(cls, data: object) -> GraphEntry:
        """Read an entry from a JSON object; an unknown or missing key is a ``BundleError``."""
        values = _plain(cls, data)
        if values["allocation"] is not None:
            try:
                values["allocation"] = Allocation.from_json(values["allocation"])
            except AllocationError as error:
                raise BundleError(f"allocation: {error}") from None
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The content of ``manifest.json``.

    Attributes:
        schema_version: Version of this format, ``SCHEMA_VERSION`` for what this library writes.
        base: The base model's name, family and digest.
        artifact: SHA-256 of the ``artifact.json`` that was exported.
        shape: Sizes of the decoder.
        dialect: ``ort`` (onnxruntime's own operators) or ``standard``.
        precision: Of the matrices.
        gates: Settings of the gates, as in the artifact.
        tags: Token ids of the think and answer tags.
        positions: Most tokens of a sequence, prompt included.
        widths: KV groups that a layer of the ``If`` graph can run with.
        whole_cache: Whether layers that the ``If`` graph skips still write keys and values, so that it may grow.
        prices: Calibrated ``(budget, price)`` pairs of the ``mean`` contract.
        graphs: The graphs, the variants from the largest budget to the smallest.
        quality: What the artifact's evaluation says of each budget, as points of report.json, and the splits of work
            that it notes, by the name ``split``; may be empty.
        versions: Versions of the packages that made it.
        files: Every other file of the folder, by its path relative to the folder with forward slashes.

    Raises:
        BundleError: A field has a wrong type or value, variants are not nested, or a path leaves the folder. The rules
            are those of docs/bundle.md.
    """

    schema_version: int
    base: dict[str, str]
    artifact: str
    shape: ModelShape
    dialect: str
    precision: str
    gates: dict[str, Any]
    tags: dict[str, int]
    positions: int
    widths: tuple[int, ...]
    whole_cache: bool
    prices: tuple[tuple[float, float], ...]
    graphs: tuple[GraphEntry, ...]
    quality: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        version = _validate.integer(self.schema_version, "schema_version", BundleError, minimum=1)
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"schema_version {version} is newer than {SCHEMA_VERSION}, the latest this library reads; upgrade it"
            )
        check.shape(self.shape)
        for name, known in (("dialect", DIALECTS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                found = _validate.shown(getattr(self, name))
                raise BundleError(f"{name} must be one of {', '.join(known)}, found {found}")
        _validate.sha256(self.artifact, "artifact", BundleError)
        _validate.integer(self.positions, "positions", BundleError, minimum=1, maximum=MOST_POSITIONS)
        _validate.flag(self.whole_cache, "whole_cache", BundleError)
        object.__setattr__(self, "base", check.texts(self.base, "base", _BASE))
        object.__setattr__(self, "versions", check.texts(self.versions, "versions"))
        object.__setattr__(self, "gates", check.gates(self.gates, self.shape))
        object.__setattr__(self, "tags", check.tags(self.tags, self.shape))
        object.__setattr__(self, "widths", check.widths(self.widths, self.shape))
        object.__setattr__(self, "prices", _validate.price_pairs(self.prices, "prices", BundleError))
        points = (_validate.json_object(point, f"quality[{at}]", BundleError) for at, point in enumerate(self.quality))
        object.__setattr__(self, "quality", tuple(points))
        object.__setattr__(self, "files", listing.parse(self.files, _KIND))
        if WEIGHT_FILE not in self.files:
            raise BundleError(f"files must list {WEIGHT_FILE}, found {_validate.shown(sorted(self.files))}")
        _check_graphs(self.graphs, self.shape, self.files)

    @property
    def cost(self) -> CostModel:
        """The cost model of the decoder."""
        return CostModel(shape=self.shape)

    @property
    def variants(self) -> tuple[GraphEntry, ...]:
        """The variants, from the largest budget to the smallest."""
        return tuple(graph for graph in self.graphs if graph.kind == "variant")

    @property
    def decoders(self) -> tuple[GraphEntry, ...]:
        """The ``If`` graph and the variants, whose shapes are free."""
        return tuple(graph for graph in self.graphs if graph.kind in ("if", "variant"))

    @property
    def split(self) -> Split | None:
        """How the work of a request is best split over the axes; None where the artifact did not note it.

        Raises:
            BundleError: what ``quality`` says of it is no split.
        """
        splits = [point for point in self.quality if point.get("name") == "split"]
        found = [{key: value for key, value in point.items() if key != "name"} for point in splits]
        return Split.from_json(found, where="quality", error=BundleError) if found else None

    @property
    def if_graph(self) -> GraphEntry | None:
        """The ``If`` graph, where the bundle has one."""
        return next((graph for graph in self.graphs if graph.kind == "if"), None)

    @property
    def told_graph(self) -> GraphEntry | None:
        """The ``If`` graph whose predicates the host gives, where the bundle has one."""
        return next((graph for graph in self.graphs if graph.kind == "told"), None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal description."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["shape"] = self.shape.to_json()
        data["widths"] = list(self.widths)
        data["prices"] = [list(pair) for pair in self.prices]
        data["graphs"] = [graph.to_json() for graph in self.graphs]
        data["quality"] = [dict(point) for point in self.quality]
        data["files"] = {name: dict(entry) for name, entry in self.files.items()}
        return data

    @classmethod
    def from_json(cls, data: object) -> Bundle:
        """Read a description from a JSON object; an unknown or missing key is a ``BundleError``."""
        values = _plain(cls, data)
        try:
            values["shape"] = ModelShape.from_json(values["shape"])
        except ConfigError as error:
            raise BundleError(f"shape: {error}") from None
        for name in ("graphs", "quality"):
            if not isinstance(values[name], list):
                raise BundleError(f"{name} must be a list, found {_validate.shown(values[name])}")
        values["graphs"] = tuple(_graph(graph, at) for at, graph in enumerate(values["graphs"]))
        return cls(**values)

    def write(self, folder: str | Path) -> None:
        """Write ``manifest.json`` into a folder, atomically.

        Raises:
            StorageError: The disk is full or the folder is not writable.
        """
        listing.write(Path(folder), self.to_json(), _KIND)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Read ``manifest.json`` and verify the size and SHA-256 of every file it lists.

        Raises:
            BundleError: The folder or a file is missing, corrupt or foreign, or a graph beside the manifest is not
                listed; the message names it.
        """
        found = listing.load(Path(folder), cls.from_json, _KIND)
        for path in sorted(Path(folder).glob("*.onnx")):
            if path.name not in found.files:
                raise BundleError(f"{path}: a graph that {MANIFEST_FILE} does not list; remove it or export again")
        return found


def describe_bundle(folder: str | Path) -> dict[str, FileEntry]:
    """Return the size and SHA-256 of every file of a folder but ``manifest.json``, ready for ``Bundle.files``."""
    return listing.describe(Path(folder), MANIFEST_FILE)


class Ladder:
    """Which allocations a nested ladder takes, offered from the largest budget to the smallest."""

    def __init__(self) -> None:
        self._budget, self._level = math.inf, list[Allocation]()
        self._above = list[Allocation]()  # those of the last larger budget that has any

    def takes(self, budget: float, allocation: Allocation) -> bool:
        """Whether it is a part of one of the next larger budget, or there is none; then it belongs to the ladder."""
        if budget < self._budget:
            self._budget, self._above, self._level = budget, self._level or self._above, []
        if self._above and not any(map(allocation.is_subset, self._above)):
            return False
        self._level.append(allocation)
        return True


def _plain(cls: type[Any], data: object) -> dict[str, Any]:
    values = _validate.keywords(cls, data, BundleError, optional=frozenset())
    return _validate.json_object(values, "", BundleError)


def _graph(data: object, at: int) -> GraphEntry:
    try:
        return GraphEntry.from_json(data)
    except BundleError as error:
        raise BundleError(f"graphs[{at}]: {error}") from None


def _check_graphs(graphs: tuple[GraphEntry, ...], shape: ModelShape, files: Mapping[str, FileEntry]) -> None:
    names = [graph.name for graph in graphs]
    if not graphs or len(set(names)) != len(names):
        raise BundleError(f"graphs must be at least one, each of its own name, found {_validate.shown(names)}")
    allocations = [graph.allocation for graph in graphs if graph.kind == "variant"]
    if len(allocations) > MOST_VARIANTS:
        raise BundleError(f"graphs must have at most {MOST_VARIANTS} variants, found {len(allocations)}")
    known = set(allocations)
    budget, ladder = 1.0, Ladder()
    for graph in graphs:
        what = f"graph {graph.name}"
        if graph.file not in files:
            raise BundleError(f"{what}: its file {graph.file!r} is not listed in files")
        if graph.allocation is None or graph.budget is None:
            continue
        allocation = graph.allocation
        if (allocation.num_layers, allocation.num_groups) != (shape.num_layers, shape.num_groups):
            raise BundleError(f"{what}: its allocation is of another model shape")
        if graph.kind == "static":
            if allocation not in known:
                raise BundleError(f"{what}: has fixed shapes of an allocation that is no variant's")
            continue
        if graph.budget > budget:
            raise BundleError(f"{what}: its budget is above that of a variant before it; variants must be nested")
        budget = graph.budget
        if not ladder.takes(budget, allocation):
            raise BundleError(f"{what}: is not a part of a variant before it; variants must be nested")
