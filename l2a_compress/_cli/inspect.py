"""``l2a compress inspect``: what an artifact is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a_compress.artifact import ArtifactConfig

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    artifact: Annotated[Path, typer.Argument(help="The folder that training wrote.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print artifact.json as it was read.")] = False,
) -> None:
    """Verify an artifact folder and print what it holds."""
    config = ArtifactConfig.load(artifact)
    if as_json:
        typer.echo(json.dumps(config.to_json(), indent=2, sort_keys=True))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(config):
        console.print(table)


def _tables(config: ArtifactConfig) -> list[Table]:
    base = {name: value for name, value in config.base.items() if value is not None}
    files = sorted(config.files.items())
    sections: dict[str, dict[str, Any]] = {
        "base model": base | config.shape.to_json(),
        "gates": config.gates,
        "adapter": config.adapter,
        "training": config.training | {"seed": config.seed},
        "metrics": config.metrics,
        "prices": {axis: _short_pairs(pairs) for axis, pairs in config.prices.items()},
        "files": {name: f"{entry['size']:,} bytes, sha256 {entry['sha256'][:12]}" for name, entry in files},
        "versions": dict(config.versions),
    }
    return [_table(title, rows) for title, rows in sections.items() if rows]


def _table(title: str, rows: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    for name, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(Text(name), Text(text, overflow="fold"))
    return table


def _short_pairs(pairs: tuple[tuple[float, float], ...]) -> str:
    return ", ".join(f"{budget:g}: {price:.4g}" for budget, price in pairs)
