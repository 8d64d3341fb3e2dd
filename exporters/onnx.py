"""`l2a compress export --target onnx` as one function: artifact folder -> bundle folder.

artifact -> gated model -> weight file (adapters merged, layer by layer) -> If graph and variants over it -> manifest
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ARTIFACT_FILE, ArtifactConfig
from l2a_compress.bundle import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Bundle,
    GraphEntry,
    Ladder,
    describe_bundle,
)
from l2a_compress.cost import ModelShape
from l2a_compress.errors import ConfigError
from l2a_compress.exporters import ladder as ladders
from l2a_compress.exporters.calibrate import calibrate, not_faster
from l2a_compress.exporters.engine_recipes import write_recipes
from l2a_compress.exporters.graph import if_graph, router_graph, static_graph, told_graph
from l2a_compress.exporters.options import (
    WIDTHS_PAY,
    ExportOptions,
    bits_of,
    block_of,
    dtype_of,
    positions_of,
    variant_name,
)
from l2a_compress.exporters.peers import write_configs
from l2a_compress.exporters.quantize import (
    LINEAR,
    quantize,
    quantize_columns,
    quantize_linear,
    rounded_columns,
)
from l2a_compress.exporters.refusals import refuse, refuse_place, window_of
from l2a_compress.exporters.shapes import PHASES, fix, sizes_of
from l2a_compress.exporters.spec import GraphSpec, widths_of
from l2a_compress.exporters.weights import (
    BY_INPUT,
    WeightFile,
    gate_tensors,
    model_tensors,
    narrowed,
    reads_input,
    rotary_of,
    round_gates,
)
from l2a_compress.files import atomic_dir, sha256_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.store import LoadedArtifact, load_artifact

__all__ = ["ExportOptions", "export"]

log = logging.getLogger(__name__)
IF_NAME, ROUTER_NAME, TOLD_NAME = "if", "router", "told"
_PACKAGES = ("l2a-compress", "onnx", "onnx-ir", "torch", "transformers")


def export(
    artifact: str | Path,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    base: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Writes a bundle; the folder is there as a whole or not at all.

    Args:
        artifact: what training wrote.
        out: the bundle's folder.
        options: what to export.
        base: the base model, where it is not at the place the artifact remembers.
        force: replace a bundle that is there.
        progress: told the name of each part before it is written.

    Raises:
        ArtifactError: the artifact is not whole, or the base model not its own.
        BudgetError: a ladder's budget is below what the always-on layers cost.
        ConfigError: the model has a form that the graphs do not know.
        StorageError: the folder exists and is no bundle to be replaced, or the disk is full or not writable.
    """
    options, artifact = options or ExportOptions(), Path(artifact)
    tell, versions = progress or (lambda _: None), _versions()
    with atomic_dir(out, force=force, holding=MANIFEST_FILE) as folder:
        tell("artifact")
        loaded = load_artifact(artifact, base=base)
        gated = loaded.gated
        refuse_place(Path(out), artifact, base, loaded)
        refuse(gated, options)
        quality = _quality(artifact, loaded.config)  # may be broken
        if options.precision != "fp32":  # first, so that the ladder is what the graphs' own gates choose
            round_gates(gated, rounded_columns if bits_of(options) else lambda value: value.astype(np.float16))
        tell("ladder")
        ladder = _ladder(loaded, options)
        tell("weights")
        spec = _spec(loaded, _write_weights(gated, folder, options), _widths(gated, ladder, options), options)
        graphs = []
        if options.if_graph:
            tell(IF_NAME)
            graphs.append(_save(if_graph(spec, gated.cost), folder, IF_NAME, None, None, 1.0))
        if options.if_graph and options.engines is not None:
            tell(TOLD_NAME)
            graphs.append(_save(told_graph(spec), folder, TOLD_NAME, None, None, 1.0))
        for name, budget, allocation in _named(ladder):
            tell(name)
            graph = static_graph(spec, allocation, _told(gated, budget))
            graphs.append(_save(graph, folder, name, budget, allocation, gated.cost.fraction(allocation)))
        if options.calibrate:
            tell("calibration")
            graphs = _measured(folder, graphs, gated.shape, positions_of(gated, options), options)
        if options.static_shapes:
            tell("static shapes")
            graphs += _static(gated, spec, folder, graphs, options)
        if options.if_graph or options.per_budget > 1:
            tell(ROUTER_NAME)
            variants = [(g.budget, g.allocation) for g in graphs if g.kind == "variant" and g.budget and g.allocation]
            graphs.append(_save(router_graph(spec, gated.cost, variants), folder, ROUTER_NAME, None, None, 1.0))
        if options.engines is not None:
            tell("recipes")
            write_recipes(folder, graphs, options.engines, options.precision, positions_of(gated, options))
        tell("manifest")
        loaded.tokenizer.save_pretrained(str(folder))
        tags = read_tags(loaded.tokenizer)
        whole = Allocation.dense(gated.shape.num_layers, gated.shape.num_groups)
        dense = next((graph for graph in graphs if graph.kind == "variant" and graph.allocation == whole), None)
        if dense is not None and options.dialect == "ort":  # whose caches are buffers that they share
            write_configs(
                folder,
                dense,
                config=gated.model.config,
                tokenizer=loaded.tokenizer,
                shape=gated.shape,
                positions=positions_of(gated, options),
                end=tags.end_answer,
            )
        bundle = Bundle(
            schema_version=SCHEMA_VERSION,
            base={name: str(loaded.config.base[name]) for name in ("name", "family", "digest")},
            artifact=sha256_of(artifact / ARTIFACT_FILE),
            shape=gated.shape,
            dialect=options.dialect,
            precision=options.precision,
            gates={**gated.gate_config.to_json(), "input_blind": spec.input_blind},
            tags={name: getattr(tags, name) for name in ("think", "end_think", "answer", "end_answer")},
            positions=positions_of(gated, options),
            widths=spec.widths,
            whole_cache=options.whole_cache,
            prices=tuple((float(budget), float(price)) for budget, price in gated.prices),
            graphs=tuple(graphs),
            quality=quality,
            versions=versions,
            files=describe_bundle(folder),
        )
        bundle.write(folder)
    return bundle


