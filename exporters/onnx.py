"""`l2a compress export --target onnx` as one function: artifact folder -> bundle folder.

artifact -> gated model -> weight file (adapters merged, layer by layer) -> If graph and variants over it -> manifest
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from transformers import PretrainedConfig

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ARTIFACT_FILE, ArtifactConfig
from l2a_compress.bundle import (
    DIALECTS,
    MANIFEST_FILE,
    PRECISIONS,
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
from l2a_compress.exporters.engine_recipes import EngineOptions, check_engines, write_recipes
from l2a_compress.exporters.graph import if_graph, router_graph, static_graph, told_graph
from l2a_compress.exporters.peers import write_configs
from l2a_compress.exporters.quantize import (
    BITS,
    BLOCKS,
    LINEAR,
    SIZES,
    quantize,
    quantize_columns,
    quantize_linear,
    rounded_columns,
)
from l2a_compress.exporters.shapes import PHASES, fix, sizes_of
from l2a_compress.exporters.spec import GraphSpec, widths_of
from l2a_compress.exporters.weights import (
    BY_INPUT,
    WeightFile,
    gate_tensors,
    model_tensors,
    narrowed,
    rotary_of,
    round_gates,
)
from l2a_compress.files import atomic_dir, sha256_of
from l2a_compress.modeling.families import family_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.store import LoadedArtifact, load_artifact

log = logging.getLogger(__name__)
IF_NAME, ROUTER_NAME, TOLD_NAME = "if", "router", "told"
_PACKAGES = ("l2a-compress", "onnx", "onnx-ir", "torch", "transformers")
_MOST_POSITIONS = 8192
WIDTHS_PAY = 0.05  # share of an allocation's cost; less than half of it shows in the time (docs/speed.md)
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        budgets: of the static variants, falling; none for no variant.
        allocations: of the static variants, with their budgets, instead of what is mined for ``budgets``; each one a
            part of the one before it, with the whole stem and, of a gated layer, the first groups of its order.
        dialect: ``ort`` (onnxruntime's own operators) or ``standard`` (opset 23 alone).
        if_graph: whether the ``If`` graph is exported.
        calibration: prompts that the ladder is mined from.
        positions: most tokens of a sequence; None: the model's own limit, at most 8192.
        precision: fp32, fp16 or bf16 of weights, activations and caches (gates and logits are computed in 32 bits);
            int8, int4 or, in the dialect ``standard``, fp8 of the matrices. Beside them the dialect ``ort`` has 32 bits
            of the rest, gates of 8 bits and blocks of both; ``standard`` has fp16 of the rest and of the embedding,
            and blocks of int4 alone. The matrices of gates are stored in 16 bits beside 16-bit weights.
        block: numbers of a matrix that share a scale: 32, 64 or 128; larger is faster and coarser. None: in the
            dialect ``ort`` 128 at int8, 32 at int4; in ``standard`` the largest that divides all matrices.
        whole_cache: whether layers that the ``If`` graph skips still write keys and values, so that an allocation may
            grow at any step; else it may only shrink, and to grow is to start again from the tokens.
        per_budget: most variants of a budget; of more than one, the router graph picks one for each prompt.
        static_shapes: (batch, sequence) pairs that every variant is also exported in, as a prefill and a decode step.
        head_widths: whether a layer of the ``If`` graph computes only the groups that are kept, in more ``If`` nodes;
            else it computes all and masks what is left out. None: where a variant's narrowed layers spare more than
            these nodes cost (``WIDTHS_PAY``); not where matrices are quantized in the dialect ``ort``, whose narrower
            layers are no faster, and not for engines.
        engines: engines of TensorRT that the bundle is to have; None for none. Brings ``told``, the ``If`` graph whose
            predicates the host gives.
        calibrate: whether every graph is measured on this machine; a variant no faster than the next larger one
            is then left out. Not at bf16, which onnxruntime has not on a CPU, and not for engines.
    """

    budgets: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55, 0.4)
    allocations: tuple[tuple[float, Allocation], ...] = ()
    dialect: str = "ort"
    if_graph: bool = True
    calibration: int = 256
    positions: int | None = None
    precision: str = "fp32"
    block: int | None = None
    whole_cache: bool = True
    per_budget: int = 1
    static_shapes: tuple[tuple[int, int], ...] = ()
    head_widths: bool | None = None
    engines: EngineOptions | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.dialect not in DIALECTS:
            raise ConfigError(f"dialect {self.dialect!r}: choose one of {', '.join(DIALECTS)}")
        if self.dialect == "standard" and not self.whole_cache:
            raise ConfigError("the standard dialect has a whole cache; leave --whole-cache on, or use --dialect ort")
        if self.dialect == "ort" and self.precision == "fp8":
            raise ConfigError("precision fp8 is of the standard dialect; use --dialect standard, or int8")
        if self.engines is not None and self.dialect != "standard":
            raise ConfigError(f"dialect {self.dialect!r}: TensorRT knows the dialect standard alone")
        blocks = ("int4",) if self.dialect == "standard" else tuple(BITS)
        if self.block is not None and (self.precision not in blocks or self.block not in SIZES):
            raise ConfigError(
                f"block = {self.block} at {self.precision}: choose one of {', '.join(map(str, SIZES))}, with "
                f"precision {' or '.join(blocks)}"
            )
        for name in ("calibration", "per_budget", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        if not self.budgets and (self.static_shapes or self.per_budget > 1):
            raise ConfigError("static shapes and a router are of variants; leave --variants on")
        if not self.budgets and not self.if_graph:
            raise ConfigError("nothing to export: neither variants nor the If graph; leave one of them on")
        if self.calibrate:
            self._check_calibrate()
        if self.engines is not None:
            made = {"if": self.if_graph, "told": self.if_graph, "static": bool(self.static_shapes)}
            made["variants"] = bool(self.budgets or self.allocations)
            check_engines(self.engines, self.precision, [kind for kind, there in made.items() if there])

    def _check_calibrate(self) -> None:
        if self.precision == "bf16":
            raise ConfigError("precision bf16: onnxruntime cannot run it on a CPU to measure it; leave out --calibrate")
        if self.engines is not None:
            raise ConfigError("calibrate: a CPU cannot say how fast engines are; leave out --calibrate")
        if self.positions is not None and self.positions < 2:
            raise ConfigError("calibrate: measures a token behind a prompt; give 2 positions at least")


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
        _refuse_place(Path(out), artifact, base, loaded)
        _refuse(gated, options)
        if options.precision != "fp32":  # first, so that the ladder is what the graphs' own gates choose
            round_gates(gated, rounded_columns if _bits(options) else lambda value: value.astype(np.float16))
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
            graphs = _measured(folder, graphs, gated.shape, _positions(gated, options), options)
        if options.static_shapes:
            tell("static shapes")
            graphs += _static(gated, spec, folder, graphs, options)
        if options.if_graph or options.per_budget > 1:
            tell(ROUTER_NAME)
            variants = [(g.budget, g.allocation) for g in graphs if g.kind == "variant" and g.budget and g.allocation]
            graphs.append(_save(router_graph(spec, gated.cost, variants), folder, ROUTER_NAME, None, None, 1.0))
        if options.engines is not None:
            tell("recipes")
            write_recipes(folder, graphs, options.engines, options.precision, _positions(gated, options))
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
                positions=_positions(gated, options),
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
            positions=_positions(gated, options),
            widths=spec.widths,
            whole_cache=options.whole_cache,
            prices=tuple((float(budget), float(price)) for budget, price in gated.prices),
            graphs=tuple(graphs),
            quality=_quality(artifact, loaded.config),
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
    bits, dtype, block = _bits(options), _dtype(options), _block(options, gated.shape)
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


def _bits(options: ExportOptions) -> int:
    """Of onnxruntime's quantized matrices, 0 for none."""
    return BITS.get(options.precision, 0) if options.dialect == "ort" else 0


def _dtype(options: ExportOptions) -> str:
    return FLOATS.get(options.precision, "float32" if options.dialect == "ort" else "float16")


def _block(options: ExportOptions, shape: ModelShape) -> int:
    if options.dialect == "ort":
        return options.block or BLOCKS.get(options.precision, 0)
    if options.precision != "int4":
        return 0
    inputs = (shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim)
    for block in (options.block,) if options.block else sorted(SIZES, reverse=True):
        if not any(size % block for size in inputs):
            return block
    raise ConfigError(f"block = {options.block}: int4 of matrices with {inputs} inputs has no whole blocks; use int8")


def _refuse_place(out: Path, artifact: Path, base: str | None, loaded: LoadedArtifact) -> None:
    """A folder that holds what is exported must not be replaced by the bundle."""
    for place in (artifact, base, loaded.config.base.get("path"), loaded.recipe.model.name):
        if place and Path(place).is_dir() and Path(place).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{out}: holds {place}, which is exported; choose another folder (--out)")


def _refuse(gated: GatedModel, options: ExportOptions) -> None:
    """What has no graph, before anything is written."""
    config = gated.model.config
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r}: the graphs know silu alone; export a model that has it")
    if options.dialect == "ort" and gated.shape.head_dim % 16:
        raise ConfigError(
            f"head_dim {gated.shape.head_dim}: onnxruntime's attention needs a multiple of 16; use --dialect standard"
        )
    if gated.gate_config.mode != "stem":
        raise ConfigError("inline gates decide layer by layer and have no graph; train with --gates stem to export")
    _window(config)
    _block(options, gated.shape)
    most, rope = _positions(gated, options), config.rope_parameters
    if rope.get("rope_type") == "longrope" and most > rope["original_max_position_embeddings"]:
        raise ConfigError(
            f"positions = {most}: longrope has other frequencies beyond {rope['original_max_position_embeddings']} "
            "tokens, and a graph has one set of them; give no more --positions than these"
        )
    for batch, sequence in options.static_shapes:
        if sequence > most:
            raise ConfigError(f"static shape batch={batch} seq={sequence}: longer than the bundle's {most} positions")
    for budget, allocation in options.allocations:
        _refuse_allocation(gated, budget, allocation)


