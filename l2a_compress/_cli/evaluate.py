"""``l2a compress evaluate``: quality, sparsity and cost of an artifact at every budget."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a_compress.errors import ConfigError

if TYPE_CHECKING:
    from l2a_compress.training.data_config import DataConfig
    from l2a_compress.training.recipe import EvalConfig
    from l2a_compress.training.store import LoadedArtifact


Artifact = Annotated[
    Path, typer.Option("--artifact", "-a", help="The artifact folder that training wrote.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of generated problems. Default: the recipe's.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Most examples that run together.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model, where it is not at the place the artifact remembers.", show_default=False),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to PyTorch.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def evaluate(
    artifact: Artifact,
    budgets: Annotated[
        str | None,
        typer.Option(help="Shares of the dense compute, e.g. 1.0,0.8,0.6. Default: the recipe's.", show_default=False),
    ] = None,
    contract: Annotated[
        str | None,
        typer.Option(
            help="cap (no request costs more than its budget), mean (the average is the budget), or cap,mean. "
            "Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out examples a point. Default: the recipe's.", show_default=False),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare with at the same costs: uniform, block_influence, oracle, early_exit, think_cap, "
            "fixed_budget, or none. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file, folder or hub name to evaluate on, all of a split, instead of what the recipe held out.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="How the rows of --data are read: gsm8k, reasoning, chat, text, or embedded. Default: reasoning.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Our column name=that of --data, e.g. prompt=question,answer=solution.", show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="The split of --data, e.g. test. Default: train, where it has splits.", show_default=False),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(help="The subset of --data: a hub's, or a folder in the folder.", show_default=False),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy (generate, compare the answers) or nll (likelihood, KL to and agreement with the dense "
            "model). Default: accuracy where there are answers.",
            show_default=False,
        ),
    ] = None,
    think_shares: Annotated[
        str | None,
        typer.Option(
            help="Caps on think tokens to measure at full compute, as shares of the reference length; not with nll. "
            "Default: 0.5,0.25.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        str,
        typer.Option(
            help="Shares of the dense model's work of a request (tokens and compute a token in one number), to be "
            "measured by the split that l2a compress split noted, e.g. 0.6,0.4,0.3."
        ),
    ] = "",
    seed: Seed = None,
    batch_size: BatchSize = 64,
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the files go. Default: the folder evaluation beside the artifact, where training put its "
            "own and export looks for them.",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Measure an artifact at several budgets, beside the dense model and untrained baselines.

    Ends with a table and leaves four files, in the place of those of another evaluation that are there:

    report.json: every figure, with 95 % Wilson intervals; its schema is published

    frontier.svg, frontier.png: quality against realized cost and layer sparsity

    report.html: one page with tables, allocation heat map and think-token histograms
    """
    import torch

    from l2a_compress.evaluation.frontier import metric_for, own_settings
    from l2a_compress.evaluation.report import REPORT_FILE
    from l2a_compress.training.store import load_artifact

    source = _source(data, kind=kind, columns=columns, split=split, subset=subset)
    options = {
        "metric": metric,
        "seed": seed,
        "think_shares": None if think_shares is None else _numbers(think_shares, "--think-shares"),
        "works": _numbers(work, "--work"),
        "batch_size": batch_size,
    }
    if threads:
        torch.set_num_threads(threads)
    loaded = load_artifact(artifact, base=base)
    settings = _settings(own_settings(loaded), budgets, contract, problems, baselines)
    if source is not None:
        if any(_same(source, trained) for trained in loaded.recipe.data.sources):
            typer.echo(
                f"--data {source.source}: the model was trained on this split of it; --split takes another, and "
                "without --data what was held out is measured",
                err=True,
            )
        source = replace(source, max_length=_longest(loaded, settings, nll=(metric or metric_for(source)) == "nll"))
    _move(loaded.gated, device)
    folder = out or artifact.absolute().parent / "evaluation"
    if (folder / REPORT_FILE).exists():  # said before the work is done, while it can still be stopped
        typer.echo(f"{folder}: the evaluation that is there will be replaced; --out takes another folder", err=True)
    _measure(loaded, folder, settings, quiet=quiet, data=source, **options)


