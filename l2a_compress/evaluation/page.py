"""report.html: one file with pictures and tables that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from l2a_compress.evaluation.drawings import heat_map, histogram
from l2a_compress.evaluation.report import Report
from l2a_compress.evaluation.values import Point, Slice

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { color: #222; background: #f5f6f8; margin: 0; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 8px 0 2px; } h2 { font-size: 18px; margin: 0 0 6px; }
section { background: #fff; border: 1px solid #e2e4e8; border-radius: 8px; }
section { padding: 18px 22px; margin: 18px 0; overflow-x: auto; }
p.note { color: #5b6068; margin: 2px 0 12px; max-width: 90ch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #eceef1; }
td { white-space: nowrap; } th { color: #5b6068; font-weight: 600; vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; }
tr.part td { background: #f5f6f8; font-weight: 600; color: #5b6068; }
td.bad { color: #b3261e; font-weight: 600; }
svg { max-width: 100%; height: auto; display: block; }
.row { display: flex; flex-wrap: wrap; gap: 18px 26px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px; }
dt { color: #5b6068; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(report: Report, frontier_svg: str) -> str:
    """The whole document. All text of the report is escaped."""
    name = escape(str(report.model.get("name")))
    what = "exact match" if report.metric == "accuracy" else "agreement with the dense model"
    parts = [
        _section("Frontier", _inline(frontier_svg), _checks(report)),
        _section("Operating points", _points_table(report), _POINTS_NOTE),
        *_heat_sections(report),
        *_think_section(report),
        *_slices_section(report, "by_difficulty", "By difficulty"),
        *_slices_section(report, "by_family", "By family"),
        _section("How it was measured", _facts(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: evaluation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n<p class='note'>{report.dense.n:,} held-out examples a point; quality is {what}; "
        "intervals are 95 % (Wilson, between problems).</p>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


_POINTS_NOTE = (
    "Cost is the realized share of the dense decoder's FLOPs, averaged over requests. Under <b>cap</b> no request may "
    "cost more than its budget; under <b>mean</b> the average is held to the budget. Baselines are the untrained base "
    "model with a part of it left out, but for <b>fixed_budget</b>, the trained one with one allocation for all. Times "
    "are of the evaluation's own batches on this machine, not a benchmark."
)


def _section(title: str, body: str, note: str = "") -> str:
    text = f"<p class='note'>{note}</p>\n" if note else ""
    return f"<section>\n<h2>{title}</h2>\n{text}{body}\n</section>"


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: without its XML declaration and document type."""
    return svg[svg.index("<svg") :]


