"""A real LLM on GSM8K: one gated model against static models that are fine-tuned equally, from one dense reference.

    python benchmarks/real_llm.py sft --data DIR               a short dense fine-tuning that gives the format; merged
    python benchmarks/real_llm.py l2a --data DIR               gates and adapters on that model
    python benchmarks/real_llm.py l2a-twice --data DIR         the same for twice the steps: those of two static models
    python benchmarks/real_llm.py l2a-twice-no-kl --data DIR   that without logical consistency
    python benchmarks/real_llm.py l2a-long --data DIR          the same as l2a for eight times the steps
    python benchmarks/real_llm.py block_influence-75 --data DIR     a static model of 0.75 of the layers' cost
    python benchmarks/real_llm.py measure --data DIR           NLL, KL and agreement of all that is trained
    python benchmarks/real_llm.py answers --data DIR           exact match of what the reference and L2A answer
    python benchmarks/real_llm.py report                       its tables, which frontier.py summary puts into docs

Each goes on where it was cut off, and does nothing where it is done with these settings. What was trained with others
is refused; what was measured with others is measured anew, or refused where its artifact is not there. Answers are
written by the runtime, from bundles of 8 bits; the rest is measured in PyTorch. Data are GSM8K's training problems
(DIR/gsm8k/train.jsonl); those that are held out of training are what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fetch_models import DEFAULT_CACHE, SOURCES, fetch
from frontier_tables import real_tables
from measure import RESULTS, likelihood, machine, progress
from stale import differences, refuse_other, told, trained_settings
from transformers import AutoTokenizer

from l2a_compress.artifact import ARTIFACT_FILE
from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.evaluation.answers import matches
from l2a_compress.evaluation.frontier import evaluate
from l2a_compress.evaluation.prompts import Problem, held_out
from l2a_compress.evaluation.statistics import wilson
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.files import sha256_of, write_atomic
from l2a_compress.modeling.families import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, attention_of, decoder_layers
from l2a_compress.modeling.loading import load_base
from l2a_compress.modeling.physical import sliced_linear
from l2a_compress.modeling.tags import ensure_tags
from l2a_compress.runtime import Limits, Runtime
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import build, train
from l2a_compress.training.store import load_artifact, save_artifact

KEPT = ("dropped_layers", "nll_by_problem", "agreement_by_problem")
BUDGETS = tuple(math.ceil(1e4 * budget) / 1e4 for budget in (1.0, 0.875, 0.75, 2 / 3, 0.5625))
STATIC = {
    f"{method}-{round(100 * compute)}": (method, compute)
    for method in ("block_influence", "fixed_budget")
    for compute in (0.75, 2 / 3)
}
# All of them learn full solutions, by the same rates, from the same problems.
COMMON = (
    *("data.max_length=320", "data.heldout_share=0.07", "draws.contract=cap", "draws.full_think_share=1.0"),
    *("draws.condensed_below=0.0", "draws.minimum=0.5", "optim.batch_size=8", "optim.accumulate=2", "optim.lr=5e-4"),
    *("optim.save_steps=20", "optim.log_steps=5", "adapter.rank=16", "adapter.alpha=32", "gates.least_compute=0.4"),
)
SEARCHED = ("annealing.search_rows=16", "annealing.noise_start=4.0")
TWICE = ("annealing.explore=0.2", "annealing.settle=0.2", "evaluation.calibration=32", *SEARCHED)
GATED = {  # and for how many times the steps of a static model
    "l2a": (1, ("annealing.explore=0.3", "annealing.settle=0.3", *SEARCHED)),
    "l2a-twice": (2, TWICE),
    "l2a-twice-no-kl": (2, TWICE),
    "l2a-long": (8, ("annealing.explore=0.1", "annealing.settle=0.3", "evaluation.calibration=32", *SEARCHED)),
}


def recipe_of(name: str, options: argparse.Namespace) -> Recipe:
    """The settings of one run."""
    base = options.work / options.model / "base"
    file = fetch(options.model, options.models)
    source = [f'model.name="{file.parent}"', f'model.gguf_file="{file.name}"', "model.add_tags=true"]
    settings = source if name == "sft" else [f'model.name="{base}"', "model.add_tags=false"]
    settings += [f'model.dtype="{options.dtype}"', f'data.source="{options.data}/gsm8k/train.jsonl"', "data.subset="]
    settings += [*COMMON, f"optim.threads={options.threads}", f"seed={options.seed}"]
    without = ["heads", "tokens"]
    if name == "sft":  # another order of the samples than what follows
        settings += ['static.method="uniform"', f"optim.steps={options.sft_steps}", f"seed={options.seed + 1000}"]
        without += ["kl"]
    else:
        without += ["kl"] if name.endswith("-no-kl") else []
        times, more = GATED.get(name, (1, ()))
        settings += [f"optim.steps={times * options.steps}", *more]
    if name in STATIC:
        method, compute = STATIC[name]
        settings += [f'static.method="{method}"', f"static.compute={compute}"]
        if method == "fixed_budget":
            settings += [f'static.artifact="{options.work / options.model}/l2a/artifact"']
    settings += [f"objective.without={json.dumps(without)}", *options.set]
    return Recipe.named("smollm2-135m", settings)


def trained(name: str, options: argparse.Namespace) -> Path:
    """The artifact of one run, trained where it is not there yet."""
    folder: Path = options.work / options.model / name
    began = time.time()
    refuse_others(name, options)
    if not (folder / "artifact").is_dir():
        train(recipe_of(name, options), folder)
        print(f"{name}: {(time.time() - began) / 60:.0f} minutes, since it was started last")
    if name == "sft" and not (folder.parent / "base").is_dir():
        _merge(folder / "artifact", recipe_of(name, options), folder.parent / "base")
    return folder / "artifact"


def refuse_others(name: str, options: argparse.Namespace) -> None:
    """Ends the command where the run, or the fine-tuning behind its base, was trained with other settings."""
    for run in ("sft", name):
        artifact = options.work / options.model / run / "artifact"
        if artifact.is_dir():
            refuse_other(artifact, recipe_of(run, options))


@torch.no_grad()
def _merge(artifact: Path, recipe: Recipe, target: Path) -> None:
    """A checkpoint of the base model with what the adapters of a dense fine-tuning learned, tags and all."""
    gated = load_artifact(artifact).gated
    settings = recipe.model
    model, tokenizer = load_base(settings.name, gguf_file=settings.gguf_file, dtype=settings.dtype)
    ensure_tags(tokenizer, model, add=settings.add_tags)
    for layer, wrapper in zip(decoder_layers(model), decoder_layers(gated.model), strict=True):
        inner: Any = wrapper.layer
        pairs: list[tuple[Any, Any, str]] = [
            *((attention_of(layer), attention_of(inner), name) for name in ATTENTION_PROJECTIONS),
            *((layer.mlp, inner.mlp, name) for name in MLP_PROJECTIONS),
        ]
        for plain, adapted, name in pairs:
            getattr(plain, name).weight.copy_(sliced_linear(getattr(adapted, name), None, None).weight)
    beside = target.with_name("base.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, target)


def measure(options: argparse.Namespace) -> None:
    """Measures every run that is trained and not measured with these settings yet, against the dense reference."""
    content, found = _record(options)
    measured = found.setdefault("points", {})
    todo = to_measure("measured", found, [name for name in (*GATED, *STATIC) if name in measured], options)
    for name in (*GATED, *STATIC):
        artifact = options.work / options.model / name / "artifact"
        if not artifact.is_dir() or (name in measured and name not in todo):
            continue
        refuse_others(name, options)
        loaded = load_artifact(artifact)
        static = loaded.config.metrics.get("static")
        budgets = (static["budget"],) if static else BUDGETS
        settings = replace(
            loaded.recipe.evaluation, budgets=budgets, contracts=("cap",), problems=options.problems, baselines=()
        )
        report = evaluate(loaded, settings, metric="nll", think_shares=(), batch_size=8, progress=progress)
        for title, points in (("reference", [report.dense]), (name, report.points)):
            measured[title] = [likelihood(point) | {key: getattr(point, key) for key in KEPT} for point in points]
        found.setdefault("training", {})[name] = dict(loaded.config.metrics)
        found["settings"] = {"common": COMMON, **GATED, "steps": options.steps, "sft_steps": options.sft_steps}
        found.setdefault("measured", {})[name] = asked_of(name, options)
        write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    report_of(content)


def asked_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that the figures of one run depend on, as the record notes it."""
    runs = {"sft": recipe_of("sft", options), "recipe": recipe_of(name, options)}
    asked = {key: trained_settings(recipe) for key, recipe in runs.items()}
    found: dict[str, Any] = json.loads(json.dumps({**asked, "problems": options.problems, "budgets": BUDGETS}))
    return found


