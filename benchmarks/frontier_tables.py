"""The tables of docs/results.md, each between two comments, from frontier.json, real_llm.json and two of heads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2a_compress.evaluation.statistics import paired

Row = Mapping[str, Any]
EVEN = 0.004  # costs that differ by no more count as equal


def costliest(points: Iterable[Row], most: float) -> Row | None:
    """The point with the largest cost of at most ``most``."""
    return max((p for p in points if p["cost"] <= most), key=lambda point: point["cost"], default=None)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The page with every table anew.

    Raises:
        ValueError: the page has no place for one of them, or one for a table that is not there.
    """
    places = set(re.findall(r"<!-- table: (\S+) -->", text))
    if places != set(tables):
        raise ValueError(f"the page has places for {sorted(places)}, and there are {sorted(tables)}")
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        head, _, rest = text.partition(start)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"the page does not say where the table {name} ends: {end}")
        text = f"{head}{start}\n\n{table}\n\n{end}{tail}"
    return text


def page_tables(results: Path) -> dict[str, str]:
    """All tables of the page by name, from a folder of results."""
    names = ("frontier", "real_llm", "head_latency", "head_trials")
    frontier, real, latency, trials = (json.loads((results / f"{name}.json").read_text()) for name in names)
    heads = latency_table(latency["head_latency"]) | trials_table(trials)
    return tables_of(frontier) | real_tables(real["qwen2.5-coder-0.5b"]) | heads


def tables_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Those of frontier.json by name, in Markdown."""
    others = [row for row in result["untrained"] if row["other"] != "fixed_budget"]
    return {
        "frontier": _frontier(result["frontier"]),
        "shown": _shown(result, others),
        "same-weights": _against(result["same_weights"]),
        "fine-tuned": _against(result["fine_tuned"]),
        "blind": _against(result["blind"]),
        "blind-short": _against(result["blind_short"]),
        "untrained": _against(others),
        "out-of-distribution": _out_of_distribution(result["summary"]["ood_gap_extra"]),
        "split": _split(result["split"]),
        "brief": _brief(result["brief"]),
        "ablations": _ablations(result["ablations"]),
    }


def real_tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Those of one model of real_llm.json."""
    points: Mapping[str, Sequence[Row]] = found["points"]
    l2a = {name: group for name, group in points.items() if name.startswith("l2a")}
    gated = {name: group for name, group in l2a.items() if not name.endswith("-no-kl")}
    statics = {name: group for name, group in points.items() if name not in (*l2a, "reference")}
    heads = "model,budget,cost,layers off,NLL,KL to the reference,agreement with it".split(",")
    rows = [
        [
            name,
            *(f"{row[key]:.3f}" for key in ("budget", "cost")),
            f"{100 * row['layer_sparsity']:.1f} %",
            *(f"{row[key]:.4f}" for key in ("nll", "kl")),
            f"{100 * row['agreement']:.2f} %",
        ]
        for name, group in points.items()
        for row in group
    ]
    against = []
    for static, theirs in ((name, point) for name, group in statics.items() for point in group):
        for name, group in gated.items():
            ours = costliest(group, theirs["cost"] + EVEN)
            if ours is None:
                continue
            sides = (static, theirs), (name, ours)
            off = [cell for run, row in sides for cell in (run, f"{100 * row['layer_sparsity']:.1f} %")]
            against.append([*off, *_likelihood_gap(ours, theirs)])
    no_kl = [
        [f"{name}-no-kl", f"{100 * ours['layer_sparsity']:.1f} %", *_likelihood_gap(without, ours)]
        for name, group in gated.items()
        if f"{name}-no-kl" in l2a
        for without, ours in zip(l2a[f"{name}-no-kl"], group, strict=True)
    ]
    answered = found.get("answers", {})
    dense = answered["reference"][0]["outcomes"] if answered else ""
    answers = [
        [
            name,
            f"{row['budget']:.3f}",
            f"{100 * row['layer_sparsity']:.1f} %",
            f"{row['think_tokens']:.0f}",
            _share(row),
            "" if name == "reference" else _gap(row["outcomes"], dense),
        ]
        for name, group in answered.items()
        for row in group
    ]
    tables = {
        "real": _table(heads, rows),
        "real-static": _table(
            ["static model", "its layers off", "L2A", "its layers off", "NLL: L2A less static", "agreement in points"],
            against,
        ),
    }
    if no_kl:
        tables["real-no-kl"] = _table(["run", "layers off", "NLL: without KL less with", "agreement in points"], no_kl)
    if answers:
        tables["real-answers"] = _table(
            ["model", "budget", "layers off", "tokens", "exact match", "against the reference"], answers
        )
    return tables


