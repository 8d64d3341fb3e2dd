"""``l2a run``, ``l2a select`` and ``l2a bench``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.limits import Contract

if TYPE_CHECKING:
    from rich.table import Table

    from l2a_compress.runtime import Policy
    from l2a_compress.runtime.controller import Controller
    from l2a_compress.runtime.costs import CostTable
    from l2a_compress.runtime.signals import Source

Folder = Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: onnxruntime's choice.")]
ServeOption = Annotated[str, typer.Option(help="if: one graph for every budget; variants: a graph for each.")]
ContractOption = Annotated[
    str, typer.Option(help="cap: the answer keeps to its budget. mean: the average over many answers does.")
]
ProviderOption = Annotated[str, typer.Option(help="What onnxruntime runs it on: cpu, cuda, trt or trt-rtx.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A TOML file with the selector's rules.")]
_LONGEST_INTERVAL = 86400  # seconds
Cloud = Literal["aws", "gcp", "azure"]
Spot = Annotated[str | None, typer.Option(help="Heed the spot notices of: aws, gcp or azure.")]


def run(
    bundle: Folder,
    prompt: Annotated[str, typer.Argument(help="What to answer.", show_default=False)],
    budget: Annotated[str, typer.Option(help="Share of the dense compute, in (0, 1], or auto.")] = "1.0",
    work: Annotated[
        float | None,
        typer.Option(help="Share of the dense model's work of an answer, split as l2a compress split found best."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Most layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Most KV groups, summed over the layers.")] = None,
    contract: ContractOption = "cap",
    max_think_tokens: Annotated[int, typer.Option(help="Most tokens of reasoning.")] = 160,
    max_answer_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="The answer ends before this text. May be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Within which the answer should be there (auto).")] = None,
    tier: Annotated[str, typer.Option(help="Of the policy (auto).")] = "default",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only that many of the most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    threads: Threads = None,
    serve: ServeOption = "if",
    policy: PolicyFile = None,
    spot: Spot = None,
    provider: ProviderOption = "cpu",
    engines: Annotated[
        str | None, typer.Option(help="Run the bundle's engines: trt or trt-rtx.", show_default=False)
    ] = None,
    stats: Annotated[bool, typer.Option(help="End with what ran, and why.")] = False,
) -> None:
    """Answer a prompt from a bundle, at any budget, as it is written."""
    from l2a_compress.runtime import Answer, Limits, Runtime, Sampling
    from l2a_compress.runtime.tensorrt import EngineDecoder

    if contract not in get_args(Contract):
        raise ConfigError(f"--contract must be one of {', '.join(get_args(Contract))}, found {contract!r}")
    limits = Limits(max_think_tokens=max_think_tokens, max_answer_tokens=max_answer_tokens, stop=tuple(stop or ()))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    asked = "auto" if budget == "auto" else Budget(compute=_share(budget), layers=layers, heads=heads)
    if work is not None and (budget != "1.0" or layers is not None or heads is not None):
        raise ConfigError("--work says what to spend on every axis; leave out --budget, --layers and --heads")
    if asked == "auto" and (layers is not None or heads is not None):
        raise ConfigError("--layers and --heads are caps of a budget that is given; leave them out with --budget auto")
    runtime = Runtime.open(
        bundle,
        max_rows=1,
        threads=threads,
        contract=contract,  # type: ignore[arg-type]  # checked above
        serve=serve,  # type: ignore[arg-type]  # checked by the engine
        policy=_policy(policy),
        sources=_sources(spot, gpu=provider != "cpu" or engines is not None),
        provider=provider,  # type: ignore[arg-type]  # checked where a session is opened
        open_engine=None if engines is None else partial(EngineDecoder, target=engines),
    )
    if work is not None:
        split = runtime.engine.bundle.split
        if split is None:
            raise ConfigError(f"{bundle}: notes no split of work; l2a compress split the artifact and export it again")
        asked = split.at(work).budget
    if stats:
        typer.echo(f"runs on {runtime.engine.runs_on}", err=True)
    if asked == "auto":
        runtime.controller.budget(tier)  # may measure, which is not the answer's time
    began, first = time.perf_counter(), 0.0
    for piece in runtime.stream(
        prompt,
        asked,  # type: ignore[arg-type]
        limits=limits,
        sampling=sampling,
        tier=tier,
        seconds=seconds,
    ):
        if not isinstance(piece, Answer):
            first = first or time.perf_counter()
            typer.echo(piece, nl=False)
            continue
        typer.echo()
        if stats:
            ended, shape = time.perf_counter(), runtime.engine.bundle.shape
            decision = runtime.controller.decisions[tier] if asked == "auto" else None
            why = f" ({decision.binding.name}: {decision.binding.reason})" if decision else ""
            typer.echo(
                f"budget {piece.budget}{why}: cost {piece.cost:.3f}, {piece.layers} of {shape.num_layers} layers, "
                f"{piece.heads} of {shape.num_layers * shape.num_groups} KV groups; {piece.think_tokens} think "
                f"tokens, ended by {piece.stopped_by}, and {piece.answer_tokens} of the answer; first token after "
                f"{1000 * (first - began):.1f} ms, then "
                f"{1000 * (ended - first) / max(1, piece.think_tokens + piece.answer_tokens - 1):.2f} ms a token"
            )


def select(
    bundle: Folder,
    watch: Annotated[bool, typer.Option(help="Go on, until interrupted.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two decisions.")] = 1.0,
    tier: Annotated[str, typer.Option(help="Of the policy.")] = "default",
    threads: Threads = None,
    serve: ServeOption = "if",
    max_rows: Annotated[int, typer.Option(help="Most requests at a time.")] = 8,
    policy: PolicyFile = None,
    spot: Spot = None,
) -> None:
    """Show the signals of this machine, the budget that the selector picks now, and why."""
    from rich.console import Console
    from rich.live import Live

    from l2a_compress.runtime import Runtime

    if not 0 < interval <= _LONGEST_INTERVAL:
        raise ConfigError(f"--interval must be above 0 and at most {_LONGEST_INTERVAL}, found {interval!r}")
    runtime = Runtime.open(
        bundle,
        max_rows=max_rows,
        threads=threads,
        serve=serve,  # type: ignore[arg-type]
        policy=_policy(policy),
        sources=_sources(spot),
    )
    controller = runtime.controller
    controller.budget(tier)
    controller.update((tier,), force=True)
    if not watch:
        Console().print(_decided(controller, tier))
        return
    with Live(_decided(controller, tier), refresh_per_second=4) as live:
        while True:
            time.sleep(interval)
            controller.update((tier,), force=True)
            live.update(_decided(controller, tier))


def bench(
    bundle: Folder,
    threads: Threads = None,
    serve: ServeOption = "if",
    max_rows: Annotated[int, typer.Option(help="Most requests at a time.")] = 8,
    contract: ContractOption = "cap",
    provider: ProviderOption = "cpu",
    engine: Annotated[str, typer.Option(help="python, or native: the C++ runtime runs the graphs.")] = "python",
    rounds: Annotated[int, typer.Option(help="In which the budgets take turns.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON.")] = None,
) -> None:
    """Measure what each budget of a bundle costs on this machine, and what it is worth by its evaluation."""
    from rich.console import Console

    from l2a_compress.runtime import Runtime
    from l2a_compress.runtime.costs import keep, measure

    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, found {rounds!r}")
    opened = Runtime.open(
        bundle,
        max_rows=max_rows,
        threads=threads,
        serve=serve,  # type: ignore[arg-type]  # all are checked by the engine
        contract=contract,  # type: ignore[arg-type]
        provider=provider,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
    ).engine
    table = measure(opened, rounds=rounds)
    Console().print(_costs(table, opened.bundle.quality))
    if out is not None:
        table.write(out)
    keep(opened, table)


def _decided(controller: Controller, tier: str) -> Table:
    """Signals above, terms below."""
    from rich.table import Table

    decision = controller.decisions[tier]
    table = Table(title=f"budget {controller.budget(tier)}" + ("" if decision.admit else ", nothing is admitted"))
    table.add_column("signal or term")
    table.add_column("value", justify="right")
    table.add_column("why")
    for name, reading in sorted(controller.readings.items()):
        table.add_row(name, "-" if reading.value is None else _amount(reading.value, reading.unit), reading.why)
    table.add_section()
    for term in decision.terms:
        mark = "  <-" if term == decision.binding else ""
        table.add_row(f"term {term.name}", f"{term.budget:g}{mark}", term.reason)
    return table


def _costs(table: CostTable, quality: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    worth = {
        point["budget"]: point["accuracy"]
        for point in quality
        if point.get("name") == "l2a" and point.get("contract") == "cap" and point.get("think_cap") is None
    }
    shown = Table(title=f"{table.device}, {table.threads or 'all'} threads, {table.serve}")
    metric = next((str(point["metric"]) for point in quality if "metric" in point), "accuracy")
    for name in ("budget", "layers", "groups", "prefill ms", "ms", f"ms x{table.rows}", "share", "MB", metric):
        shown.add_column(name, justify="right")
    dense = table.steps[0].decode_seconds
    for step in table.steps:
        evaluated = max((budget for budget in worth if budget <= step.budget), default=None)
        shown.add_row(
            f"{step.budget:g}",
            str(step.layers),
            str(step.heads),
            f"{1000 * step.prefill_seconds:.3f}",
            f"{1000 * step.decode_seconds:.2f}",
            f"{1000 * step.step_seconds(table.rows):.2f}",
            f"{step.decode_seconds / dense:.2f}",
            f"{step.memory_bytes / 1e6:.0f}",
            "-" if evaluated is None else f"{100 * worth[evaluated]:.1f} %",
        )
    shown.caption = (
        f"Milliseconds of a token: of a prompt, written alone, written by {table.rows} rows together; share: of the "
        f"time of the largest budget. MB: peak of a process. The {metric} is of the largest evaluated budget within."
    )
    return shown


def _amount(value: float, unit: str) -> str:
    if value == float("inf"):
        return "no limit"
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g} {unit}"


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--budget must be a number in (0, 1] or auto, found {text!r}") from None


def _policy(path: Path | None) -> Policy | None:
    from l2a_compress.runtime import Policy

    return None if path is None else Policy.load(path)


def _sources(spot: str | None, *, gpu: bool = False) -> list[Source]:
    """This machine's own, of its GPU too where that serves, and the notices of its cloud."""
    from l2a_compress.runtime.signals import AwsSpot, AzureSpot, Background, GcpSpot, machine

    sources = machine(gpu=gpu)
    if spot is None:
        return sources
    if spot not in get_args(Cloud):
        raise ConfigError(f"--spot must be one of {', '.join(get_args(Cloud))}, found {spot!r}")
    notices = AwsSpot() if spot == "aws" else GcpSpot() if spot == "gcp" else AzureSpot()
    return [*sources, Background(notices, seconds=2.0)]
