"""Which data to train and evaluate on: one source, or a weighted mixture of several."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from l2a_compress import _validate
from l2a_compress.errors import ConfigError

__all__ = ["KINDS", "WITH_ANSWERS", "DataConfig", "MixtureConfig", "SourceKind", "data_from_json", "parse_columns"]

SourceKind = Literal["embedded", "gsm8k", "reasoning", "chat", "text"]
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
WITH_ANSWERS: tuple[SourceKind, ...] = ("embedded", "gsm8k", "reasoning")  # exact ones, to compare with

# What each kind reads, by our name of the column. A leading "?" marks a column that may be missing.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "embedded": (),
    "gsm8k": ("prompt", "answer"),
    "reasoning": ("prompt", "trace", "?short", "answer"),
    "chat": ("?messages", "?prompt", "?input", "?response", "?system"),
    "text": ("text",),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One source of examples. ``DataConfig()`` is the embedded task, which needs no download.

    Attributes:
        source: ``embedded``, a local file (.jsonl, .json, .parquet, .csv), a folder of such files or one written by
            ``datasets.save_to_disk``, or a data set's name on the hub.
        kind: How rows become examples: one of ``KINDS``.
        columns: Our column name -> the source's, where they differ, e.g. ``{"prompt": "question"}``; text as
            ``parse_columns`` reads it is taken too.
        split: The source's own split; ``None`` takes ``train`` where there is one. A single file has none.
        subset: The hub's subset ("config") name, or a folder in a folder; for ``embedded`` a family, a wording or a
            difficulty. A single file has none.
        weight: Share in a mixture, relative to the other sources; above 0.
        limit: At most this many examples of a split. ``None``: all (``embedded``: 1,000,000, or 2,000 outside train).
        max_length: Longest encoded example in tokens.
        streaming: Read a hub data set row by row and stop at ``limit``, instead of downloading all of it.
        heldout_share: Share of the prompts kept away from training, in [0, 1]; 1.0 for a file that is only evaluated.
        calibration_share: Share of the prompts kept for calibration, in [0, 1].

    Raises:
        ConfigError: A value is out of range or of the wrong type, or the kind is unknown.
    """

    source: str = "embedded"
    kind: SourceKind = "embedded"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    weight: float = 1.0
    limit: int | None = None
    max_length: int = 512
    streaming: bool = False
    heldout_share: float = 0.0625
    calibration_share: float = 0.03125

    def __post_init__(self) -> None:
        _validate.text(self.source, "data.source", ConfigError)
        if self.kind not in KINDS:
            raise ConfigError(f"data.kind must be one of {', '.join(KINDS)}, found {self.kind!r}")
        if (self.kind == "embedded") != (self.source == "embedded"):
            raise ConfigError(
                f"data.kind {self.kind!r} does not go with data.source {self.source!r}: the embedded task is both "
                f"source and kind; for other data choose one of {', '.join(KINDS[1:])}"
            )
        for name in ("split", "subset"):
            if getattr(self, name) is not None:
                _validate.text(getattr(self, name), f"data.{name}", ConfigError)
        self._set("columns", _columns(self.columns, self.kind))
        self._set("weight", _validate.positive(self.weight, "data.weight", ConfigError))
        self._set("max_length", _validate.integer(self.max_length, "data.max_length", ConfigError, minimum=8))
        if self.limit is not None:
            self._set("limit", _validate.integer(self.limit, "data.limit", ConfigError, minimum=1))
        self._check_streaming()
        for name in ("heldout_share", "calibration_share"):
            self._set(name, _share(getattr(self, name), f"data.{name}"))
        if self.heldout_share + self.calibration_share > 1.0:
            raise ConfigError(
                f"data.heldout_share + data.calibration_share must be at most 1, found {self.heldout_share} and "
                f"{self.calibration_share}; for a file that is only evaluated set 1.0 and 0.0"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_streaming(self) -> None:
        if not isinstance(self.streaming, bool):
            raise ConfigError(f"data.streaming must be true or false, found {self.streaming!r}")
        if self.streaming and self.limit is None:
            raise ConfigError("data.streaming needs data.limit: a stream has no length of its own")

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """Itself, as of a mixture of one."""
        return (self,)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal config."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> DataConfig:
        """Read a config from a JSON object or a TOML table; keys may be left out, an unknown one is an error."""
        return cls(**_validate.keywords(cls, data, ConfigError, optional=frozenset(f.name for f in fields(cls))))


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several sources, drawn in proportion to their weights.

    Raises:
        ConfigError: There is no source.
    """

    sources: tuple[DataConfig, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ConfigError("a mixture needs at least one source")

    @property
    def max_length(self) -> int:
        """Most tokens of an example of any source."""
        return max(source.max_length for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal mixture."""
        return {"sources": [source.to_json() for source in self.sources]}

    @classmethod
    def from_json(cls, data: object) -> MixtureConfig:
        """Read a mixture from a JSON object with the key ``sources``."""
        sources = _validate.keywords(cls, data, ConfigError, optional=frozenset())["sources"]
        if not isinstance(sources, list | tuple):
            raise ConfigError(f"mixture.sources must be a list of tables, found {type(sources).__name__}")
        return cls(sources=tuple(DataConfig.from_json(source) for source in sources))


def data_from_json(data: object) -> DataConfig | MixtureConfig:
    """Read what a recipe says about data: one table, or a list of tables or ``{"sources": [...]}`` for a mixture."""
    if isinstance(data, list | tuple):
        return MixtureConfig.from_json({"sources": data})
    if isinstance(data, Mapping) and "sources" in data:
        return MixtureConfig.from_json(data)
    return DataConfig.from_json(data)


def parse_columns(text: str) -> dict[str, str]:
    """Read a column mapping as flags give it: ``prompt=question,answer=solution`` (ours = the source's).

    Raises:
        ConfigError: A part is not ``name=column``, or a name is given twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise ConfigError(f"columns: expected name=column, found {part!r}; e.g. prompt=question,answer=answer")
        if ours in columns:
            raise ConfigError(f"columns: {ours!r} is given twice in {text!r}")
        columns[ours] = theirs
    return columns


def _columns(columns: object, kind: str) -> dict[str, str]:
    if isinstance(columns, str):
        columns = parse_columns(columns)
    if not isinstance(columns, Mapping):
        raise ConfigError(f"data.columns must map our column names to the source's, found {columns!r}")
    known = [name.removeprefix("?") for name in COLUMNS[kind]]
    for ours, theirs in columns.items():
        if ours not in known:
            raise ConfigError(
                f"data.columns: kind {kind!r} has no column {ours!r}; its columns are {', '.join(known) or 'none'}"
            )
        _validate.text(theirs, f"data.columns.{ours}", ConfigError)
    return dict(columns)


def _share(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} must be a number in [0, 1], found {value!r}")
    number = float(value)
    if math.isnan(number) or not 0.0 <= number <= 1.0:
        raise ConfigError(f"{name} must be in [0, 1], found {value!r}")
    return number