def to_measure(key: str, found: dict[str, Any], names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Which of what the record has is measured anew, and says why.

    Ends the command where something else in the record was measured with other settings and cannot be measured anew:
    the tables compare all runs of a record with each other.
    """
    todo, kept = [], []
    for name in names:
        noted, folder = found.get(key, {}).get(name), options.work / options.model / name
        others = ["settings that it does not note"] if noted is None else differences(noted, asked_of(name, options))
        if others and name != "reference" and not (folder / "artifact").is_dir():
            kept.append(f"{name} ({told(others)})")
        elif others or options.again:
            todo.append(name)
            print(f"{name}: measured anew ({told(others) or '--again'})", flush=True)
        else:
            print(f"{name}: is in {options.out} already; --again measures it anew", flush=True)
    if kept:
        raise SystemExit(
            f"{options.out} has runs of other settings whose artifacts are not in {options.work}: {', '.join(kept)}. "
            "Ask for the same settings, or for a record of its own with --out"
        )
    return todo


def answers(options: argparse.Namespace) -> None:
    """Asks the runtime every problem at every budget; what was asked is not asked again."""
    content, found = _record(options)
    problems = held_out(
        recipe_of("l2a", options).data,
        AutoTokenizer.from_pretrained(options.work / options.model / "base"),
        metric="accuracy",
        count=options.problems,
        seed=options.seed,
    )
    answered = found.setdefault("answers", {})
    todo = to_measure("answered", found, [name for name in ("reference", *GATED) if name in answered], options)
    for name in ("reference", *GATED):
        bundle = _bundle(name, options)
        if bundle is None:
            continue
        if name in todo:
            answered[name] = []
        found.setdefault("answered", {})[name] = asked_of(name, options)
        for budget in BUDGETS[:1] if name == "reference" else BUDGETS:
            points = answered.setdefault(name, [])
            if budget not in [point["budget"] for point in points]:
                points.append(_asked(bundle, budget, problems, options.threads))
                write_atomic(options.out, json.dumps(content, indent=1) + "\n")
                print(f"{name} {budget}: {100 * points[-1]['accuracy']:.1f} % right", flush=True)
    report_of(content)


def _bundle(name: str, options: argparse.Namespace) -> Path | None:
    """Variants of 8 bits at every budget, of the reference one; None where nothing is trained yet."""
    folder: Path = options.work / options.model / name
    artifact, bundle = folder / "artifact", folder / "bundle"
    refuse_others(name, options)
    if name == "reference" and not artifact.is_dir():  # adapters that do nothing yet
        recipe = recipe_of(name, options)
        gated, tokenizer, digest = build(recipe)
        save_artifact(gated, tokenizer, recipe, artifact, base_digest=digest, metrics={})
    budgets = BUDGETS[:1] if name == "reference" else BUDGETS
    if bundle.is_dir() and not _is_of(bundle, artifact, budgets):
        print(f"{bundle}: is of another artifact or of other budgets; made anew", flush=True)
        shutil.rmtree(bundle)
    if artifact.is_dir() and not bundle.is_dir():
        settings = ExportOptions(precision="int8", if_graph=False, positions=1024, budgets=budgets, calibration=32)
        export(artifact, bundle, settings)
    return bundle if bundle.is_dir() else None


def _is_of(folder: Path, artifact: Path, budgets: Sequence[float]) -> bool:
    bundle = Bundle.load(folder)
    same = bundle.artifact == sha256_of(artifact / ARTIFACT_FILE)
    return same and sorted(one.budget for one in bundle.variants) == sorted(budgets)


def _asked(bundle: Path, budget: float, problems: Sequence[Problem], threads: int) -> dict[str, Any]:
    """What is right of the answers at one budget."""
    runtime = Runtime.open(bundle, serve="variants", max_rows=32, threads=threads)
    began, limits = time.time(), Limits(max_think_tokens=256)
    answered = runtime.generate([problem.prompt for problem in problems], Budget(compute=budget), limits=limits)
    seconds = time.time() - began
    runtime.engine.close()
    hits = [matches(one.answer, each.example.answer) for one, each in zip(answered, problems, strict=True)]
    return {
        "budget": budget,
        "layer_sparsity": 1 - answered[0].layers / runtime.engine.bundle.shape.num_layers,
        "accuracy": sum(hits) / len(hits),
        "interval": wilson(sum(hits), len(hits)),
        "think_tokens": sum(one.think_tokens for one in answered) / len(answered),
        "cut": sum(one.stopped_by == "cap" for one in answered) / len(answered),
        "outcomes": "".join(str(int(hit)) for hit in hits),
        "seconds": round(seconds, 1),
    }


def _record(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole content of the record, and its part for this model."""
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = content.setdefault(options.model, {})
    found["machine"] = machine(options.threads)
    return content, found


def report_of(content: dict[str, Any]) -> None:
    """Prints the tables."""
    for model, found in content.items():
        print(f"\n{model}\n\n" + "\n\n".join(real_tables(found).values()))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sft", *GATED, *STATIC, "measure", "answers", "report"])
    parser.add_argument("--model", choices=sorted(SOURCES), default="qwen2.5-coder-0.5b")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k/train.jsonl")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="folder of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/l2a_compress/real_llm")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, of the recipe")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_llm.json", help="the record (%(default)s)")
    options = parser.parse_args()
    if options.what == "report":
        report_of(json.loads(options.out.read_text()))
        return
    if options.data is None:
        parser.error("--data names the folder that has gsm8k/train.jsonl")
    options.data, options.work = options.data.resolve(), options.work.resolve()
    if options.what == "measure":
        measure(options)
    elif options.what == "answers":
        answers(options)
    else:
        trained(options.what, options)


if __name__ == "__main__":
    main()