def _likelihood_gap(ours: Row, theirs: Row) -> tuple[str, str]:
    """What ours has more than theirs, problem by problem: nats of NLL, and points of agreement."""
    nll = _nats(ours["nll_by_problem"], theirs["nll_by_problem"])
    return nll, _gap(ours["agreement_by_problem"], theirs["agreement_by_problem"])


def _nats(ours: Sequence[float], theirs: Sequence[float]) -> str:
    gap, low, high = paired(ours, theirs)
    return f"{gap:+.4f} [{low:+.4f}, {high:+.4f}]"


def latency_table(found: Mapping[str, Any]) -> dict[str, str]:
    """That of head_latency.json: each size of the layers alone once, at the smallest budget that gives it."""
    rows = {}
    for row in found["compared"]:
        batch, alone, with_heads = row["batch"], row["layers"], row["heads"]
        cells = [f"{100 * cost:.1f} %" for _, cost, *_ in (alone, with_heads)]
        times = [f"{1e3 * seconds:.2f} ms" for *_, seconds in (alone, with_heads)]
        shares = [f"{100 * accuracy:.2f} %" for _, _, accuracy, _ in (alone, with_heads)]
        pairs = [cell for three in zip(cells, times, shares, strict=True) for cell in three]
        rows[batch, cells[0]] = [str(batch), *pairs, _above(row)]
    heads = [
        "batch",
        *(f"{what}, {side}" for side in ("layers", "heads") for what in ("cost", "a request", "exact match")),
    ]
    return {"heads": _table([*heads, "difference"], rows.values())}


