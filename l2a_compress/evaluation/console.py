"""What a terminal shows: a progress bar while measuring, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from l2a_compress.evaluation.frontier import Progress as Told
from l2a_compress.evaluation.report import Report
from l2a_compress.evaluation.split import MeasuredSplit
from l2a_compress.evaluation.values import Point

__all__ = ["print_report", "print_split", "progress_bar", "table_of"]


@contextmanager
def progress_bar(console: Console | None = None, *, quiet: bool = False) -> Iterator[Told | None]:
    """A bar with the time left; yields what ``evaluate`` takes as ``progress``."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn("evaluate"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True), speed_estimate_period=120.0) as bar:
        task = bar.add_task("starting", total=None)

        def told(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield told


def table_of(report: Report) -> Table:
    """The report as a table: dense, the gated model's points, baselines."""
    likely = report.metric == "agreement"
    name = "agreement with the dense model" if likely else "exact match"
    title = f"{report.model.get('name')}: {name} on {report.dense.n:,} held-out examples, in %"
    # So dense that all columns fit a terminal of 80.
    dense = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", **dense)  # type: ignore[arg-type]
    table.add_column("", no_wrap=True)
    heads = ["exact" if not likely else "agree", "95 %", "cost", "layers\noff", "heads\noff"]
    heads += ["NLL", "KL"] if likely else ["think\ntokens"]
    for head in [*heads, "over", "ms /\ntoken"]:
        table.add_column(head, justify="right", no_wrap=True)
    for section in _sections(report):
        for point in section:
            table.add_row(*_cells(point, likely=likely))
        table.add_section()
    return table


def _sections(report: Report) -> list[Sequence[Point]]:
    short = [report.dense_short] if report.dense_short else []
    sections: list[Sequence[Point]] = [[report.dense, *short]]
    for contract in dict.fromkeys(point.contract for point in report.points):
        sections.append([point for point in report.points if point.contract == contract])
    sections += [report.think_points, report.split_points]
    for name in dict.fromkeys(point.name for point in report.baselines):
        sections.append([point for point in report.baselines if point.name == name])
    return [section for section in sections if section]


def _cells(point: Point, *, likely: bool) -> list[Text]:
    if point.name in ("l2a", "split"):
        name = f"L2A {point.contract} {point.budget:g}"
        if point.think_cap is not None:
            name = f"{name if point.name == 'split' else 'L2A'}, think <= {point.think_cap}"
    else:
        name = point.name.replace("_", " ") + (f" -{len(point.dropped_layers)}" if point.dropped_layers else "")
    cells = [name, f"{100 * point.accuracy:.1f}", f"{100 * point.accuracy_low:.1f}-{100 * point.accuracy_high:.1f}"]
    cells += [f"{100 * value:.1f}" for value in (point.cost, point.layer_sparsity, point.head_sparsity)]
    if likely:
        cells += ["" if value is None else f"{value:.3f}" for value in (point.nll, point.kl)]
    else:
        cells += ["" if point.think_tokens is None else f"{point.think_tokens:.1f}"]
    texts = [Text(cell) for cell in [*cells, f"{point.over_budget:,}", f"{point.wall_ms_per_token:.3g}"]]
    if point.over_budget:
        texts[-2].stylize("bold red")
    return texts


def print_split(found: MeasuredSplit, console: Console | None = None) -> None:
    """Prints every pair that was measured, marking those that no other beats."""
    kept = {(point.compute, point.think_tokens) for point in found.split.points}
    title = f"exact match on {found.dense.n:,} calibration examples, in %; a star: nothing as cheap is as accurate"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("work", "exact", "95 %", "compute", "most think\ntokens", "tokens\nthought", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for point in sorted(found.points, key=lambda point: -(point.work or 0.0)):
        cells = [f"{100 * (point.work or 0.0) / (found.dense.work or 1.0):.1f}", f"{100 * point.accuracy:.1f}"]
        cells += [f"{100 * point.accuracy_low:.1f}-{100 * point.accuracy_high:.1f}", f"{100 * point.budget:g}"]
        cells += ["" if point.think_cap is None else str(point.think_cap), f"{point.think_tokens or 0.0:.1f}"]
        table.add_row(*cells, "*" if (point.budget, point.think_cap) in kept else "")
    console = console or Console()
    console.print(table)
    console.print(f"dense: {100 * found.dense.accuracy:.1f} %, {found.dense.think_tokens or 0.0:.1f} tokens thought")


def print_report(report: Report, files: Mapping[str, Path], console: Console | None = None) -> None:
    """Prints the table, whether the frontier is monotone, and where the files are."""
    console = console or Console()
    console.print(table_of(report))
    console.print()
    for contract, check in report.frontier.items():
        said = "monotone within chance" if check.monotone else "NOT monotone, beyond chance"
        by = f"largest inversion {100 * check.largest_inversion:.1f} points"
        console.print(f"frontier under {contract}: {said} ({by})", soft_wrap=True)
    for path in files.values():
        console.print(Text(str(path)), soft_wrap=True)
