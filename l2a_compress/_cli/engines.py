"""``l2a compress build-engines``, and what ``export --target trt`` does after the graphs are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2a_compress.engines import Engine, engines
from l2a_compress.errors import EngineError

if TYPE_CHECKING:
    from rich.table import Table

    from l2a_compress.bundle import Bundle

NOT_BUILT = 3  # exit code: the bundle is whole, and its engines are still to be built


def build_engines(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)],
    target: Annotated[str | None, typer.Option(help="trt or trt-rtx. Default: all that the bundle has.")] = None,
    graph: Annotated[str | None, typer.Option(help="Only the engine of this graph.")] = None,
    force: Annotated[bool, typer.Option(help="Also those that this version has built already.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Build the engines of a bundle from its recipes, on the machine that is to run them."""
    from l2a_compress.exporters import tensorrt

    with spinner("build", quiet=quiet) as tell:
        tensorrt.build_engines(bundle, target=target, only=graph, force=force, progress=tell)
    _show(bundle, target)


def finish(folder: Path, target: str, *, defer: bool, quiet: bool) -> None:
    """Builds the engines of a fresh bundle, or says how it is done where it cannot be done here."""
    from l2a_compress.exporters import tensorrt

    later = f"engines are NOT built; on the machine that is to run them: l2a compress build-engines {folder}"
    if defer:
        typer.echo(later)
        return
    try:
        with spinner("build", quiet=quiet) as tell:
            tensorrt.build_engines(folder, target=target, progress=tell)
    except EngineError as error:
        typer.echo(f"the bundle is whole, but {error}", err=True)
        typer.echo(f"{later} (--defer-build makes this no error)", err=True)
        raise typer.Exit(NOT_BUILT) from None
    _show(folder, target)


def _show(folder: Path, target: str | None) -> None:
    from rich.console import Console

    from l2a_compress.exporters.tensorrt import read_manifest

    bundle = read_manifest(folder)
    Console().print(engine_table(bundle, engines(folder, bundle, target)))


def engine_table(bundle: Bundle, found: tuple[Engine, ...]) -> Table:
    """One row an engine."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="engines", title_justify="left")
    for name in ("graph", "target", "version", "GPUs", "profiles", "MB", "seconds"):
        table.add_column(name)
    for each in found:
        recipe, built = each.recipe, each.built
        table.add_row(
            Text(recipe.graph),
            recipe.target,
            built.version if built else "not built",
            ", ".join(built.capabilities if built else recipe.capabilities) or "of the GPU there",
            ", ".join(profile.name for profile in recipe.profiles) or "fixed shapes",
            f"{bundle.files[recipe.engine]['size'] / 1e6:.1f}" if built else "-",
            f"{built.seconds:.1f}" if built else "-",
        )
    return table


@contextmanager
def spinner(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, and for how long; yields what is told the name of each part."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, disable=quiet, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda part: bar.update(task, description=f"{what}: {part}")