def _checks(report: Report) -> str:
    said = []
    for contract, check in report.frontier.items():
        text = f"{'no' if check.monotone else 'a'} smaller budget is better beyond chance"
        if check.largest_inversion > 0:
            low, high = check.between
            text += f" (largest inversion {100 * check.largest_inversion:.1f} points, between {low:g} and {high:g})"
        said.append(f"<b>{escape(contract)}</b>: {text}")
    return ". ".join(said) + "." if said else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a row of one cell is a heading over its columns. Cells are HTML."""
    lines = ["<table>", "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead>", "<tbody>"]
    for row in rows:
        if len(row) == 1:
            lines.append(f"<tr class='part'><td colspan='{len(head)}'>{row[0]}</td></tr>")
        else:
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</tbody>", "</table>"])


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def _points_table(report: Report) -> str:
    likely = report.metric == "agreement"
    head = ["", "quality %", "95 % interval", "cost %", "layers skipped %", "heads pruned %"]
    head += ["NLL", "perplexity", "KL"] if likely else ["think tokens", "empty answers"]
    head += ["over budget", "allocations", "ms / token"]
    rows: list[Sequence[str]] = []
    for title, points in _parts(report):
        rows.append([title])
        rows += [_point_row(point, likely=likely) for point in points]
    return _table(head, rows).replace("<td>!", "<td class='bad'>")


def _parts(report: Report) -> list[tuple[str, Sequence[Point]]]:
    short = [report.dense_short] if report.dense_short else []
    parts: list[tuple[str, Sequence[Point]]] = [("Dense base model", [report.dense, *short])]
    for contract in dict.fromkeys(point.contract for point in report.points):
        parts.append((f"L2A, {contract}", [point for point in report.points if point.contract == contract]))
    if report.think_points:
        parts.append(("L2A, full compute with a cap on think tokens", report.think_points))
    if report.split_points:
        parts.append(("L2A, work split between compute a token and think tokens", report.split_points))
    for name in dict.fromkeys(point.name for point in report.baselines):
        title = f"Baseline: {escape(name.replace('_', ' '))}"
        parts.append((title, [point for point in report.baselines if point.name == name]))
    return parts


def _point_row(point: Point, *, likely: bool) -> list[str]:
    name = escape(point.name.replace("_", " ")) if point.name.startswith("dense") else f"budget {point.budget:.3g}"
    if point.dropped_layers:
        listed = ", ".join(map(str, point.dropped_layers))
        many = len(point.dropped_layers) > 8
        name = f"<span title='{listed}'>without {len(point.dropped_layers)} layers</span>" if many else ""
        name = name or f"without layers {listed}"
    if point.think_cap is not None:
        name = f"at most {point.think_cap} think tokens"
    if point.exit_entropy is not None:
        name = f"below {point.exit_entropy:g} nats"
    interval = f"{_percent(point.accuracy_low)} - {_percent(point.accuracy_high)}"
    cells = [name, _percent(point.accuracy), interval, _percent(point.cost)]
    cells += [_percent(point.layer_sparsity), _percent(point.head_sparsity)]
    if likely:
        cells += ["" if value is None else f"{value:.4g}" for value in (point.nll, point.perplexity, point.kl)]
    else:
        cells += ["" if point.think_tokens is None else f"{point.think_tokens:.1f}", str(point.empty_answers or 0)]
    over = f"!{point.over_budget:,}" if point.over_budget else "0"
    return [*cells, over, f"{point.distinct_allocations:,}", f"{point.wall_ms_per_token:.2f}"]


def _heat_sections(report: Report) -> list[str]:
    sections = []
    for contract in dict.fromkeys(point.contract for point in report.points):
        points = [point for point in report.points if point.contract == contract and point.heat]
        rows = [
            (f"{point.budget:g}", name, heat.n, heat.layers, heat.groups)
            for point in sorted(points, key=lambda point: -point.budget)
            for name, heat in point.heat.items()
        ]
        note = (
            "Each cell is one layer at one budget, for the inputs of one difficulty: the darker, the larger the share "
            "of inputs that run it. The bar below a cell is the share of its KV groups that run."
        )
        sections.append(_section(f"What runs: {escape(contract)}", heat_map(rows), note))
    return sections


def _think_section(report: Report) -> list[str]:
    named = [("dense", report.dense)] + ([("dense, short", report.dense_short)] if report.dense_short else [])
    named += [(f"{point.contract} {point.budget:g}", point) for point in report.points]
    named += [(f"at most {point.think_cap} tokens", point) for point in report.think_points]
    drawn = [(name, point) for name, point in named if point.think_histogram]
    if not drawn:
        return []
    longest = max(len(point.think_histogram) for _, point in drawn)
    highest = max(max(point.think_histogram) / point.n for _, point in drawn)
    figures = [
        histogram(name, point.think_histogram, point.n, point.think_tokens or 0.0, bins=longest, top=highest)
        for name, point in drawn
    ]
    note = (
        "How many think tokens were written. Bars are shares of the problems, the line is the mean. All axes are alike."
    )
    return [_section("Think tokens", "<div class='row'>\n" + "\n".join(figures) + "\n</div>", note)]


def _slices_section(report: Report, field: str, title: str) -> list[str]:
    names = list(getattr(report.dense, field))
    if not names:
        return []
    parts = {name: escape(name) for name in names}
    head = ["", *(f"{text} quality %" for text in parts.values()), *(f"{text} cost %" for text in parts.values())]
    rows: list[Sequence[str]] = []
    for group, points in _parts(report):
        rows.append([group])
        for point in points:
            slices: Mapping[str, Slice] = getattr(point, field)
            found = [slices.get(name) for name in names]
            cells = [_percent(one.accuracy if one else None) for one in found]
            cells += [_percent(one.cost if one else None) for one in found]
            rows.append([_point_row(point, likely=False)[0], *cells])
    counts = ", ".join(f"{text} {getattr(report.dense, field)[name].n:,}" for name, text in parts.items())
    return [_section(title, _table(head, rows), f"Examples: {counts}.")]


def _facts(report: Report) -> str:
    shape = report.model.get("shape", {})
    groups: Mapping[str, Mapping[str, object]] = {
        "base model": {name: report.model.get(name) for name in ("name", "family", "digest")},
        "shape": shape if isinstance(shape, Mapping) else {},
        "data": report.data,
        "settings": report.settings,
        "environment": report.environment,
    }
    lines = []
    for group, values in groups.items():
        said = ", ".join(f"{name} {_said(value)}" for name, value in values.items() if value not in (None, {}, []))
        lines.append(f"<dt>{escape(group)}</dt><dd>{escape(said)}</dd>")
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _said(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_said(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
