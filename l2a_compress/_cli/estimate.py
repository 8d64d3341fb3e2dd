"""``l2a compress estimate``: what a model will need on a device, before anything is built."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2a_compress import _validate
from l2a_compress.budget import budgets_of
from l2a_compress.device import DeviceProfile
from l2a_compress.errors import ConfigError
from l2a_compress.estimate import Estimate, Source, read_source, recommend
from l2a_compress.estimate import estimate as run_estimate
from l2a_compress.profiles import load_ladder

if TYPE_CHECKING:
    from rich.table import Table

BOUND = "predicted by the roofline model: times are lower bounds, a real run takes longer"


def estimate(
    source: Annotated[
        Path, typer.Argument(help="A bundle, an artifact, or a model's folder or config.json.", show_default=False)
    ],
    device: Annotated[str, typer.Option(help="A shipped device profile or a .toml file.", show_default=False)],
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16, int8, int4 or (standard) fp8. Default: the bundle's, else fp16."),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Which is to be exported: ort, or standard, that of engines, whose caches have 16 bits and whose "
            "head is not quantized. Default: the bundle's, else ort."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of each sequence. Default: 2048, or as many as the model has positions."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    budgets: Annotated[str | None, typer.Option(help="Falling shares of the dense compute: 1.0,0.7,0.4.")] = None,
    ladder: Annotated[
        str | None, typer.Option(help="A shipped ladder or a .toml file. Default: the bundle's variants, else default.")
    ] = None,
    target_ms: Annotated[float | None, typer.Option(help="Milliseconds that a token may take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for programs.")] = False,
) -> None:
    """Predict memory and time of each budget on a device, and which budgets suit it."""
    profile = DeviceProfile.from_toml(device) if device.endswith(".toml") else DeviceProfile.named(device)
    target = None if target_ms is None else _validate.positive(target_ms, "target-ms", ConfigError) / 1000
    found = read_source(source)
    found = found if dialect is None else dataclasses.replace(found, dialect=dialect)
    context = found.usual_context if context is None else context
    precision = precision or found.precision or "fp16"
    chosen = _budgets(found, budgets, ladder)
    rows = run_estimate(found, profile, chosen, precision=precision, context=context, batch=batch)
    fitting, within = recommend(rows), recommend(rows, target)
    if as_json:
        data = {
            "note": BOUND,
            "source": {"name": found.name, "kind": found.kind, "shape": found.shape.to_json()},
            "device": profile.to_json(),
            "precision": precision,
            "dialect": found.dialect,
            "computes_in": profile.computes_in(precision),
            "context": context,
            "batch": batch,
            "budgets": [row.to_json() for row in rows],
            "recommended": {
                "ladder": list(within),
                "largest_that_fits": max(fitting, default=None),
                "target_ms": target_ms,
                "largest_within_target": None if target is None else max(within, default=None),
            },
        }
        typer.echo(json.dumps(data, indent=2, sort_keys=True))
        return
    from rich.console import Console

    exported = precision if found.dialect == "ort" else f"{precision}, {found.dialect}"
    title = f"{found.name} ({found.kind}) on {profile.name}: {exported}, context {context}, batch {batch}"
    Console().print(_table(title, rows))
    typer.echo(BOUND)
    typer.echo(f"memory: {profile.memory_bytes / 1e6:,.0f} MB; {_roof(profile, precision)}")
    if any(row.spread for row in rows):
        typer.echo("*: for want of a variant, whole layers within the budget, evenly spread over the depth")
    for line in _advice(fitting, within, target_ms):
        typer.echo(line)


def _budgets(source: Source, budgets: str | None, ladder: str | None) -> tuple[float, ...]:
    if budgets is not None and ladder is not None:
        raise ConfigError("budgets and ladder: give one of them")
    if budgets is not None:
        try:
            shares = [float(text) for text in budgets.split(",")]
        except ValueError:
            raise ConfigError(f"budgets must be numbers such as 1.0,0.7,0.4, found {budgets!r}") from None
        return budgets_of({"budgets": shares})
    if ladder is None and source.variants:
        return tuple(budget for budget, _ in source.variants)
    return budgets_of(load_ladder(ladder or "default"))


def _roof(profile: DeviceProfile, precision: str) -> str:
    dtype = profile.computes_in(precision)
    peak, bandwidth = profile.peak_flops[dtype] / 1e12, profile.memory_bandwidth / 1e9
    return f"{precision} is computed in {dtype} at {peak:g} T operations/s at most, and read at {bandwidth:g} GB/s"


def _table(title: str, rows: tuple[Estimate, ...]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    names = ("budget", "layers", "groups", "MB\nweights", "MB\nKV", "MB\ntotal", "fits")
    for name in (*names, "ms\na token", "ms\nprefill", "tokens\nper s"):
        table.add_column(name, overflow="fold")
    for row in rows:
        times = (1000 * row.decode_seconds, 1000 * row.prefill_seconds, row.tokens_per_second)
        table.add_row(
            f"{row.budget:g}{'*' if row.spread else ''}",
            str(len(row.allocation.layers)),
            str(row.allocation.num_kept_groups),
            *(_short(size / 1e6) for size in (row.weight_bytes, row.kv_bytes, row.total_bytes)),
            "yes" if row.fits else "NO",
            *map(_short, times),
        )
    return table


def _short(number: float) -> str:
    """With at least three digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.2f}" if number >= 1 else f"{number:.3g}"


def _advice(fitting: tuple[float, ...], within: tuple[float, ...], target_ms: float | None) -> list[str]:
    if not fitting:
        return ["recommended: none of these budgets fits the memory; try a lower precision, context or batch"]
    lines = [f"largest budget that fits: {fitting[0]:g}"]
    if target_ms is not None and not within:
        return [*lines, f"recommended: none of these budgets is predicted within {target_ms:g} ms a token"]
    if target_ms is not None:
        lines.append(f"largest budget predicted within {target_ms:g} ms a token: {within[0]:g}")
    return [*lines, f"recommended ladder: {', '.join(f'{budget:g}' for budget in within)}"]
