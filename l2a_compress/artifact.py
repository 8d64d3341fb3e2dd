"""What training leaves: the description of an artifact folder, and its check. No tensors are read here.

An artifact folder holds ``artifact.json`` beside the safetensors that it lists. The published schema of the file is
``l2a_compress/schemas/artifact.schema.json``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l2a_compress import _listing as listing
from l2a_compress import _validate
from l2a_compress._listing import FileEntry
from l2a_compress.cost import ModelShape
from l2a_compress.errors import ArtifactError, ConfigError
from l2a_compress.split import Split

__all__ = ["ARTIFACT_FILE", "SCHEMA_VERSION", "ArtifactConfig", "FileEntry", "describe_files"]

ARTIFACT_FILE = "artifact.json"
SCHEMA_VERSION = 1

_KIND = listing.Kind(
    what="artifact",
    file=ARTIFACT_FILE,
    maker="training",
    remedy="copy the folder or train it again",
    error=ArtifactError,
)
_BASE_TEXTS = ("name", "family", "digest")


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """The content of ``artifact.json``.

    Attributes:
        schema_version: Version of this format, ``SCHEMA_VERSION`` for what this library writes.
        base: The base model: ``name``, ``family``, ``digest`` (of its weights) and ``path``, a hint where it was.
        shape: The base model's sizes.
        gates: Settings of the allocator and the gates.
        adapter: Settings of the adapters.
        prices: Per axis the calibrated ``(budget, price)`` pairs of the ``mean`` contract, by ascending budget.
        training: The resolved recipe.
        metrics: What was measured at the end of training; ``split`` what ``l2a compress split`` measured.
        seed: The seed of the run.
        versions: Versions of the packages that made it.
        files: Every other file of the folder, by its path relative to the folder with forward slashes.

    Raises:
        ArtifactError: A field has a wrong type, a value is NaN, or a path leaves the folder.
    """

    schema_version: int
    base: dict[str, Any]
    shape: ModelShape
    gates: dict[str, Any]
    adapter: dict[str, Any]
    prices: dict[str, tuple[tuple[float, float], ...]]
    training: dict[str, Any]
    metrics: dict[str, Any]
    seed: int
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        version = _validate.integer(self.schema_version, "schema_version", ArtifactError, minimum=1)
        if version > SCHEMA_VERSION:
            raise ArtifactError(
                f"schema_version {version} is newer than {SCHEMA_VERSION}, the latest this library reads; upgrade it"
            )
        if not isinstance(self.shape, ModelShape):
            raise ArtifactError(f"shape must be a ModelShape, found {self.shape!r}")
        _validate.integer(self.seed, "seed", ArtifactError, minimum=0)
        for name in ("gates", "adapter", "training", "metrics"):
            object.__setattr__(self, name, _object(getattr(self, name), name))
        object.__setattr__(self, "base", _base(self.base))
        object.__setattr__(self, "prices", _prices(self.prices))
        object.__setattr__(self, "versions", _versions(self.versions))
        object.__setattr__(self, "files", listing.parse(self.files, _KIND))

    @property
    def split(self) -> Split | None:
        """How the work of a request is best split over the axes; None where it was not measured.

        Raises:
            ArtifactError: ``metrics.split`` is none.
        """
        return Split.from_json(self.metrics["split"]) if "split" in self.metrics else None

    @property
    def digest(self) -> str:
        """Of the model that the folder describes: its SHA-256 is the same whatever is noted in ``metrics`` later."""
        data = self.to_json()
        told = {name: data[name] for name in ("gates", "adapter", "prices", "files")} | {"base": self.base["digest"]}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal description."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["shape"] = self.shape.to_json()
        data["prices"] = {axis: [list(pair) for pair in pairs] for axis, pairs in self.prices.items()}
        data["files"] = {name: dict(entry) for name, entry in self.files.items()}
        return data

    @classmethod
    def from_json(cls, data: object) -> ArtifactConfig:
        """Read a description from a JSON object; an unknown or missing key is an ``ArtifactError``."""
        values = _validate.keywords(cls, data, ArtifactError, optional=frozenset())
        values = _validate.json_object(values, "", ArtifactError)
        try:
            values["shape"] = ModelShape.from_json(values["shape"])
        except ConfigError as error:
            raise ArtifactError(f"shape: {error}") from None
        return cls(**values)

    def write(self, folder: str | Path) -> None:
        """Write ``artifact.json`` into a folder, atomically.

        Raises:
            StorageError: The disk is full or the folder is not writable.
        """
        listing.write(Path(folder), self.to_json(), _KIND)

    @classmethod
    def load(cls, folder: str | Path) -> ArtifactConfig:
        """Read ``artifact.json`` and verify the size and SHA-256 of every file it lists.

        Raises:
            ArtifactError: The folder or a file is missing, corrupt or foreign; the message names it.
        """
        return listing.load(Path(folder), cls.from_json, _KIND)


def describe_files(folder: str | Path) -> dict[str, FileEntry]:
    """Return the size and SHA-256 of every file of a folder but ``artifact.json``, ready for ``ArtifactConfig.files``.

    Raises:
        StorageError: A file cannot be read.
    """
    return listing.describe(Path(folder), ARTIFACT_FILE)


def _object(value: object, name: str) -> dict[str, Any]:
    return _validate.json_object(value, name, ArtifactError)


def _base(value: object) -> dict[str, Any]:
    base = _object(value, "base")
    for name in _BASE_TEXTS:
        _validate.text(base.get(name), f"base.{name}", ArtifactError)
    path = base.setdefault("path", None)
    if path is not None and not isinstance(path, str):
        raise ArtifactError(f"base.path must be text or null, found {_validate.shown(path)}")
    return base


def _prices(value: object) -> dict[str, tuple[tuple[float, float], ...]]:
    prices = _object(value, "prices")
    return {axis: _validate.price_pairs(pairs, f"prices.{axis}", ArtifactError) for axis, pairs in prices.items()}


def _versions(value: object) -> dict[str, str]:
    versions = _object(value, "versions")
    return {name: _validate.text(version, f"versions.{name}", ArtifactError) for name, version in versions.items()}