def _refuse_allocation(gated: GatedModel, budget: float, allocation: Allocation) -> None:
    """Graphs hold groups as a prefix of each layer's order, and the layers before the gates whole."""
    shape, stem = gated.shape, gated.gate_config.stem_layers
    if (allocation.num_layers, allocation.num_groups) != (shape.num_layers, shape.num_groups):
        raise ConfigError(
            f"allocation of budget {budget:g}: is of another model shape; this one has {shape.num_layers} layers of "
            f"{shape.num_groups} groups"
        )
    order = [list(range(shape.num_groups))] * stem + gated.allocator.group_order.tolist()
    for layer, kept in enumerate(allocation.groups):
        count = shape.num_groups if layer < stem else len(kept)
        if list(kept) != sorted(order[layer][:count]):
            raise ConfigError(
                f"allocation of budget {budget:g}: layer {layer} keeps the groups {kept}, and may keep the first of "
                f"{order[layer]}{', all of them' if layer < stem else ''}; give another allocation"
            )


def _widths(gated: GatedModel, ladder: Sequence[tuple[float, Allocation]], options: ExportOptions) -> tuple[int, ...]:
    """What a layer of the ``If`` graph can be run with."""
    shape, cost, wanted = gated.shape, gated.cost, options.head_widths
    if wanted is None:
        spared = [
            (len(one.layers) * shape.num_groups - one.num_kept_groups) * cost.group_units / cost.units(one)
            for _, one in ladder
        ]
        pays = options.engines is None and not _bits(options)
        wanted = pays and max(spared, default=0.0) > WIDTHS_PAY
    return widths_of(shape) if wanted and gated.gate_config.heads else (shape.num_groups,)