def split(
    artifact: Artifact,
    budgets: Annotated[
        str | None,
        typer.Option(help="Shares of the dense compute of a token. Default: the recipe's budgets.", show_default=False),
    ] = None,
    think_shares: Annotated[
        str, typer.Option(help="Caps on think tokens, as shares of the reference length; 1 for none.")
    ] = "1,0.5,0.35,0.25",
    problems: Annotated[int, typer.Option(min=1, help="Calibration examples a pair.")] = 300,
    seed: Seed = None,
    batch_size: BatchSize = 64,
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Find how one number, the work of a whole request, is best split between compute a token and think tokens.

    Measures every pair on calibration examples and notes those that no other beats in the artifact, for
    l2a compress evaluate --work and ArtifactConfig.split.
    """
    import torch

    from l2a_compress.evaluation.console import print_split, progress_bar
    from l2a_compress.evaluation.split import measure_split
    from l2a_compress.training.store import load_artifact, note_metric

    if threads:
        torch.set_num_threads(threads)
    loaded = load_artifact(artifact, base=base)
    computes = loaded.recipe.evaluation.budgets if budgets is None else _numbers(budgets, "--budgets")
    shares = _numbers(think_shares, "--think-shares")
    _move(loaded.gated, device)
    with progress_bar(quiet=quiet) as progress:
        found = measure_split(
            loaded,
            computes=computes,
            think_shares=shares,
            problems=problems,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    print_split(found)
    note_metric(artifact, "split", found.split.to_json())


def evaluate_artifact(artifact: Path, out: Path, *, quiet: bool = False) -> None:
    """Measures an artifact as its own recipe says, as training does at its end, where it was trained."""
    import gc

    import torch

    from l2a_compress.training.store import load_artifact

    gc.collect()  # the model that was trained leaves the device before it is loaded again
    loaded = load_artifact(artifact)
    _move(loaded.gated, "cuda" if torch.cuda.is_available() else "cpu")
    _measure(loaded, out, None, quiet=quiet)


def _measure(loaded: LoadedArtifact, out: Path, settings: EvalConfig | None, *, quiet: bool, **options: Any) -> None:
    from l2a_compress.evaluation.console import print_report, progress_bar
    from l2a_compress.evaluation.frontier import evaluate as measure
    from l2a_compress.evaluation.report import write_report
    from l2a_compress.files import make_folder

    make_folder(out)  # what is wrong with it is said before the work
    with progress_bar(quiet=quiet) as progress:
        report = measure(loaded, settings, progress=progress, **options)
    files: dict[str, Path] = {}
    try:
        files = write_report(report, out)
    finally:
        print_report(report, files)


def _settings(
    recipe: EvalConfig, budgets: str | None, contract: str | None, problems: int | None, baselines: str | None
) -> EvalConfig:
    if budgets is not None:
        recipe = replace(recipe, budgets=_numbers(budgets, "--budgets"))
    if contract is not None:
        recipe = replace(recipe, contracts=_words(contract))
    if problems is not None:
        recipe = replace(recipe, problems=problems)
    if baselines is not None:
        recipe = replace(recipe, baselines=tuple(name for name in _words(baselines) if name != "none"))
    return recipe


def _source(data: str | None, **told: str | None) -> DataConfig | None:
    from l2a_compress.training.data_config import DataConfig, parse_columns

    if data is None:
        for option, value in told.items():
            if value is not None:
                raise ConfigError(f"--{option} {value!r} says what of --data is read; give --data, or leave it out")
        return None
    # All of the file is evaluated: nothing of it was held back from this model by a split of ours.
    return DataConfig(
        source=data,
        kind=told["kind"] or "reasoning",  # type: ignore[arg-type]
        columns=parse_columns(told["columns"] or ""),
        split=told["split"],
        subset=told["subset"],
        heldout_share=1.0,
        calibration_share=0.0,
    )


def _same(one: DataConfig, other: DataConfig) -> bool:
    """Whether both read the same split and subset of the same place; no split is train."""

    def place(data: DataConfig) -> tuple[str, str, str | None]:
        path = Path(data.source)
        return str(path.resolve()) if path.exists() else data.source, data.split or "train", data.subset

    return one.source != "embedded" and place(one) == place(other)


def _longest(loaded: LoadedArtifact, settings: EvalConfig, *, nll: bool) -> int:
    """Tokens of an example of other data: as in training; prompts alone may take what positions generation leaves."""
    trained = loaded.recipe.data.max_length
    room = (
        int(loaded.gated.model.config.max_position_embeddings) - settings.max_think_tokens - settings.max_answer_tokens
    )
    return trained if nll else max(trained, room)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in _words(text))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"{option} {text!r}: expected numbers with commas between, e.g. 1.0,0.8,0.6")
    return found


def _move(model: object, device: str) -> None:
    import torch

    try:
        model.to(torch.device(device))  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
