"""What to export, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from l2a_compress.allocation import Allocation
from l2a_compress.budget import budgets_of
from l2a_compress.bundle import DIALECTS, MOST_VARIANTS, PRECISIONS
from l2a_compress.cost import ModelShape
from l2a_compress.errors import ConfigError
from l2a_compress.exporters.engine_recipes import EngineOptions, check_engines
from l2a_compress.exporters.quantize import BITS, BLOCKS, SIZES
from l2a_compress.modeling.gated import GatedModel

WIDTHS_PAY = 0.05  # share of an allocation's cost; less than half of it shows in the time (docs/speed.md)
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_MOST_POSITIONS = 8192


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
        self._check_ladder()
        if not self.budgets and (self.static_shapes or self.per_budget > 1):
            raise ConfigError("static shapes and a router are of variants; leave --variants on")
        if not self.budgets and not self.if_graph:
            raise ConfigError("nothing to export: neither variants nor the If graph; leave one of them on")
        if not self.if_graph and (self.head_widths or not self.whole_cache):
            raise ConfigError("--head-widths and --no-whole-cache are of the If graph; leave them or --no-if-graph out")
        if self.calibrate:
            self._check_calibrate()
        if self.engines is not None:
            made = {"if": self.if_graph, "told": self.if_graph, "static": bool(self.static_shapes)}
            made["variants"] = bool(self.budgets or self.allocations)
            check_engines(self.engines, self.precision, [kind for kind, there in made.items() if there])

    def _check_ladder(self) -> None:
        if self.budgets:
            budgets_of({"budgets": list(self.budgets)})
        count = len(self.allocations) or len(self.budgets) * self.per_budget
        if count > MOST_VARIANTS:
            raise ConfigError(
                f"{count} variants: a bundle has at most {MOST_VARIANTS}; give fewer budgets, or less --per-budget"
            )
        found = sorted({budget for budget, _ in self.allocations} or self.budgets)
        for one, other in pairwise(found):
            if variant_name(one) == variant_name(other):
                raise ConfigError(f"budgets {one} and {other}: both are named {variant_name(one)}; leave one out")

    def _check_calibrate(self) -> None:
        if self.precision == "bf16":
            raise ConfigError("precision bf16: onnxruntime cannot run it on a CPU to measure it; leave out --calibrate")
        if self.engines is not None:
            raise ConfigError("calibrate: a CPU cannot say how fast engines are; leave out --calibrate")
        if self.positions is not None and self.positions < 2:
            raise ConfigError("calibrate: measures a token behind a prompt; give 2 positions at least")


def variant_name(budget: float) -> str:
    """Of the first variant of a budget."""
    return f"b{budget:g}"


def bits_of(options: ExportOptions) -> int:
    """Of onnxruntime's quantized matrices, 0 for none."""
    return BITS.get(options.precision, 0) if options.dialect == "ort" else 0


def dtype_of(options: ExportOptions) -> str:
    """Of weights, activations and caches, where they are not quantized."""
    return FLOATS.get(options.precision, "float32" if options.dialect == "ort" else "float16")


def block_of(options: ExportOptions, shape: ModelShape) -> int:
    """Numbers of a matrix that share a scale; 0 for a scale an output.

    Raises:
        ConfigError: the matrices have no whole blocks of that size.
    """
    if options.dialect == "ort":
        return options.block or BLOCKS.get(options.precision, 0)
    if options.precision != "int4":
        return 0
    inputs = (shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim)
    for block in (options.block,) if options.block else sorted(SIZES, reverse=True):
        if not any(size % block for size in inputs):
            return block
    raise ConfigError(f"block = {options.block}: int4 of matrices with {inputs} inputs has no whole blocks; use int8")


def positions_of(gated: GatedModel, options: ExportOptions) -> int:
    """Most tokens of a sequence."""
    most = int(gated.model.config.max_position_embeddings)
    return min(most, _MOST_POSITIONS) if options.positions is None else min(most, options.positions)