def _spec(loaded: LoadedArtifact, weights: WeightFile, widths: tuple[int, ...], options: ExportOptions) -> GraphSpec:
    gated, config = loaded.gated, loaded.gated.model.config
    return GraphSpec(
        shape=gated.shape,
        gates=gated.gate_config,
        epsilon=float(config.rms_norm_eps),
        window=_window(config),
        think_id=read_tags(loaded.tokenizer).think,
        dialect=options.dialect,
        tensors=weights.tensors,
        widths=widths,
        bits=_bits(options),
        block=_block(options, gated.shape),
        dtype=_dtype(options),
        whole_cache=options.whole_cache,
        positions=_positions(gated, options),
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


def _window(config: PretrainedConfig) -> int | None:
    """The sliding window of all layers, None for none, as Transformers decides it.

    Mistral has it in all layers, Qwen where ``layer_types`` says so, Llama nowhere, whatever else stands in the config.
    """
    family = family_of(config)
    kinds = set(config.layer_types) if family.startswith("qwen") else set()
    if len(kinds) > 1:
        raise ConfigError("layers with and without a sliding window are mixed, which the graphs do not know")
    has = family == "mistral" or kinds == {"sliding_attention"}
    window: int | None = config.sliding_window if has else None
    return window


def _positions(gated: GatedModel, options: ExportOptions) -> int:
    most = int(gated.model.config.max_position_embeddings)
    return min(most, _MOST_POSITIONS) if options.positions is None else min(most, options.positions)


def _ladder(loaded: LoadedArtifact, options: ExportOptions) -> list[tuple[float, Allocation]]:
    if options.allocations or not options.budgets:
        return list(options.allocations)
    prompts = calibration_prompts(loaded.recipe, loaded.tokenizer, options.calibration, batch_size=16)
    return ladders.mine(loaded.gated, prompts, options.budgets, per_budget=options.per_budget)


def _named(ladder: Sequence[tuple[float, Allocation]]) -> Iterator[tuple[str, float, Allocation]]:
    """``b0.7``, then ``b0.7-2`` for the second allocation of that budget."""
    seen: Counter[float] = Counter()
    for budget, allocation in ladder:
        seen[budget] += 1
        yield f"b{budget:g}" + (f"-{seen[budget]}" if seen[budget] > 1 else ""), budget, allocation


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
    report = artifact.parent / "evaluation" / "report.json"
    if not report.is_file():
        return tuple(splits)
    try:
        points = json.loads(report.read_text())["points"]
        return (*(dict(point) for point in points), *splits)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{report}: not a report ({error}); evaluate the artifact again or move the file") from error
