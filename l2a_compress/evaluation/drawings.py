"""Small SVG drawings for the page: the allocation heat map and the histograms of think tokens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from l2a_compress.evaluation.values import THINK_BIN

__all__ = ["heat_map", "histogram"]

HeatRow = tuple[str, str, int, Sequence[float], Sequence[float]]
"""Budget, difficulty, inputs, share of inputs per layer, share of KV groups per layer."""

_CELL, _TALL, _LEFT, _TOP, _GAP = 30, 22, 150, 40, 8
_LIGHT, _DARK = (0xEE, 0xF3, 0xF8), (0x08, 0x45, 0x7E)
_TEXT = 'font-family="system-ui, sans-serif" fill="#333"'


def heat_map(rows: Sequence[HeatRow]) -> str:
    """Layers from left to right; rows are budgets, and difficulties within them."""
    layers = len(rows[0][3]) if rows else 0
    cell = _CELL if layers <= 24 else max(12, 720 // layers)
    parts, y, before = [_layer_numbers(layers, cell)], float(_TOP), None
    for budget, name, count, shares, groups in rows:
        if before is not None and budget != before:
            y += _GAP
        parts.append(_heat_row(y, cell, budget if budget != before else "", name, count, shares, groups))
        y, before = y + _TALL + 2, budget
    width, height = _LEFT + layers * cell + 170, y + 6
    legend = _legend(_LEFT + layers * cell + 24)
    label = "Share of the inputs that run each layer, by budget and difficulty"
    return _svg(width, height, label, "".join(parts) + legend)


def _layer_numbers(layers: int, cell: int) -> str:
    every = 1 if cell >= 20 else 5
    numbers = [
        f'<text x="{_LEFT + layer * cell + cell / 2:g}" y="{_TOP - 7}" font-size="11" text-anchor="middle" '
        f"{_TEXT}>{layer}</text>"
        for layer in range(0, layers, every)
    ]
    middle = _LEFT + layers * cell / 2
    heads = f'<text x="{middle:g}" y="14" font-size="12" text-anchor="middle" {_TEXT}>layer</text>'
    heads += f'<text x="4" y="{_TOP - 7}" font-size="12" {_TEXT}>budget</text>'
    return heads + "".join(numbers)


def _heat_row(
    y: float, cell: int, budget: str, name: str, count: int, shares: Sequence[float], groups: Sequence[float]
) -> str:
    middle = y + _TALL / 2 + 4
    text = f'<text x="4" y="{middle:g}" font-size="12" font-weight="600" {_TEXT}>{escape(budget)}</text>'
    text += f'<text x="{_LEFT - 10}" y="{middle:g}" font-size="12" text-anchor="end" {_TEXT}>{escape(name)}</text>'
    cells = []
    for layer, (share, kept) in enumerate(zip(shares, groups, strict=True)):
        x = _LEFT + layer * cell
        said = f"layer {layer}, {name}: {100 * share:.0f} % of {count:,} inputs, {100 * kept:.0f} % of its KV groups"
        bar = max(0.0, min(1.0, kept)) * (cell - 6)
        cells.append(
            f'<g><title>{escape(said)}</title><rect x="{x}" y="{y:g}" width="{cell - 2}" height="{_TALL}" rx="2" '
            f'fill="{_shade(share)}"/><rect x="{x + 2}" y="{y + _TALL - 5:g}" width="{bar:.1f}" height="3" '
            f'fill="#E69F00"/></g>'
        )
    return text + "".join(cells)


def _shade(share: float) -> str:
    """Light for 0, dark blue for 1."""
    share = max(0.0, min(1.0, share))
    mixed = (round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _legend(x: float) -> str:
    parts = [f'<text x="{x:g}" y="{_TOP + 10}" font-size="11" {_TEXT}>share of inputs</text>']
    for step in range(5):
        y = _TOP + 18 + 20 * step
        share = 1 - step / 4
        parts.append(f'<rect x="{x:g}" y="{y}" width="26" height="18" rx="2" fill="{_shade(share)}"/>')
        parts.append(f'<text x="{x + 34:g}" y="{y + 13}" font-size="11" {_TEXT}>{100 * share:.0f} %</text>')
    return "".join(parts)


def histogram(title: str, counts: Sequence[int], total: int, mean: float, *, bins: int, top: float) -> str:
    """One histogram: ``bins`` bars wide, ``top`` (a share of ``total``) high, with a line at the mean."""
    width, height, left, base, head = 240, 140, 34, 112, 24
    step, tall = (width - left - 8) / bins, base - head
    bars = []
    for at, count in enumerate(counts):
        size = tall * count / total / top
        said = f"{at * THINK_BIN} to {(at + 1) * THINK_BIN - 1} tokens: {count:,} of {total:,}"
        bars.append(
            f'<rect x="{left + at * step + 0.5:.1f}" y="{base - size:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{size:.1f}" fill="#0072B2"><title>{escape(said)}</title></rect>'
        )
    line = left + min(mean / THINK_BIN, bins) * step
    text = f'<text x="{left}" y="14" font-size="12" font-weight="600" {_TEXT}>{escape(title)}</text>'
    text += f'<text x="{width - 8}" y="14" font-size="11" text-anchor="end" {_TEXT}>mean {mean:.1f}</text>'
    text += f'<text x="{left - 5}" y="{head + 5}" font-size="10" text-anchor="end" {_TEXT}>{100 * top:.0f} %</text>'
    text += f'<text x="{left - 5}" y="{base}" font-size="10" text-anchor="end" {_TEXT}>0</text>'
    for at in (0, bins // 2, bins):
        x = left + at * step
        anchor = "end" if at == bins else "middle"
        text += (
            f'<text x="{x:.1f}" y="{base + 14}" font-size="10" text-anchor="{anchor}" {_TEXT}>{at * THINK_BIN}</text>'
        )
    axis = f'<path d="M{left} {head}V{base}H{width - 8}" stroke="#888" fill="none"/>'
    mark = f'<path d="M{line:.1f} {head}V{base}" stroke="#D55E00" stroke-width="1.5" stroke-dasharray="4 3"/>'
    return _svg(width, height, f"Think tokens, {title}", "".join(bars) + axis + mark + text)


def _svg(width: float, height: float, label: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
