"""The build recipes of a bundle's engines: which graphs become engines, for which GPUs, in which shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from l2a_compress.bundle import WEIGHT_FILE, GraphEntry
from l2a_compress.engines import TARGETS, BuildRecipe, Profile
from l2a_compress.errors import ConfigError, EngineError
from l2a_compress.exporters import rules
from l2a_compress.exporters.blocks import BATCH, PAST, SEQUENCE, TOTAL
from l2a_compress.exporters.builders import STRONGLY_TYPED
from l2a_compress.files import sha256_of, write_atomic

KINDS = ("if", "told", "variants", "static")
_USUAL = ("told", "variants", "static")
# What TensorRT-RTX builds for by itself: GPUs of the Ampere, Ada and Blackwell generations.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
_LEAST = {"fp8": (8.9, "int8 or int4"), "bf16": (8.0, "fp16")}  # compute capability, and what the lesser ones know
_RTX_KNOWN = ("7.5", *RTX_CAPABILITIES, "12.1")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engines a bundle has.

    Attributes:
        target: ``trt`` or ``trt-rtx``.
        capabilities: compute capabilities to build for; none: for ``trt`` that of the GPU it is built on, for
            ``trt-rtx`` those it builds for by itself.
        kinds: graphs that become engines: ``if`` (the gates inside), ``told`` (the host gives the predicates),
            ``variants``, and ``static``, the variants in fixed shapes. ``told`` and ``variants`` bring the router,
            where the bundle has one.
        batch: most rows.
        prompt: most tokens of a prompt, or as many as the bundle has positions.
        context: most tokens of a sequence while decoding, likewise.

    Raises:
        ConfigError: a value out of range, or a GPU that the target does not know.
    """

    target: str
    capabilities: tuple[str, ...] = ()
    kinds: tuple[str, ...] = _USUAL
    batch: int = 8
    prompt: int = 512
    context: int = 1024

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target {self.target!r}: choose one of {', '.join(TARGETS)}")
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ConfigError(f"engines {', '.join(self.kinds) or 'none'}: choose some of {', '.join(KINDS)}")
        for name, least in (("batch", 1), ("prompt", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.context < self.prompt:
            raise ConfigError(
                f"prompt = {self.prompt}: more than context = {self.context}; lower --max-prompt or raise --max-context"
            )
        strange = sorted(set(self.capabilities) - set(_RTX_KNOWN))
        if self.target == "trt-rtx" and strange:
            raise ConfigError(
                f"compute capability {strange[0]}: TensorRT-RTX builds for {', '.join(_RTX_KNOWN)}; use --target trt"
            )


def check_engines(options: EngineOptions, precision: str, graphs: Collection[str]) -> None:
    """Refuses, before any work, what no engine comes of.

    Args:
        options: which engines are wanted.
        precision: of the bundle.
        graphs: those of ``KINDS`` that the bundle will have.

    Raises:
        ConfigError: a GPU does not know the precision, or there are no graphs of a kind that is named.
    """
    absent = [kind for kind in options.kinds if kind not in graphs]
    if absent and (options.kinds != _USUAL or len(absent) == len(_USUAL)):  # of the usual ones those that there are
        raise ConfigError(f"engines {', '.join(absent)}: the export has no such graphs; export them, or choose others")
    least, instead = _LEAST.get(precision, (0.0, ""))
    for each in options.capabilities:
        if float(each) < least:
            raise ConfigError(f"precision {precision}: GPUs of compute capability {each} do not know it; use {instead}")


def write_recipes(
    folder: Path, graphs: Sequence[GraphEntry], options: EngineOptions, precision: str, positions: int
) -> None:
    """Writes the recipe of each engine beside the graphs.

    Args:
        folder: of graphs and weights.
        graphs: all of them.
        options: which become engines, as :func:`check_engines` has passed them.
        precision: of the bundle. 32 bits are computed in 32 bits, not in TF32.
        positions: most tokens of a sequence that the graphs know.

    Raises:
        EngineError: a graph breaks a rule; says which node and what to do.
    """
    options = replace(options, prompt=min(options.prompt, positions), context=min(options.context, positions))
    weights = sha256_of(folder / WEIGHT_FILE)
    flags = {STRONGLY_TYPED: True} | ({"TF32": False} if precision == "fp32" else {})
    capabilities = _capabilities(options, precision)
    for entry in graphs:
        if not _wanted(entry, options.kinds):
            continue
        model = onnx.load(str(folder / entry.file), load_external_data=False)
        broken = rules.check(model)
        if broken:
            raise EngineError(f"{entry.file}: {'; '.join(map(str, broken))}")
        recipe = BuildRecipe(
            graph=entry.name,
            target=options.target,
            capabilities=capabilities,
            flags=flags,
            profiles=_profiles(model, options),
            graph_sha256=sha256_of(folder / entry.file),
            weights_sha256=weights,
        )
        write_atomic(folder / recipe.file, recipe.text())


def _capabilities(options: EngineOptions, precision: str) -> tuple[str, ...]:
    least, _ = _LEAST.get(precision, (0.0, ""))
    able = tuple(each for each in RTX_CAPABILITIES if float(each) >= least)
    return options.capabilities or (able if options.target == "trt-rtx" else ())


def _wanted(entry: GraphEntry, kinds: Sequence[str]) -> bool:
    if entry.kind == "router":  # what runs on the graph told, and which of several variants of a budget
        return not {"told", "variants"}.isdisjoint(kinds)
    return {"variant": "variants"}.get(entry.kind, entry.kind) in kinds


def _profiles(model: onnx.ModelProto, options: EngineOptions) -> tuple[Profile, ...]:
    """One of prefill and, where the graph reads a cache, one of decoding; none where all shapes are fixed.

    The usual size, which the builder tunes for, is half of the largest.
    """
    inputs = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    free = {name: dims for name, dims in inputs.items() if any(isinstance(dim, str) for dim in dims)}
    if not free:
        return ()
    batch, prompt, past = _up_to(options.batch), _up_to(options.prompt), _up_to(options.context - 1)
    phases = [Profile(name="prefill", shapes=_shapes(free, batch, prompt, (0, 0, 0)))]
    if any(PAST in dims for dims in free.values()):
        phases.append(Profile(name="decode", shapes=_shapes(free, batch, (1, 1, 1), past)))
    return tuple(phases)


def _up_to(most: int) -> tuple[int, int, int]:
    return 1, -(-most // 2), most


def _shapes(
    free: Mapping[str, Sequence[int | str]], batch: Sequence[int], new: Sequence[int], past: Sequence[int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    def at(place: int, dims: Sequence[int | str]) -> tuple[int, ...]:
        sizes = {BATCH: batch[place], SEQUENCE: new[place], PAST: past[place], TOTAL: new[place] + past[place]}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)

    return {name: (at(0, dims), at(1, dims), at(2, dims)) for name, dims in free.items()}
