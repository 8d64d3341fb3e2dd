"""``l2a compress export`` and ``l2a compress verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a_compress import _validate
from l2a_compress._cli.engines import finish, spinner
from l2a_compress._cli.run import ProviderOption
from l2a_compress.budget import budgets_of
from l2a_compress.bundle import COSTS_FILE, WEIGHT_FILE, Bundle
from l2a_compress.device import DeviceProfile
from l2a_compress.engines import TARGETS
from l2a_compress.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def export(
    artifact: Annotated[Path, typer.Option(help="The artifact folder that training wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The bundle's folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model, where it was moved.")] = None,
    target: Annotated[
        str, typer.Option(help="onnx; trt or trt-rtx: also engines of TensorRT, or of TensorRT-RTX.")
    ] = "onnx",
    dialect: Annotated[
        str | None,
        typer.Option(
            help="ort: onnxruntime's own operators. standard: opset 23 alone. Default: ort; engines: standard."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16; int8, int4 or (standard) fp8 of the matrices. Default: fp32; engines: fp16."
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Numbers that share a scale: 32, 64 or 128. Default: 128 at int8, 32 at int4.")
    ] = None,
    ladder: Annotated[str | None, typer.Option(help="A shipped ladder or a TOML file. Default: default.")] = None,
    variants: Annotated[bool, typer.Option(help="Export the static variants of the ladder.")] = True,
    if_graph: Annotated[bool, typer.Option(help="Export the graph that runs any allocation.")] = True,
    whole_cache: Annotated[
        bool, typer.Option(help="Layers that the If graph skips write keys and values, so that it may grow again.")
    ] = True,
    per_budget: Annotated[
        int, typer.Option(help="Most variants of a budget. Of several the router picks one by the prompt.")
    ] = 1,
    static_shapes: Annotated[
        str | None, typer.Option(help="Also fixed shapes of each variant: 'batch=1,4 seq=512'.", show_default=False)
    ] = None,
    head_widths: Annotated[
        bool | None,
        typer.Option(
            help="The If graph computes only the groups kept, in more If nodes. Default: where a variant's narrowed "
            "layers spare more than that costs; int8 and int4 for onnxruntime, and engines: off."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="GPUs that engines are for: device profiles, by comma.", show_default=False)
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Graphs that become engines: some of told (l2a run --serve if), variants (--serve variants), static "
            "and if (for programs of your own). Default: told,variants,static."
        ),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most rows of an engine. Default: 8.")] = None,
    max_prompt: Annotated[int | None, typer.Option(help="Most tokens of a prompt of an engine. Default: 512.")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of a sequence of an engine. Default: 1024.")
    ] = None,
    defer_build: Annotated[
        bool, typer.Option(help="Build no engine now: `l2a compress build-engines` does it where they will run.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Measure the If graph and each variant on this machine; leave out variants that are not faster."
        ),
    ] = False,
    positions: Annotated[
        int | None, typer.Option(help="Most tokens of a sequence. Default: the model's own, at most 8192.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Turn an artifact into ONNX graphs for every budget, all over one weight file, and into TensorRT engines."""
    from l2a_compress.exporters.engine_recipes import EngineOptions
    from l2a_compress.exporters.onnx import ExportOptions
    from l2a_compress.exporters.onnx import export as run_export
    from l2a_compress.exporters.shapes import parse_shapes
    from l2a_compress.profiles import load_ladder

    if target not in ("onnx", *TARGETS):
        raise ConfigError(f"--target must be one of onnx, {', '.join(TARGETS)}, found {target!r}")
    if ladder is not None and not variants:
        raise ConfigError("--ladder says which variants there are, and --no-variants that there are none; give one")
    onnx, rungs = target == "onnx", load_ladder(ladder or "default")
    budgets = budgets_of(rungs) if variants else ()
    static_shapes = static_shapes or (rungs.get("static_shapes") if variants else None)
    asked: dict[str, Any] = {
        "capabilities": _capabilities(device),
        "kinds": tuple(engines.split(",")) if engines is not None else None,
        "batch": max_batch,
        "prompt": max_prompt,
        "context": max_context,
    }
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    if onnx and (asked or defer_build):
        raise ConfigError(
            "--device, --engines, --max-batch, --max-prompt, --max-context and --defer-build are of engines, and "
            f"--target onnx has none; give --target {' or '.join(TARGETS)}, or leave them out"
        )
    made = None if onnx else EngineOptions(target=target, **asked)
    options = ExportOptions(
        budgets=budgets,
        dialect=dialect or ("ort" if onnx else "standard"),
        if_graph=if_graph,
        positions=positions,
        precision=precision or ("fp32" if onnx else "fp16"),
        block=block,
        whole_cache=whole_cache,
        per_budget=per_budget,
        static_shapes=parse_shapes(static_shapes) if static_shapes else (),
        head_widths=head_widths,
        engines=made,
        calibrate=calibrate,
    )

    from rich.console import Console

    with spinner("export", quiet=quiet) as tell:
        bundle = run_export(artifact, out, options, base=base, force=force, progress=tell)
    Console().print(bundle_table(bundle, out))
    typer.echo(f"bundle: {out}")
    if made is not None:
        finish(out, target, defer=defer_build, quiet=quiet)


