"""The frontier as a picture: quality against realized cost and against layer sparsity."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l2a_compress.evaluation.report import Report
from l2a_compress.evaluation.values import Point

__all__ = ["frontier_figure", "quality_label"]


@dataclass(frozen=True)
class _Look:
    """How a series is drawn. Colours are Okabe and Ito's; marker and line tell them apart without colour as well."""

    label: str
    color: str
    marker: str
    line: str


_GATED = {
    "cap": _Look("L2A, every request within the budget (cap)", "#0072B2", "o", "-"),
    "mean": _Look("L2A, the budget on average (mean)", "#D55E00", "s", "-"),
}
_BASELINES = {
    "uniform": _Look("uniform: every k-th layer dropped", "#666666", "^", "--"),
    "block_influence": _Look("block influence (ShortGPT)", "#009E73", "D", "--"),
}
_SPARE = (("#CC79A7", "v"), ("#56B4E9", "P"), ("#E69F00", "X"), ("#000000", "*"))


def quality_label(metric: str) -> str:
    """What the quality axis shows."""
    return "Exact match (%)" if metric == "accuracy" else "Agreement with the dense model (% of tokens)"


def frontier_figure(report: Report) -> tuple[str, bytes]:
    """The picture as SVG text and as PNG bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "svg.fonttype": "path",  # looks the same wherever it is opened
        "svg.hashsalt": "l2a",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#444444",
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.5, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, report, lambda point: 100 * point.cost, 100.0)
        _panel(right, report, lambda point: 100 * point.layer_sparsity, 0.0)
        left.set(xlabel="Realized cost (% of the dense decoder's FLOPs)", ylabel=quality_label(report.metric))
        right.set(xlabel="Realized layer sparsity (% of layers skipped)")
        handles, labels = left.get_legend_handles_labels()
        columns = 2 if len(handles) > 3 else max(len(handles), 1)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        what = "problems" if report.metric == "accuracy" else "texts"
        title = f"{report.model.get('name')}: quality against compute, {report.dense.n:,} held-out {what} a point"
        figure.suptitle(f"{title}, 95 % intervals", fontsize=11)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160)
    return svg.getvalue(), png.getvalue()


def _panel(axes: Any, report: Report, at: Callable[[Point], float], dense_at: float) -> None:
    _references(axes, report)
    for look, points in _series(report):
        ordered = sorted(points, key=at)
        values = [100 * point.accuracy for point in ordered]
        below = [100 * max(point.accuracy - point.accuracy_low, 0.0) for point in ordered]
        above = [100 * max(point.accuracy_high - point.accuracy, 0.0) for point in ordered]
        axes.errorbar(
            [at(point) for point in ordered],
            values,
            yerr=[below, above],
            label=look.label,
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            markersize=5.5,
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2.0,
        )
    axes.plot([dense_at], [100 * report.dense.accuracy], marker="*", color="black", markersize=11, zorder=5)
    axes.set_ylim(_limits(report))


def _references(axes: Any, report: Report) -> None:
    dense, short = report.dense, report.dense_short
    name = "dense model" if short is None else "dense model, long reasoning"
    axes.axhspan(100 * dense.accuracy_low, 100 * dense.accuracy_high, color="black", alpha=0.07, linewidth=0)
    axes.axhline(100 * dense.accuracy, color="black", linewidth=1.1, label=name)
    if short is not None:
        axes.axhline(
            100 * short.accuracy, color="black", linewidth=1.1, linestyle=":", label="dense model, short reasoning"
        )


def _series(report: Report) -> list[tuple[_Look, Sequence[Point]]]:
    found: list[tuple[_Look, Sequence[Point]]] = []
    for contract, look in _GATED.items():
        points = [point for point in report.points if point.contract == contract]
        if points:
            found.append((look, points))
    spare = 0
    for name in dict.fromkeys(point.name for point in report.baselines):
        look_of = _BASELINES.get(name)
        if look_of is None:
            color, marker = _SPARE[spare % len(_SPARE)]
            look_of, spare = _Look(name.replace("_", " "), color, marker, "--"), spare + 1
        found.append((look_of, [point for point in report.baselines if point.name == name]))
    return found


def _limits(report: Report) -> tuple[float, float]:
    """From a little below the lowest interval to a little above the highest, and at least 10 points high."""
    low = 100 * min(point.accuracy_low for point in report.everything)
    high = 100 * max(point.accuracy_high for point in report.everything)
    margin = max(0.05 * (high - low), (10 - (high - low)) / 2, 0.5)
    return max(low - margin, -2.0), min(high + margin, 102.0)
