"""What the records of frontier.py say together: paired differences, results/frontier.json, picture and tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from frontier_tables import EVEN, costliest, fill, page_tables
from measure import RESULTS

from l2a_compress.evaluation.statistics import clustered, paired
from l2a_compress.files import write_atomic

RECORDS = RESULTS / "frontier"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
PICTURES = PAGE.with_name("images")
MIXED = (0.8, 0.7, 0.66, 0.6, 0.5, 0.45)  # budgets under `mean` that are compared with all inputs alike
ALIKE = 0.02  # an ablation whose cost is further from that of `short` is not compared with it
Point = dict[str, Any]
Record = dict[str, Any]


def records() -> dict[str, list[Record]]:
    """All records by experiment, by seed."""
    found: dict[str, list[Record]] = defaultdict(list)
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        found[record["name"]].append(record)
    return dict(found)


def points(record: Record) -> list[Point]:
    """Everything the gated model was measured at, under either contract."""
    reports = record["reports"]
    return [point for part in ("capped", "mean") for point in reports.get(part, {}).get("points", [])]


def compared(pairs: Sequence[tuple[Point, Point]]) -> dict[str, Any]:
    """The difference first - second, the mean of all pairs (one a seed), and of each seed alone.

    All seeds are measured on the same problems, so the interval is that of the problems' means over seeds: what other
    problems would give with these trainings, not what other trainings would.
    """
    mean, low, high = paired(*(_by_problem(side) for side in zip(*pairs, strict=True)))
    return {
        "delta": round(mean, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "by_seed": [round(paired(a["outcomes"], b["outcomes"])[0], 5) for a, b in pairs],
        "n": len(pairs[0][0]["outcomes"]),
        "cost": [round(fmean(point["cost"] for point in side), 4) for side in zip(*pairs, strict=True)],
        "accuracy": [round(_accuracy(side), 5) for side in zip(*pairs, strict=True)],
        "layer_sparsity": [
            round(fmean(point["layer_sparsity"] for point in side), 4) for side in zip(*pairs, strict=True)
        ],
    }


def _by_problem(side: Sequence[Point]) -> list[float]:
    return [fmean(map(float, seeds)) for seeds in zip(*(point["outcomes"] for point in side), strict=True)]


def _accuracy(side: Iterable[Point]) -> float:
    return fmean(point["accuracy"] for point in side)


def at_sparsity(record: Record, least: float) -> Point | None:
    """The point of the ``mean`` contract with the smallest layer sparsity of at least ``least``."""
    found = [p for p in points(record) if p["contract"] == "mean" and p["layer_sparsity"] >= least]
    return min(found, key=lambda point: point["layer_sparsity"], default=None)


def at_cost(record: Record, most: float) -> Point | None:
    """The point of the ``mean`` contract with the largest cost of at most ``most``."""
    return costliest((point for point in points(record) if point["contract"] == "mean"), most)


def against(
    main: Sequence[Record], others: Sequence[Record], choose: Callable[[Record], Sequence[Point]]
) -> list[dict[str, Any]]:
    """Main under ``mean`` against every point of the others at a cost that is not above theirs, by budget."""
    rows: dict[tuple[str, float], list[tuple[Point, Point]]] = defaultdict(list)
    for record in others:
        ours = next((one for one in main if one["seed"] == record["seed"]), None)
        if ours is None:
            continue
        for point in choose(record):
            best = at_cost(ours, point["cost"] + EVEN)
            if best is not None and point["cost"] < 1:
                name = point["name"] if point["name"] != "l2a" else record["name"]
                exits = point["name"] == "early_exit"  # whose budget is 1 whatever it spends
                rows[name, round(point["cost" if exits else "budget"], 2)].append((best, point))
    return [{"other": name, "budget": budget, **compared(pairs)} for (name, budget), pairs in sorted(rows.items())]


def against_mixtures(main: Sequence[Record], others: Sequence[Record]) -> list[dict[str, Any]]:
    """Main under ``mean`` against what others under ``cap``, all inputs alike, reach at exactly its cost, by budget."""
    rows: dict[float, list[tuple[Point, Point]]] = defaultdict(list)
    for record in others:
        ours = next((one for one in main if one["seed"] == record["seed"]), None)
        alike = [point for point in points(record) if point["contract"] == "cap"]
        for point in points(ours) if ours else ():
            if point["contract"] == "mean" and point["budget"] in MIXED:
                other = mixture(alike, point["cost"])
                if other is not None:
                    rows[point["budget"]].append((point, other))
    return [
        {"other": others[0]["name"], "budget": budget, **compared(pairs)}
        for budget, pairs in sorted(rows.items(), reverse=True)
    ]


def mixture(side: Sequence[Point], cost: float) -> Point | None:
    """The best of two points, one of them drawn for each input so that the mean cost is ``cost``: what is expected.

    That is how gates that cannot tell inputs apart reach a cost between two of their own. A cost within ``EVEN`` of
    the least is that one; below it there is none.
    """
    least = min(point["cost"] for point in side)
    if least - EVEN < cost < least:
        cost = least
    pairs = []
    for low, high in ((low, high) for low in side for high in side if low["cost"] <= cost <= high["cost"]):
        share = (cost - low["cost"]) / (high["cost"] - low["cost"]) if high["cost"] > low["cost"] else 0.0
        mixed = {key: low[key] + share * (high[key] - low[key]) for key in ("cost", "accuracy", "layer_sparsity")}
        pairs.append((mixed, share, low["outcomes"], high["outcomes"]))
    if not pairs:
        return None
    mixed, share, *both = max(pairs, key=lambda pair: pair[0]["accuracy"])
    return mixed | {"outcomes": [(1 - share) * float(a) + share * float(b) for a, b in zip(*both, strict=True)]}


def _baselines(record: Record) -> Sequence[Point]:
    return record["reports"]["capped"]["baselines"]  # type: ignore[no-any-return]


def summarize() -> None:
    """Writes results/frontier.json, the picture, and the tables of docs/results.md."""
    found = records()
    if "main" not in found:
        raise SystemExit("no record of 'main' yet: python benchmarks/frontier.py run main --seed 0")
    main, brief = found["main"], found.pop("brief", [])
    dense = main[0]["reports"]["capped"]["dense"]
    tables = {
        "untrained": against(main, [*main, *found.get("untrained", [])], _baselines),
        "fine_tuned": [
            row
            for name, group in found.items()
            if group[0]["settings"] and any(text.startswith("static.method") for text in group[0]["settings"])
            for row in against(main, group, points)
        ],
        "same_weights": against_mixtures(main, main),
        "blind": against_mixtures(main, found.get("blind", [])),
        "blind_short": against_mixtures(found.get("short-cap", []), found.get("short-blind", [])),
    }
    result = {
        "summary": _summary(main, tables),
        "dense": _pooled([dense]),
        "seeds": [record["seed"] for record in main],
        "frontier": _frontier(main),
        "think": _think(main),
        "split": _split(main),
        "brief": {
            "dense": _pooled([brief[0]["reports"]["capped"]["dense"]]),  # the same base model for all seeds
            "points": _frontier(brief),
            "think": _think(brief),
        },
        **tables,
        "ablations": _ablations({name: group for name, group in found.items() if group[0].get("scale") == "short"}),
        "runs": {
            f"{name}-s{record['seed']}": {
                key: record[key] for key in ("about", "settings", "without", "machine", "seconds")
            }
            | {"training_seconds": record["training"]["seconds"], "steps": record["training"]["steps"]}
            for name, group in [*found.items(), ("brief", brief)]
            for record in group
        },
    }
    write_atomic(RESULTS / "frontier.json", json.dumps(result, indent=1) + "\n")
    draw(main, found, dense)
    write_atomic(PAGE, fill(PAGE.read_text(), page_tables(RESULTS)))


def _ablations(found: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """The short runs: each point, and its difference to ``short`` where that costs the same at the same budget."""
    result: dict[str, Any] = {}
    whole = {(r["seed"], p["contract"], p["budget"]): p for r in found.get("short", []) for p in points(r)}
    for name in sorted(found, key=lambda name: name != "short"):  # first what others are compared with
        group = found[name]
        rows = _frontier(group)
        for row in rows:
            key = row["contract"], row["budget"]
            pairs = [
                (point, whole[record["seed"], *key])
                for record in group
                for point in points(record)
                if (point["contract"], point["budget"]) == key
                and (record["seed"], *key) in whole
                and abs(point["cost"] - whole[record["seed"], *key]["cost"]) <= ALIKE
            ]
            row["against"] = compared(pairs) if pairs and name != "short" else None
        result[name] = {
            "about": group[0]["about"],
            "seeds": [record["seed"] for record in group],
            "points": rows,
            "think": _think(group),
            "ood": _out_of_distribution(group),
        }
    return result


def _summary(main: Sequence[Record], tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    reports = [record["reports"] for record in main]
    summary: dict[str, Any] = {}
    saved = [at_cost(record, 0.6) for record in main]
    for name, chosen in (("gap_at_34", [at_sparsity(record, 0.34) for record in main]), ("gap_at_40_compute", saved)):
        pairs = [(r["capped"]["dense"], point) for r, point in zip(reports, chosen, strict=True) if point]
        summary[name] = compared(pairs) if pairs else None
    ratios = [p["by_difficulty"]["easy"]["cost"] / p["by_difficulty"]["hard"]["cost"] for p in saved if p]
    summary["easy_hard_cost_ratio"] = {"value": round(fmean(ratios), 4), "by_seed": [round(one, 4) for one in ratios]}
    for name, table in (("gap_input_blind", "blind"), ("gap_input_blind_at_1000_steps", "blind_short")):
        summary[name] = next((row for row in tables[table] if row["budget"] == 0.6), None)  # 40 % saved
    tuned = sorted(tables["fine_tuned"], key=lambda row: row["delta"])
    summary["best_static_tuned_delta"] = tuned[0] if tuned else None
    summary["ood_gap_extra"] = _out_of_distribution(main)
    return summary


def _out_of_distribution(group: Sequence[Record]) -> dict[str, Any]:
    """By how much the gap to dense grows on problems of kinds that were never trained on, at the same price."""
    extra = {}
    for subset in ("terse", "crowded"):
        inside, outside = [], []
        for record in group:
            if subset not in record["reports"]:
                continue
            there = record["reports"][subset]
            other = min(there["points"], key=lambda point: point["budget"])
            point = next(p for p in points(record) if (p["contract"], p["budget"]) == ("mean", other["budget"]))
            inside.append((record["reports"]["capped"]["dense"], point))
            outside.append((there["dense"], other))
        if outside:
            near, far = compared(inside), compared(outside)
            extra[subset] = {"value": round(far["delta"] - near["delta"], 5), "out": far, "in": near}
    return extra


def _frontier(group: Sequence[Record]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, float], list[Point]] = defaultdict(list)
    for record in group:
        for point in points(record):
            rows[point["contract"], point["budget"]].append(point)
    return [
        {
            "contract": contract,
            "budget": budget,
            **_pooled(side),
            "distinct": [point["distinct_allocations"] for point in side],
            "by_difficulty": {
                name: {
                    key: round(fmean(point["by_difficulty"][name][key] for point in side), 4)
                    for key in ("accuracy", "cost")
                }
                for name in side[0]["by_difficulty"]
            },
        }
        for (contract, budget), side in sorted(rows.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]


def _pooled(side: Sequence[Point]) -> dict[str, Any]:
    hits = [sum(map(int, seeds)) for seeds in zip(*(point["outcomes"] for point in side), strict=True)]
    trials = [len(side)] * len(hits)
    means = {
        key: round(fmean(point[key] for point in side), 4)
        for key in ("cost", "layer_sparsity", "head_sparsity", "think_tokens")
    }
    return {
        "accuracy": round(sum(hits) / sum(trials), 5),
        "interval": [round(one, 5) for one in clustered(hits, trials)],
        "by_seed": [round(point["accuracy"], 5) for point in side],
        "over_budget": sum(point["over_budget"] for point in side),
        **means,
    }


def _think(main: Sequence[Record]) -> list[dict[str, Any]]:
    rows: dict[int, list[tuple[Point, Point]]] = defaultdict(list)
    for record in main:
        report = record["reports"]["capped"]
        for point in report["think_points"]:
            rows[point["think_cap"]].append((report["dense"], point))
    return [
        {
            "cap": cap,
            "tokens": round(fmean(b["think_tokens"] / a["think_tokens"] for a, b in pairs), 4),
            **compared(pairs),
        }
        for cap, pairs in sorted(rows.items(), reverse=True)
    ]


def _split(main: Sequence[Record]) -> list[dict[str, Any]]:
    """What one number for a whole request gives: asked for, taken, and how it was split in each seed."""
    rows: dict[float, list[tuple[Point, Point]]] = defaultdict(list)
    for record in main:
        report = record["reports"].get("split")
        for asked, point in zip(report["works"], report["split_points"], strict=True) if report else ():
            rows[asked].append((point, report["dense"]))
    return [
        {
            "asked": asked,
            "work": [round(a["work"] / b["work"], 4) for a, b in pairs],
            "compute": [a["budget"] for a, _ in pairs],
            "think_cap": [a["think_cap"] for a, _ in pairs],
            **compared(pairs),
        }
        for asked, pairs in sorted(rows.items(), reverse=True)
    ]


def _work(side: Sequence[Point], dense: Point) -> list[tuple[float, float]]:
    """(tokens thought by the cost of each, over dense's; exact match in %), by the first."""
    whole = dense["think_tokens"]
    return sorted((point["cost"] * point["think_tokens"] / whole, 100 * point["accuracy"]) for point in side)


def draw(main: Sequence[Record], found: Mapping[str, Sequence[Record]], dense: Point) -> None:
    """docs/images/frontier.png: accuracy against the realized cost of a token, and against that of a request."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), width_ratios=[2, 1], layout="constrained")
    lines: list[tuple[str, Sequence[Point], str, str | None]]
    lines = [("L2A, mean", [p for p in _frontier(main) if p["contract"] == "mean"], "o-", "#1565c0")]
    lines.append(("L2A, cap", [p for p in _frontier(main) if p["contract"] == "cap"], "s-", "#64b5f6"))
    for name, order, color in (("greedy", "one greedy search", "#90a4ae"), ("gradient", "gradient", "#ef6c00")):
        if name in found:
            side = [p for p in _frontier(found[name]) if p["contract"] == "cap"]
            lines.append((f"L2A, cap, order of layers by {order}", side, "s:", color))
    if "blind" in found:
        lines.append(("the same, gates blind to the input", _frontier(found["blind"]), "d--", "#7b1fa2"))
    tuned: dict[str, list[Point]] = defaultdict(list)
    for name, group in found.items():
        if any(text.startswith("static.method") for text in group[0]["settings"]):
            tuned[name.rpartition("-")[0]] += _frontier(group)
    lines += [(f"{name.replace('_', ' ')}, fine-tuned", side, "^:", None) for name, side in tuned.items()]
    others: dict[str, list[Point]] = defaultdict(list)
    frozen = _baselines(found["untrained"][0]) if "untrained" in found else ()
    for point in frozen:
        if point["name"] != "think_cap":
            others[point["name"]].append(point)
    lines += [(f"{name.replace('_', ' ')}, untrained", side, "x:", None) for name, side in others.items()]
    for label, side, style, color in lines:
        side = sorted(side, key=lambda point: point["cost"])
        costs, accuracies = [p["cost"] for p in side], [100 * p["accuracy"] for p in side]
        left.plot(costs, accuracies, style, color=color, label=label, markersize=4, linewidth=1.2)
    left.axhline(100 * dense["accuracy"], color="black", linewidth=0.8, linestyle=":")
    at = (0.9, 100 * dense["accuracy"])
    left.annotate("dense", at, xytext=(0, 2), textcoords="offset points", fontsize=8)
    left.set(
        xlabel="realized cost, share of the dense compute", ylabel="exact match, %", ylim=(None, 103), xlim=(0.36, 1.02)
    )
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    report, split = main[0]["reports"]["capped"], main[0]["reports"].get("split", {})
    for label, side, style in (
        ("L2A, split", split.get("split_points", []), "D-"),
        (
            "L2A, fewer tokens alone",
            [*report["think_points"], *[p for p in report["points"] if p["budget"] == 1]],
            "o-",
        ),
        ("L2A, less compute alone", [p for p in report["points"] if p["contract"] == "cap"], "s-"),
        ("dense, cut off", [*[p for p in frozen if p["name"] == "think_cap"], dense], "x:"),
    ):
        if side:
            right.plot(*zip(*_work(side, report["dense"]), strict=True), style, label=label)
    right.set(xlabel="think tokens by their cost, share of dense", ylim=(0, 102), xlim=(0, 1.02))
    right.legend(fontsize=7, loc="lower right")
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / "frontier.png", dpi=130)