def _capabilities(devices: str | None) -> tuple[str, ...]:
    """Compute capabilities of device profiles."""
    found = []
    for name in devices.split(",") if devices else ():
        profile = DeviceProfile.from_toml(name) if name.endswith(".toml") else DeviceProfile.named(name)
        if profile.compute_capability is None:
            raise ConfigError(f"--device {name}: no NVIDIA GPU, so no engine runs on it")
        found.append(profile.compute_capability)
    return tuple(dict.fromkeys(found))


def verify(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)],
    artifact: Annotated[Path | None, typer.Option(help="Compare tokens with this artifact in PyTorch.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where it was moved.")] = None,
    engines: Annotated[
        str | None, typer.Option(help="Compare the bundle's engines, where they run: trt or trt-rtx.")
    ] = None,
    provider: ProviderOption = "cpu",
    prompts: Annotated[int, typer.Option(help="Prompts to compare.", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="Greedy tokens of each prompt.", min=1)] = 64,
) -> None:
    """Check a bundle: digests, onnx.checker, the export rules, and tokens against PyTorch."""
    from rich.console import Console
    from rich.table import Table

    from l2a_compress.exporters.verify import lint, parity, specialized
    from l2a_compress.runtime.tensorrt import EngineDecoder

    other = None if provider == "cpu" else provider
    for option, value in (("--base", base), ("--engines", engines), ("--provider", other)):
        if artifact is None and value is not None:
            raise ConfigError(f"{option} {value!r} says what is compared with an artifact's tokens; give --artifact")
    if engines is not None and engines not in TARGETS:
        raise ConfigError(f"--engines must be one of {', '.join(TARGETS)}, found {engines!r}")
    if engines is not None and other is not None:
        raise ConfigError("--engines and --provider: engines run without onnxruntime; give one of them")
    found = Bundle.load(bundle)
    typer.echo(f"{len(found.files)} files as the manifest lists them")
    broken = lint(bundle, found)
    if broken:
        raise BundleError("; ".join(broken))
    typer.echo(f"{len(found.graphs)} graphs pass onnx.checker and keep the export rules")
    exact = found.dialect == "standard" and found.precision == "fp32" and found.variants
    for entry in (found.if_graph, found.told_graph):
        if entry is None:
            continue
        if not exact:  # elsewhere both round in other places
            typer.echo(f"{entry.name} was NOT compared with variants: that takes some, in the dialect standard at fp32")
            continue
        apart = specialized(bundle, found, entry)
        if any(apart.values()):
            raise BundleError(f"{bundle}: {entry.name} is not its variants bit for bit: {apart}")
        typer.echo(f"{entry.name} specialised to each of {len(apart)} variants is that variant bit for bit")
    if artifact is None:
        typer.echo("tokens were NOT compared with PyTorch: give --artifact")
        return
    table = Table(title="greedy tokens against PyTorch", title_justify="left")
    for name in ("graph", "budget", "tokens", "equal", "largest logit difference", "allocations"):
        table.add_column(name)
    wrong = []
    opener = None if engines is None else lambda entry: EngineDecoder(bundle, found, entry.name, engines)
    rows = parity(
        bundle,
        artifact,
        base=base,
        prompts=prompts,
        tokens=tokens,
        provider=provider,  # type: ignore[arg-type]  # checked where a session is opened
        open_decoder=opener,
        target=engines,
    )
    for row in rows:
        verdict = "equal" if row.allocations else "DIFFER"
        table.add_row(row.graph, row.budget, str(row.tokens), str(row.equal), f"{row.difference:.2e}", verdict)
        if row.equal < row.tokens or not row.allocations:
            wrong.append(f"{row.graph} at {row.budget}")
    Console().print(table)
    if wrong:
        raise BundleError(f"{bundle}: tokens differ from PyTorch: {', '.join(wrong)}")


def bundle_table(bundle: Bundle, folder: Path) -> Table:
    """What is in a bundle, one row a graph; with times where they were measured."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{bundle.base['name']}: {bundle.dialect}, {bundle.precision}", style="table.title")
    table = Table(title=title, title_justify="left")
    measured = _token_seconds(folder / COSTS_FILE) if COSTS_FILE in bundle.files else {}
    for name in ("graph", "budget", "cost", "layers", "groups", "MB own", "MB shared", "ms/token"):
        table.add_column(name)
    shared = bundle.files[WEIGHT_FILE]["size"]
    for graph in bundle.graphs:
        kept = graph.allocation
        table.add_row(
            Text(graph.name),
            {"if": "any", "told": "any", "router": "-"}.get(graph.kind) or f"{graph.budget:g}",
            "-" if kept is None else f"{graph.cost:.3f}",
            str(bundle.shape.num_layers) if kept is None else str(len(kept.layers)),
            str(bundle.shape.num_layers * bundle.shape.num_groups) if kept is None else str(kept.num_kept_groups),
            f"{bundle.files[graph.file]['size'] / 1e6:.2f}",
            f"{shared / 1e6:.2f}",
            f"{1000 * measured[graph.name]:.2f}" if graph.name in measured else "-",
        )
    return table


def _token_seconds(costs: Path) -> dict[str, float]:
    """Measured seconds of a decode step by graph."""
    try:
        graphs = json.loads(costs.read_bytes())["graphs"]
        return {name: _validate.positive(graphs[name]["decode_seconds"], name, BundleError) for name in graphs}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BundleError(f"{costs}: not what calibration wrote ({error}); export again") from error