def trials_table(found: Mapping[str, Any]) -> dict[str, str]:
    """That of head_trials.json: at each cost one layer more gone, or as much off the heads of those that stay."""
    heads = "seed,cost,layers off,loss,layers off with narrower heads,loss,heads less layers".split(",")
    rows = []
    for seed, trials in ((name.removeprefix("seed "), each["trials"]) for name, each in found.items()):
        for count in range((len(trials) - 1) // 2):  # of a seed that was cut off, what is whole
            one, other = trials[f"layers {count + 1}"], trials[f"heads {count}"]
            means = [f"{sum(row['losses']) / len(row['losses']):.4f}" for row in (one, other)]
            cells = [seed, f"{100 * one['cost']:.1f} %", str(count + 1), means[0], str(count), means[1]]
            rows.append([*cells, _nats(other["losses"], one["losses"])])
    return {"heads-trials": _table(heads, rows)}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def _frontier(rows: Iterable[Row]) -> str:
    heads = "contract,budget,exact match,by seed,layers off,groups off in kept layers,cost,allocations".split(",")
    return _table(
        heads,
        [
            [row["contract"], f"{row['budget']:g}", _share(row), _list(row["by_seed"])]
            + [f"{100 * row[key]:.1f} %" for key in ("layer_sparsity", "head_sparsity", "cost")]
            + [", ".join(map(str, row["distinct"]))]
            for row in rows
        ],
    )


def _against(rows: Iterable[Row]) -> str:
    return _table(
        ["method", "its cost", "exact match", "L2A's cost", "exact match", "difference", "by seed"],
        [
            [
                row["other"],
                *(f"{100 * row[key][side]:.2f} %" for side in (1, 0) for key in ("cost", "accuracy")),
                _above(row),
                _list(row["by_seed"]),
            ]
            for row in rows
        ],
    )


def _shown(result: Mapping[str, Any], others: Sequence[Row]) -> str:
    """What was measured beside what was to be shown."""
    summary, dense = result["summary"], result["dense"]["accuracy"]
    rows: list[tuple[str, str, str, str]] = []
    for label, key, bar in (
        ("at 34 % of the layers off or more ({:.1f} %)", "gap_at_34", 0.006),
        ("at 40 % of the compute saved or more ({:.1f} %)", "gap_at_40_compute", 0.01),
    ):
        row = summary[key]
        share = row["layer_sparsity"][1] if key == "gap_at_34" else 1 - row["cost"][1]
        rows.append(
            (
                label.format(100 * share),
                _below(row, " points below dense"),
                f"at most {100 * bar:g}",
                _lost(row, bar),
            )
        )
    ratio = summary["easy_hard_cost_ratio"]
    told = f"{ratio['value']:.2f}; by seed {', '.join(f'{one:.2f}' for one in ratio['by_seed'])}"
    rows.append(
        (
            "cost of easy problems, share of hard ones', `mean` of at most 0.6",
            told,
            "at most 0.8",
            _met(ratio["value"] <= 0.8),
        )
    )
    middle = [
        n for row in result["frontier"] if row["contract"] == "mean" and row["budget"] < 1 for n in row["distinct"]
    ]
    rows.append(
        (
            "different allocations at a middle budget, `mean`",
            f"{min(middle)} to {max(middle)}",
            "at least 3",
            _met(min(middle) >= 3),
        )
    )
    for table, what, bar in (
        ("same_weights", "the same weights with all inputs alike", ""),
        ("blind", "a model of its own whose gates are blind", "+1, interval and every seed above 0"),
        (
            "blind_short",
            "a model of its own whose gates are blind (both of 1,000 steps)",
            "+1, interval and every seed above 0",
        ),
    ):
        for row in result[table]:
            met = _met(row["delta"] >= 0.01 and min(row["low"], *row["by_seed"]) > 0) if bar else ""
            rows.append((f"{what}, cost {row['cost'][0]:.2f}", f"L2A {_above(row)}", bar, met))
    for row in result["fine_tuned"]:
        label = f"a static model fine-tuned for its point alone, {row['other']}"
        rows.append((label, f"L2A {_above(row)}", "not below within the interval", _met(row["high"] >= 0)))
    far = [row for row in others if dense - row["accuracy"][1] > 0.05]
    deltas = [row["delta"] for row in far]
    if deltas:
        label = "methods that are not fine-tuned, where they lose more than 5 points"
        rows.append(
            (
                label,
                f"L2A {100 * min(deltas):+.2f} to {100 * max(deltas):+.2f}",
                "at least +5",
                _met(min(deltas) >= 0.05),
            )
        )
    for taught, think in (("", result["think"]), (", where brief traces were taught", result["brief"]["think"])):
        for row, share, tokens, lost in zip(think, ("half", "a quarter"), (0.55, 0.3), (0.015, 0.05), strict=True):
            rows.append(
                (
                    f"think cap of {share} of the reference{taught}",
                    f"{row['tokens']:.3f} of dense's tokens, {_below(row, ' points below dense')}",
                    f"{tokens:g} and {100 * lost:g}",
                    _lost(row, lost) if row["tokens"] <= tokens else _met(False),
                )
            )
    names = {"terse": "another wording, never trained on", "crowded": "more distractors than trained on"}
    for name, row in summary["ood_gap_extra"].items():
        rows.append(
            (
                f"{names[name]}: the gap to dense grows by",
                f"{100 * row['value']:z.2f} points",
                "at most 1",
                _met(row["value"] <= 0.01),
            )
        )
    return _table(
        ["", "measured", "to be shown", ""],
        rows,
    )


def _met(yes: bool) -> str:
    return "met" if yes else "**missed**"


def _lost(row: Row, most: float) -> str:
    """Whether at most so much is lost, and whether the interval says so too."""
    return _met(row["delta"] <= most) + (", not beyond doubt" if row["delta"] <= most < row["high"] else "")


def _out_of_distribution(found: Mapping[str, Row]) -> str:
    names = {"terse": "another wording (`terse`)", "crowded": "more distractors (`crowded`)"}
    seeds = {
        name: _list([a - b for a, b in zip(row["out"]["by_seed"], row["in"]["by_seed"], strict=True)])
        for name, row in found.items()
    }
    return _table(
        ["", "dense", "gap of L2A", "its cost", "gap as trained on", "the gap grows by"],
        [
            [
                names[name],
                f"{100 * row['out']['accuracy'][0]:.2f} %",
                _below(row["out"]),
                f"{row['out']['cost'][1]:.2f}",
                _below(row["in"]),
                f"{100 * row['value']:z.2f} ({seeds[name]})",
            ]
            for name, row in found.items()
        ],
    )


def _split(rows: Iterable[Row]) -> str:
    return _table(
        ["work asked for", "taken", "compute a token", "most think tokens", "exact match", "below dense"],
        [
            [f"{row['asked']:g}", ", ".join(f"{one:.3f}" for one in row["work"])]
            + [", ".join("-" if one is None else f"{one:g}" for one in row[key]) for key in ("compute", "think_cap")]
            + [f"{100 * row['accuracy'][0]:.2f} %"]
            + [f"{-100 * row['delta']:z.2f} [{-100 * row['high']:z.2f}, {-100 * row['low']:z.2f}]"]
            for row in rows
        ],
    )


def _ablations(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, one in found.items():
        label = f"`{name}`: {one['about']}"
        for row in one["points"]:
            if row["budget"] in (0.8, 0.66, 0.5):
                rows.append(
                    [label, f"{row['contract']} {row['budget']:g}", _share(row)]
                    + [f"{100 * row[key]:.1f} %" for key in ("layer_sparsity", "cost")]
                    + ["" if row["against"] is None else _above(row["against"])]
                )
                label = ""
        for row, share in zip(one["think"], ("half", "a quarter"), strict=False):
            tokens = f"{100 * row['accuracy'][1]:.2f} % with {row['tokens']:.3f} of the tokens"
            rows.append(["", f"think cap of {share}", tokens, "", "", ""])
        for subset, row in one["ood"].items():
            gap = f"gap to dense {_below(row['out'])}, grown by {100 * row['value']:z.2f}"
            rows.append(["", f"mean 0.6, `{subset}`", gap, "", f"{100 * row['out']['cost'][1]:.1f} %", ""])
    return _table(["run", "asked for", "exact match", "layers off", "cost", "difference to `short`"], rows)


def _brief(found: Mapping[str, Any]) -> str:
    dense = found["dense"]
    rows = [["the dense base model", _share(dense), _list(dense["by_seed"]), "1.000", ""]]
    for row in found["points"]:
        tokens = f"{row['think_tokens'] / dense['think_tokens']:.3f}"
        rows.append([f"{row['contract']} {row['budget']:g}", _share(row), _list(row["by_seed"]), tokens, ""])
    for row in found["think"]:
        one, seeds = f"{100 * row['accuracy'][1]:.2f} %", _list([row["accuracy"][0] - gap for gap in row["by_seed"]])
        rows.append([f"at most {row['cap']} think tokens", one, seeds, f"{row['tokens']:.3f}", _below(row)])
    return _table(["asked for", "exact match", "by seed", "think tokens / dense", "below dense"], rows)


def _share(row: Row) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def _below(row: Row, unit: str = "") -> str:
    """Of a difference dense - L2A."""
    seeds = f"; by seed {_list(row['by_seed'])}" if unit else ""
    return f"{100 * row['delta']:z.2f}{unit} [{100 * row['low']:z.2f}, {100 * row['high']:z.2f}]{seeds}"


def _gap(ours: Sequence[float | str], theirs: Sequence[float | str]) -> str:
    return _above(dict(zip(("delta", "low", "high"), paired(ours, theirs), strict=True)))


def _above(row: Row) -> str:
    """Of a difference L2A - another."""
    return f"{100 * row['delta']:+z.2f} [{100 * row['low']:+z.2f}, {100 * row['high']:+z.2f}]"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:z.2f}" for value in values)
