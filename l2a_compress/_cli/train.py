"""``l2a compress train``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from l2a_compress.errors import ConfigError

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override any setting of the recipe, after all other options; may be repeated.",
    ),
]


def train(
    recipe: Annotated[
        str, typer.Option(help="A shipped recipe (mini, smollm2-135m, llama-3-8b, qwen3-4b) or a TOML file.")
    ] = "mini",
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, log, artifact, evaluation.")] = Path(
        "runs/mini"
    ),
    model: Annotated[
        str | None, typer.Option(help="Base model: 'embedded', a local folder or a hub name. Default: the recipe's.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data: 'embedded', a local file or folder, or a hub name, in the place of all of the recipe's data "
            "table; more of it by --set data.KEY=VALUE. Default: the recipe's."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="How rows are read: gsm8k (default with --data), reasoning, chat, text.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Column mapping, e.g. prompt=question,answer=solution.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data, draws and initialization.")] = None,
    gates: Annotated[
        str | None, typer.Option(help="stem: decide once behind the first layers. inline: the paper's own form.")
    ] = None,
    contract: Annotated[
        str | None, typer.Option(help="cap: every request keeps to its budget. mean: the average does. both.")
    ] = None,
    without: Annotated[
        str | None, typer.Option(help="Switch terms off, for ablations: any of kl,budget,tokens,heads.")
    ] = None,
    static: Annotated[
        str | None,
        typer.Option(
            help="Fine-tune one static allocation in the place of gates, to compare with: uniform, block_influence, "
            "oracle, fixed_budget."
        ),
    ] = None,
    static_compute: Annotated[float | None, typer.Option(help="The share of the dense compute that it spends.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="online, or cached: the teacher's top-k words are computed once before training.")
    ] = None,
    add_tags: Annotated[bool, typer.Option(help="Add the think and answer tags to a tokenizer without them.")] = False,
    settings: Setting = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="Trackers by name (tensorboard, wandb, ...); may be repeated.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Evaluate and draw the frontier at the end.")] = True,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = True,
    force: Annotated[bool, typer.Option(help="Replace a run with other settings that is in the folder.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Train budget-conditioned gates inside a language model, and show its accuracy-compute frontier.

    Without any option it trains the embedded default model, which needs no download.

    A run that was cut off goes on from its last checkpoint when the same command is given again.

    For several processes: accelerate launch --multi_gpu --num_processes N -m l2a_compress compress train ...
    """
    from l2a_compress.evaluation.frontier import check_evaluation
    from l2a_compress.profiles import load_recipe
    from l2a_compress.training.data_config import parse_columns
    from l2a_compress.training.recipe import Recipe, with_overrides
    from l2a_compress.training.run import is_main_process
    from l2a_compress.training.run import train as run_training

    flags: dict[str, Any] = {
        "model.name": model,
        "optim.steps": steps,
        "seed": seed,
        "gates.mode": gates,
        "draws.contract": contract,
        "optim.teacher": teacher,
        "static.method": static,
        "static.compute": static_compute,
    }
    if without is not None:
        flags["objective.without"] = [name.strip() for name in without.split(",") if name.strip()]
    if add_tags:
        flags["model.add_tags"] = True
    table = load_recipe(recipe)
    for name, value in flags.items():
        section, _, key = name.rpartition(".")
        part = table.setdefault(section, {}) if section and value is not None else table
        if value is not None and isinstance(part, dict):  # a section that is no table is refused below
            part[key] = value
    if data is not None:
        table["data"] = {"source": data, "kind": kind or ("embedded" if data == "embedded" else "gsm8k")}
    elif kind is not None:
        _one_source(table, "--kind")["kind"] = kind
    if columns is not None:
        _one_source(table, "--columns")["columns"] = parse_columns(columns)
    table = with_overrides(table, settings or [])
    resolved = Recipe.from_json(table)
    if static is not None and "compute" not in table["static"]:
        raise ConfigError(
            f"--static {static}: needs --static-compute, the share of the dense compute that it spends; 1 fine-tunes "
            "the dense model"
        )
    artifact = run_training(
        resolved,
        out,
        trackers=tracker or (),
        resume=resume,
        force=force,
        quiet=quiet,
        check=partial(check_evaluation, resolved) if evaluate else None,
    )
    if evaluate and is_main_process():
        from l2a_compress._cli.evaluate import evaluate_artifact

        evaluate_artifact(artifact, out / "evaluation", quiet=quiet)


def _one_source(table: dict[str, Any], option: str) -> dict[str, Any]:
    """The recipe's table of data, where it is one."""
    data = table.setdefault("data", {})
    if not isinstance(data, dict) or "sources" in data:
        raise ConfigError(f"{option}: the recipe has several sources of data; give --data as well, or edit the recipe")
    return data
