"""The frontier of the embedded model: training runs, their measurement, and the figures of docs/results.md.

    python benchmarks/frontier.py run main --seed 0     train and measure one experiment; goes on where it was cut off
    python benchmarks/frontier.py list                  experiments, and which records exist
    python benchmarks/frontier.py summary               results/frontier.json, the picture and tables of docs/results.md

A record (benchmarks/results/frontier/NAME-sSEED.json) holds every point with its outcomes problem by problem, so that
runs are compared in pairs on the same problems, whatever machine or day each was run on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from frontier_summary import RECORDS, summarize
from stale import differences, refuse_other, told

from l2a_compress.embedded import MODEL_DIR, pretrain, task
from l2a_compress.evaluation.frontier import evaluate
from l2a_compress.evaluation.report import Report
from l2a_compress.evaluation.split import measure_split
from l2a_compress.files import write_atomic
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.recipe import EvalConfig, Recipe
from l2a_compress.training.run import train
from l2a_compress.training.store import LoadedArtifact, load_artifact

# The layer gates learn the order of the layers, as the paper's do.
GRADIENT = (
    *("annealing.search_rows=0", "annealing.search_trials=0", "annealing.noise_start=1.0"),
    *("annealing.explore=0.05", "annealing.settle=0.35"),
)
BLIND = ("gates.summary=none", "gates.demand=false", "draws.contract=cap")
THRESHOLD = (*GRADIENT, "gates.demand=false", "draws.contract=mean", "draws.dense_share=0.0")
# What a run has beyond the recipe's: time, and the budgets that it meets.
LONG = (
    *("draws.minimum=0.4", "gates.least_compute=0.4"),
    *("evaluation.calibration=2048", "evaluation.demand_rows=4096"),
    *("annealing.explore=0.2", "annealing.settle=0.2", "annealing.search_rows=192"),
    *("annealing.search_trials=30", "annealing.trial_steps=80"),
)
# Ablations are compared with each other, at the recipe's own length.
SHORT = ("draws.contract=both", "evaluation.calibration=1024", "evaluation.demand_rows=1024")
CAPS = (1.0, 0.8, 0.66, 0.6, 0.5, 0.45, 0.4)
UNTRAINED_CAPS = (0.83, 0.66, 0.5)
MEANS = (0.8, 0.7, 0.66, 0.645, 0.635, 0.62, 0.6, 0.595, 0.58, 0.575, 0.5, 0.45)
SHORT_CAPS, SHORT_MEANS = (1.0, 0.8, 0.66, 0.6, 0.5), (0.8, 0.75, 0.66, 0.6, 0.58, 0.5)
PROBED = (0.62, 0.6)
THINK = (0.5, 0.25)
SPLIT = {"computes": (1.0, 0.8, 0.66, 0.5, 0.4), "think_shares": (1.0, 0.35, 0.25), "problems": 500}
WORKS = (0.6, 0.4, 0.3, 0.25, 0.2)
BASE_ROUNDS = 2  # in which the embedded model learns another style of traces
UNTRAINED = ("uniform", "block_influence", "oracle", "early_exit", "think_cap")
OUT_OF_DISTRIBUTION = ("terse", "crowded")


@dataclass(frozen=True)
class Experiment:
    """A training run: what differs from the recipe, and what is measured of it."""

    about: str
    settings: tuple[str, ...] = ()
    without: str = ""
    caps: tuple[float, ...] = CAPS
    means: tuple[float, ...] = MEANS
    threshold: bool = False  # gates run as the paper's do: open above 0, whatever the budget they are told
    baselines: tuple[str, ...] = ()
    probes: bool = False
    static: str = ""
    short: bool = False
    styles: tuple[task.Style, ...] = ()  # of a base model of its own; none: the embedded one


def _short(about: str, settings: tuple[str, ...] = (), **options: Any) -> Experiment:
    return Experiment(about, settings, caps=SHORT_CAPS, means=SHORT_MEANS, short=True, **options)


def _static(method: str, compute: float) -> Experiment:
    return Experiment(
        about=f"{method} at {compute:g} of the compute, fine-tuned for that alone",
        settings=(f"static.method={method}", f"static.compute={compute}"),
        means=(),
        static=method,
    )


EXPERIMENTS = {
    "main": Experiment("the recipe, trained for longer", baselines=("fixed_budget",), probes=True),
    "untrained": Experiment(
        "methods on the frozen model; no training of its own", caps=UNTRAINED_CAPS, means=(), baselines=UNTRAINED
    ),
    "blind": Experiment("gates that see the budget alone", BLIND, means=()),
    "gradient": Experiment(
        "the order of layers learned by the layer gates",
        GRADIENT,
        baselines=("fixed_budget",),
        probes=True,
    ),
    "short": _short("what the ablations below are compared with: the recipe at its own length", probes=True),
    "short-cap": _short("trained under cap alone; the demand head learns from those rows", ("draws.contract=cap",)),
    "layers": _short("no head gates", without="heads"),
    "no-kl": _short("without logical consistency", without="kl", probes=True),
    "no-tokens": _short("without the token terms", without="tokens"),
    "short-blind": replace(_short("gates that see the budget alone", BLIND), means=()),
    "short-gradient": _short("the order of layers learned by the layer gates", GRADIENT),
    "inline": _short("each layer's gate reads that layer's input", (*GRADIENT, "gates.mode=inline")),
    "paper": _short(
        "the paper's own form of the gates: a threshold at 0 that the resource term keeps calibrated",
        THRESHOLD,
        threshold=True,
    ),
    "no-budget": _short("that form without the resource term", THRESHOLD, without="budget", threshold=True),
    "chain-only": _short("trained on one family of problems", ("data.subset=chain",)),
    "brief": _short(
        "on a base model that was taught brief traces too, for tight think budgets",
        ("draws.brief_below=0.4", "draws.full_think_share=0.3", "gates.think_reference=104"),
        styles=get_args(task.Style),
    ),
    **{
        f"{method}-{round(100 * compute)}": _static(method, compute)
        for method in ("block_influence", "oracle", "fixed_budget")
        for compute in (0.66, 0.59, 0.5)
    },
}


def run(name: str, args: argparse.Namespace) -> Path:
    """Trains and measures one experiment and writes its record."""
    experiment = EXPERIMENTS[name]
    scale, steps, problems = (SHORT, 1000, 1000) if experiment.short else (LONG, 3000, 2000)
    settings = [f"seed={args.seed}", f"optim.steps={args.steps or steps}", f"optim.threads={args.threads}"]
    settings += [f"optim.batch_size={args.batch_size}", *scale, *experiment.settings]
    if experiment.static == "fixed_budget":
        settings.append(f'static.artifact="{args.work}/main-s{args.seed}/artifact"')
    base = _base(args.work, name, experiment.styles, args.threads) if experiment.styles else None
    if base:
        settings.append(f'model.name="{base}"')
    recipe = Recipe.named("mini", settings)
    if experiment.without:
        recipe = replace(recipe, objective=replace(recipe.objective, without=(experiment.without,)))
    folder = args.work / f"{'main' if name == 'untrained' else name}-s{args.seed}"
    began = time.time()
    artifact = folder / "artifact"
    if artifact.is_dir():
        refuse_other(artifact, recipe)
    else:
        artifact = train(recipe, folder, quiet=True)
    loaded = load_artifact(artifact)
    torch.set_num_threads(args.threads)
    target, problems = RECORDS / f"{name}-s{args.seed}.json", args.problems or problems
    noted = [text.replace(f"{args.work}/", "") for text in settings[1:]]
    reports = {}
    if target.exists():
        reports = kept_reports(json.loads(target.read_text()), noted, problems, whole=_is_whole(args))
    if args.budgets:
        experiment = replace(experiment, caps=args.budgets, means=args.budgets if experiment.means else ())
    found = measure(loaded, experiment, problems, args.parts.split(","))
    reports |= {part: _merged(reports.get(part), report) if args.budgets else report for part, report in found.items()}
    record = {
        "name": name,
        "about": experiment.about,
        "scale": "short" if experiment.short else "long",
        "seed": args.seed,
        "settings": noted,
        "without": experiment.without,
        "base": _written(base) if base else None,
        "training": dict(loaded.config.metrics),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "seconds": round(time.time() - began),
        "reports": reports,
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_atomic(target, json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    return target


PARTS = ("capped", "mean", "probes", "split")


def _is_whole(args: argparse.Namespace) -> bool:
    return not args.budgets and set(PARTS) <= set(args.parts.split(","))


def kept_reports(record: dict[str, Any], settings: Sequence[str], problems: int, *, whole: bool) -> dict[str, Any]:
    """The reports of a record that new ones are put beside: none where it is of other settings.

    Ends the command where those would be mixed with what is measured now.
    """
    sides = ([text for text in one if not text.startswith("optim.threads=")] for one in (record["settings"], settings))
    other = differences(*(dict(enumerate(map(str, side))) for side in sides))
    reports: dict[str, Any] = record["reports"]
    counts = {one["settings"]["problems"] for one in reports.values()} - {problems}
    other += [f"problems: was {count}, now is {problems}" for count in sorted(counts)]
    if not other:
        return reports
    if not whole:
        raise SystemExit(
            f"the record of {record['name']} is of other settings ({told(other)}): measure all of its parts"
        )
    print(f"the record of {record['name']} is of other settings ({told(other)}): measured anew", flush=True)
    return {}


def _base(work: Path, name: str, styles: Sequence[task.Style], threads: int) -> Path:
    """The embedded model, trained further, in rounds, until it writes these styles; what is there already is kept."""
    torch.set_num_threads(threads)
    base = MODEL_DIR
    for number in range(1, BASE_ROUNDS + 1):
        folder = work / f"base-{name}-{number}"
        if not folder.is_dir():
            made = folder.with_name(f"{folder.name}.partial")
            pretrain.train(made, seed=number, steps=2400, batch_size=32, lr=0.01, styles=styles, base=base)
            made.rename(folder)
        base = folder
    return base


def _written(base: Path) -> list[Any]:
    """What a base model gets right on held-out problems by each style of traces."""
    lines = map(json.loads, (base / "training_log.jsonl").read_text().splitlines())
    return [line["heldout"] for line in lines if "heldout" in line]


def measure(loaded: LoadedArtifact, experiment: Experiment, problems: int, parts: Sequence[str]) -> dict[str, Any]:
    """The reports on held-out problems under either contract, and on problems of kinds that are never trained on."""
    caps, contracts = experiment.caps, ("cap",)
    if experiment.static:
        caps = (loaded.config.metrics["static"]["budget"],)
    if experiment.threshold:
        loaded.gated.prices, caps, contracts = ((0.0, 0.0), (1.0, 0.0)), experiment.means, ("mean",)
    common = replace(loaded.recipe.evaluation, problems=problems, contracts=contracts, budgets=caps, baselines=())
    data, seed = DataConfig(), 7  # the same problems for every experiment and seed
    thinks = () if experiment.static else THINK
    found = {}
    if "capped" in parts:
        settings = replace(common, baselines=experiment.baselines)
        found["capped"] = _trimmed(evaluate(loaded, settings, data=data, seed=seed, think_shares=thinks))
    if "mean" in parts and experiment.means and contracts == ("cap",):
        settings = replace(common, budgets=experiment.means, contracts=("mean",))
        found["mean"] = _trimmed(evaluate(loaded, settings, data=data, seed=seed, think_shares=()))
    for subset in OUT_OF_DISTRIBUTION if experiment.probes and "probes" in parts else ():
        probe: EvalConfig = replace(common, budgets=PROBED, contracts=("mean",))
        report = evaluate(loaded, probe, data=DataConfig(subset=subset), seed=seed, think_shares=())
        found[subset] = _trimmed(report)
    if "split" in parts and experiment.probes and not experiment.short:
        split = measure_split(loaded, **SPLIT, seed=seed).split
        noted = replace(loaded.config, metrics={**loaded.config.metrics, "split": split.to_json()})
        settings, works = replace(common, budgets=(1.0,)), [work for work in WORKS if work >= split.points[0].work]
        report = evaluate(replace(loaded, config=noted), settings, data=data, seed=seed, think_shares=(), works=works)
        found["split"] = _trimmed(report) | {"works": works, "split": split.to_json()}
    return found


def _merged(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """A report with the points of some more budgets."""
    if before is None:
        return found
    result = {name: value for name, value in before.items() if name != "frontier"}  # a check of the old points alone
    for name in ("points", "baselines"):
        new = {_what(point): point for point in found[name]}
        old = [point for point in before[name] if _what(point) not in new]
        result[name] = sorted([*old, *new.values()], key=lambda point: (point["name"], -point["budget"]))
    return result


def _what(point: dict[str, Any]) -> tuple[Any, ...]:
    """What a point is of. Points of one budget differ in their cap on thinking, and early exits by cost alone."""
    cost = point["cost"] if point["name"] == "early_exit" else None
    return point["name"], point["contract"], point["budget"], point.get("think_cap"), cost


def _trimmed(report: Report) -> dict[str, Any]:
    """A report without what only pictures of single runs need."""
    content = report.to_json()
    points = [content["dense"], content["dense_short"], *content["points"], *content["think_points"]]
    points += content["split_points"]
    for point in [*points, *content["baselines"]]:
        for key in ("think_histogram", "wall_ms_per_token", "cpu_ms_per_token", "tokens"):
            (point or {}).pop(key, None)
    for key in ("by_difficulty", "environment", "model"):
        content.pop(key)
    return content


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and measure one experiment")
    one.add_argument("name", choices=sorted(EXPERIMENTS))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, help="other than the experiment's own")
    one.add_argument("--batch-size", type=int, default=16)
    one.add_argument("--problems", type=int, help="other than the experiment's own")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--parts", default=",".join(PARTS), help="what to measure anew; the rest of a record stays")
    one.add_argument(
        "--budgets",
        type=lambda text: tuple(map(float, text.split(","))),
        help="measure these alone, of the parts capped and mean, beside what a record has",
    )
    one.add_argument("--work", type=Path, default=Path.home() / ".cache/l2a_compress/frontier")
    commands.add_parser("list", help="experiments and records")
    commands.add_parser("summary", help="frontier.json, the picture and the tables of all records")
    args = parser.parse_args()
    if args.command == "run":
        print(run(args.name, args))
    elif args.command == "list":
        for name, experiment in EXPERIMENTS.items():
            seeds = sorted(path.stem.rpartition("-s")[2] for path in RECORDS.glob(f"{name}-s*.json"))
            print(f"{name:20} seeds {', '.join(seeds) or '-':10} {experiment.about}")
    else:
        summarize()


if __name__ == "__main__":
    main()
