"""What no export can do is refused here, before anything is written."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import PretrainedConfig

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.bundle import Ladder
from l2a_compress.errors import ConfigError
from l2a_compress.exporters.options import ExportOptions, block_of, positions_of
from l2a_compress.limits import limits_of
from l2a_compress.modeling.families import family_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.store import LoadedArtifact


def refuse_place(out: Path, artifact: Path, base: str | None, loaded: LoadedArtifact) -> None:
    """Raises ConfigError where the bundle would replace a folder that holds what is exported."""
    for place in (artifact, base, loaded.config.base.get("path"), loaded.recipe.model.name):
        if place and Path(place).is_dir() and Path(place).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{out}: holds {place}, which is exported; choose another folder (--out)")


def refuse(gated: GatedModel, options: ExportOptions) -> None:
    """Raises ConfigError where the model has no graph with these options, BudgetError where it keeps to no budget."""
    config = gated.model.config
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r}: the graphs know silu alone; export a model that has it")
    if options.dialect == "ort" and gated.shape.head_dim % 16:
        raise ConfigError(
            f"head_dim {gated.shape.head_dim}: onnxruntime's attention needs a multiple of 16; use --dialect standard"
        )
    if gated.gate_config.mode != "stem":
        raise ConfigError("inline gates decide layer by layer and have no graph; train with --gates stem to export")
    if getattr(config, "mlp_bias", False):  # of Llama
        raise ConfigError("mlp_bias: the graphs know no bias in the MLP's matrices; export a model without")
    if options.head_widths and not gated.gate_config.heads:
        raise ConfigError("these gates decide by layer alone, so a layer has one width; leave out --head-widths")
    window_of(config)
    block_of(options, gated.shape)
    most, rope = positions_of(gated, options), config.rope_parameters
    if rope.get("rope_type") == "longrope" and most > rope["original_max_position_embeddings"]:
        raise ConfigError(
            f"positions = {most}: longrope has other frequencies beyond {rope['original_max_position_embeddings']} "
            "tokens, and a graph has one set of them; give no more --positions than these"
        )
    for batch, sequence in options.static_shapes:
        if sequence > most:
            raise ConfigError(f"static shape batch={batch} seq={sequence}: longer than the bundle's {most} positions")
    for budget in () if options.allocations else options.budgets:
        limits_of(Budget(compute=budget), gated.cost, gated.gate_config.stem_layers)
    least, ladder = math.inf, Ladder()
    for budget, allocation in options.allocations:
        _refuse_allocation(gated, budget, allocation)
        if budget > least or not ladder.takes(budget, allocation):
            raise ConfigError(
                f"allocation of budget {budget:g}: is no part of one of the budget before it, or that one is smaller; "
                "give allocations that fall and are nested"
            )
        least = budget


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


def window_of(config: PretrainedConfig) -> int | None:
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
