"""The report of an evaluation as a value, and the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from l2a_compress.errors import ConfigError
from l2a_compress.evaluation.statistics import FrontierCheck
from l2a_compress.evaluation.values import THINK_BIN, Point
from l2a_compress.files import make_folder, write_atomic

__all__ = ["REPORT_FILE", "Report", "validate", "write_report"]

REPORT_FILE = "report.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured.

    Attributes:
        model: What was evaluated: name, family and digest of the base, shape, gates, adapter.
        metric: What ``accuracy`` means: ``accuracy`` (exact match), or ``agreement`` with the dense model's next token.
        data: Where the problems come from.
        settings: What was asked.
        environment: The machine, versions, and the seconds it took.
        dense: The frozen base model; on data that names a style, asked for long reasoning.
        dense_short: The same asked for short reasoning, or None.
        points: The gated model at each budget under each contract.
        think_points: The gated model at full compute under caps on think tokens.
        split_points: The gated model at shares of the dense model's work of a request, split as the artifact notes.
        baselines: Static methods, on the frozen base model but for ``fixed_budget``, which runs the trained one.
        frontier: By contract, whether quality grows with the budget.
    """

    model: Mapping[str, Any]
    metric: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    dense: Point
    dense_short: Point | None = None
    points: tuple[Point, ...]
    think_points: tuple[Point, ...] = ()
    split_points: tuple[Point, ...] = ()
    baselines: tuple[Point, ...] = ()
    frontier: Mapping[str, FrontierCheck] = field(default_factory=dict)

    @property
    def everything(self) -> tuple[Point, ...]:
        """All points in the order of tables: dense, the gated model, baselines."""
        short = (self.dense_short,) if self.dense_short else ()
        return (self.dense, *short, *self.points, *self.think_points, *self.split_points, *self.baselines)

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            "metric": self.metric,
            "data": dict(self.data),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "dense": self.dense.to_json(),
            "dense_short": self.dense_short.to_json() if self.dense_short else None,
            "points": [point.to_json() for point in self.points],
            "think_points": [point.to_json() for point in self.think_points],
            "split_points": [point.to_json() for point in self.split_points],
            "baselines": [point.to_json() for point in self.baselines],
            "frontier": {name: check.to_json() for name, check in self.frontier.items()},
            "by_difficulty": self._by_difficulty(),
            "think_bin": THINK_BIN,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: it does not keep to the published schema.
        """
        validate(data)
        short = data.get("dense_short")
        lists: dict[str, Any] = {
            name: tuple(map(Point.from_json, data.get(name, ())))
            for name in ("points", "think_points", "split_points", "baselines")
        }
        checks = {
            name: FrontierCheck(**{**check, "between": tuple(check["between"])})
            for name, check in data["frontier"].items()
        }
        return cls(
            **{name: data[name] for name in ("model", "metric", "data", "settings", "environment")},
            dense=Point.from_json(data["dense"]),
            dense_short=Point.from_json(short) if short else None,
            frontier=checks,
            **lists,
        )

    def _by_difficulty(self) -> dict[str, Any]:
        """The points seen from each difficulty: what the dense model gets right there, and what each budget does."""
        return {
            name: {
                "n": part.n,
                "dense": part.accuracy,
                "points": [
                    {"budget": point.budget, "contract": point.contract, **point.to_json()["by_difficulty"][name]}
                    for point in self.points
                ],
            }
            for name, part in self.dense.by_difficulty.items()
        }


def validate(data: object) -> None:
    """Checks a report against the published schema.

    Raises:
        ConfigError: it does not keep to it; the message says where.
    """
    import jsonschema

    text = resources.files("l2a_compress").joinpath("schemas/report.schema.json").read_text(encoding="utf-8")
    try:
        jsonschema.validate(data, json.loads(text), cls=jsonschema.Draft202012Validator)
    except jsonschema.ValidationError as error:
        raise ConfigError(f"report: {error.json_path}: {error.message}") from error


def write_report(report: Report, folder: str | Path) -> dict[str, Path]:
    """Writes report.json, frontier.svg, frontier.png and report.html into a folder, each atomically.

    Returns:
        The files by name.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    from l2a_compress.evaluation.page import page
    from l2a_compress.evaluation.pictures import frontier_figure

    folder, content = Path(folder), report.to_json()
    validate(content)
    svg, png = frontier_figure(report)
    make_folder(folder)
    files: dict[str, bytes | str] = {
        REPORT_FILE: json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "frontier.svg": svg,
        "frontier.png": png,
        "report.html": page(report, svg),
    }
    for name, text in files.items():
        write_atomic(folder / name, text)
    return {name: folder / name for name in files}