def _versions() -> dict[str, str]:
    """Of what makes a bundle. onnxruntime says its own, since several packages bring it."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return found | {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}


def _write_weights(gated: GatedModel, folder: Path, options: ExportOptions) -> WeightFile:
    bits, dtype, block = bits_of(options), dtype_of(options), block_of(options, gated.shape)
    linear = options.dialect == "standard" and options.precision in LINEAR
    with WeightFile(folder) as file, torch.no_grad():
        for name, value in model_tensors(gated):
            by_input = name.rpartition(".")[2] in BY_INPUT
            if value.ndim < 2 or not (bits or (linear and name.startswith("layers."))):
                file.add(name, narrowed(name, value, dtype))
                continue
            if linear:
                values, scales = quantize_linear(value, options.precision, 0 if by_input else 1, block, dtype)
            else:
                values, scales = quantize(value.T if by_input else value, bits, block)
            file.add(f"{name}.values", values)
            file.add(f"{name}.scales", scales)
        for name, value in gate_tensors(gated):
            if value.ndim != 2 or "bias" in name or options.precision == "fp32":
                file.add(name, value)
            elif not bits:
                file.add(name, narrowed(name, value, "float16"))
            else:
                values, scales = quantize_columns(value)
                file.add(name, values)
                file.add(f"{name}.scales", scales)
        file.add("rotary.frequencies", rotary_of(gated)[0])
    return file


def _widths(gated: GatedModel, ladder: Sequence[tuple[float, Allocation]], options: ExportOptions) -> tuple[int, ...]:
    """What a layer of the ``If`` graph can be run with."""
    shape, cost, wanted = gated.shape, gated.cost, options.head_widths
    if wanted is None:
        spared = [
            (len(one.layers) * shape.num_groups - one.num_kept_groups) * cost.group_units / cost.units(one)
            for _, one in ladder
        ]
        pays = options.if_graph and options.engines is None and not bits_of(options)
        wanted = pays and max(spared, default=0.0) > WIDTHS_PAY
    return widths_of(shape) if wanted and gated.gate_config.heads else (shape.num_groups,)


def _spec(loaded: LoadedArtifact, weights: WeightFile, widths: tuple[int, ...], options: ExportOptions) -> GraphSpec:
    gated, config = loaded.gated, loaded.gated.model.config
    return GraphSpec(
        shape=gated.shape,
        gates=gated.gate_config,
        epsilon=float(config.rms_norm_eps),
        window=window_of(config),
        think_id=read_tags(loaded.tokenizer).think,
        dialect=options.dialect,
        tensors=weights.tensors,
        widths=widths,
        bits=bits_of(options),
        block=block_of(options, gated.shape),
        dtype=dtype_of(options),
        whole_cache=options.whole_cache,
        positions=positions_of(gated, options),
        rotary_scale=rotary_of(gated)[1],
    )


def _measured(
    folder: Path, graphs: Sequence[GraphEntry], shape: ModelShape, positions: int, options: ExportOptions
) -> list[GraphEntry]:
    """Measures what runs by itself; removes the variants that gain nothing, and those that were part of such alone."""
    alone = [graph for graph in graphs if graph.kind in (IF_NAME, "variant")]
    costs = calibrate(folder, alone, shape, in_place=options.dialect == "ort", positions=positions)
    slow = not_faster(alone, costs)
    stays, ladder = list[GraphEntry](), Ladder()
    for graph in graphs:
        why = "is not faster than the next larger variant on this machine" if graph in slow else ""
        if graph.kind == "variant" and graph.allocation and graph.budget and not why:
            why = "" if ladder.takes(graph.budget, graph.allocation) else "is no part of the larger variants that stay"
        if why:
            log.warning("%s %s and is left out", graph.name, why)
            (folder / graph.file).unlink()
        else:
            stays.append(graph)
    return stays


def _ladder(loaded: LoadedArtifact, options: ExportOptions) -> list[tuple[float, Allocation]]:
    if options.allocations or not options.budgets:
        return list(options.allocations)
    gated = loaded.gated
    prompts = calibration_prompts(loaded.recipe, loaded.tokenizer, options.calibration, batch_size=16)
    if gated.gate_config.summary == "none" or not reads_input([name for name, _ in gate_tensors(gated)]):
        prompts = [(ids[:1], mask[:1]) for ids, mask in prompts[:1]]  # all others get the same allocations
    return ladders.mine(gated, prompts, options.budgets, per_budget=options.per_budget)


def _named(ladder: Sequence[tuple[float, Allocation]]) -> Iterator[tuple[str, float, Allocation]]:
    """``b0.7``, then ``b0.7-2`` for the second allocation of that budget."""
    seen: Counter[float] = Counter()
    for budget, allocation in ladder:
        seen[budget] += 1
        yield variant_name(budget) + (f"-{seen[budget]}" if seen[budget] > 1 else ""), budget, allocation


def _static(
    gated: GatedModel, spec: GraphSpec, folder: Path, graphs: Sequence[GraphEntry], options: ExportOptions
) -> list[GraphEntry]:
    """Every variant in every fixed shape."""
    found = []
    for entry in graphs:
        if entry.kind != "variant" or entry.budget is None or entry.allocation is None:
            continue
        for batch, sequence in options.static_shapes:
            for phase in PHASES:
                sizes = sizes_of(phase, batch, sequence, in_place=options.dialect == "ort")
                graph = fix(static_graph(spec, entry.allocation, _told(gated, entry.budget)), sizes)
                name = f"{entry.name}.{phase}.batch{batch}.seq{sequence}"
                found.append(_save(graph, folder, name, entry.budget, entry.allocation, entry.cost, sizes))
    return found


@torch.no_grad()
def _told(gated: GatedModel, budget: float) -> Sequence[float] | None:
    """What a variant adds at ``<think>``: its budget is always the same."""
    if not gated.gate_config.tokens:
        return None
    found: list[float] = gated.transition.think_offset(torch.tensor([[budget, 1.0]]))[0].float().tolist()
    return found


def _save(
    model: ir.Model,
    folder: Path,
    name: str,
    budget: float | None,
    allocation: Allocation | None,
    cost: float,
    sizes: dict[str, int] | None = None,
) -> GraphEntry:
    file = f"{name}.onnx"
    ir.save(model, folder / file)
    kind = name if allocation is None else "variant" if sizes is None else "static"
    return GraphEntry(name=name, file=file, kind=kind, budget=budget, allocation=allocation, cost=cost, sizes=sizes)


def _quality(artifact: Path, config: ArtifactConfig) -> tuple[dict[str, Any], ...]:
    """The splits that the artifact notes, and the points of the evaluation that stands beside it, where there are."""
    splits = [{"name": "split", **point} for point in split.to_json()] if (split := config.split) else []
    report = artifact.absolute().parent / "evaluation" / "report.json"
    if not report.is_file():
        return tuple(splits)
    try:
        found = json.loads(report.read_text())
        points = [{**point, "metric": found["metric"]} for point in found["points"]]
        if found["model"].get("artifact") != config.digest:
            log.warning(
                "%s: is of another artifact than %s, or does not say of which: its figures are left out of the bundle; "
                "`l2a compress evaluate` makes it anew",
                report,
                artifact,
            )
            points = []
        return (*points, *splits)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{report}: not a report ({error}); evaluate the artifact again or move the file") from error
