"""``l2a compress inspect``: what an artifact or a bundle is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a_compress.artifact import ArtifactConfig
from l2a_compress.bundle import MANIFEST_FILE, Bundle
from l2a_compress.engines import engines

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    folder: Annotated[Path, typer.Argument(help="What training or export wrote.", show_default=False)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print artifact.json or manifest.json as it was read.")
    ] = False,
) -> None:
    """Verify an artifact or a bundle and print what it holds."""
    is_bundle = os.path.lexists(folder / MANIFEST_FILE)
    found = Bundle.load(folder) if is_bundle else ArtifactConfig.load(folder)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, sort_keys=True))
        return
    from rich.console import Console

    console = Console()
    for table in _bundle_tables(found, folder) if isinstance(found, Bundle) else _tables(found):
        console.print(table)


def _bundle_tables(bundle: Bundle, folder: Path) -> list[Table]:
    from l2a_compress._cli.engines import engine_table
    from l2a_compress._cli.export import bundle_table

    files = {name: f"{entry['size']:,} bytes, sha256 {entry['sha256'][:12]}" for name, entry in bundle.files.items()}
    sections: dict[str, dict[str, Any]] = {
        "base model": dict(bundle.base) | bundle.shape.to_json(),
        "gates": bundle.gates,
        "files": files,
        "versions": dict(bundle.versions),
    }
    tables = [bundle_table(bundle, folder)]
    if built := engines(folder, bundle):
        tables.append(engine_table(bundle, built))
    return [*tables, *(_table(title, rows) for title, rows in sections.items())]


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
