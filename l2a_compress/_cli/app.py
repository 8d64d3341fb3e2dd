"""The tree of commands: ``l2a`` with its groups, one file per command."""

from __future__ import annotations

from typing import Annotated

import typer

from l2a_compress import __version__
from l2a_compress._cli.engines import build_engines
from l2a_compress._cli.estimate import estimate
from l2a_compress._cli.evaluate import evaluate, split
from l2a_compress._cli.export import export, verify
from l2a_compress._cli.inspect import inspect
from l2a_compress._cli.run import bench, run, select
from l2a_compress._cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Language models whose layers, heads and thinking follow the input and a compute budget.",
)
compress = typer.Typer(
    no_args_is_help=True,
    help="Train a model for every budget, measure and export it, build engines, verify, estimate, inspect.",
)
app.add_typer(compress, name="compress")
compress.command()(train)
compress.command()(evaluate)
compress.command()(split)
compress.command()(estimate)
compress.command()(export)
compress.command()(build_engines)
compress.command()(verify)
compress.command()(inspect)
app.command()(run)
app.command()(select)
app.command()(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2a {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before any command."""
