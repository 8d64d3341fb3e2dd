"""What a model will need and how fast it can be on a device at each budget, predicted before anything is built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2a_compress import _validate
from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ARTIFACT_FILE, ArtifactConfig
from l2a_compress.budget import Budget
from l2a_compress.bundle import DIALECTS, MANIFEST_FILE, Bundle
from l2a_compress.cost import CostModel, ModelShape, precision_of
from l2a_compress.device import DeviceProfile
from l2a_compress.errors import BudgetError, ConfigError, UnsupportedModelError

__all__ = ["CONFIG_FILE", "Estimate", "Source", "estimate", "read_source", "recommend", "shape_of_config", "spread"]

CONFIG_FILE = "config.json"
CONTEXT = 2048
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is estimated.

    Attributes:
        name: Of the model, for people.
        kind: ``bundle``, ``artifact`` or ``model``.
        shape: Sizes of the decoder.
        precision: Of a bundle's matrices; None where nothing is exported yet.
        dialect: Of a bundle, or which one is meant to be exported.
        variants: A bundle's variants, ``(budget, allocation)`` from the largest budget to the smallest.
        positions: Most tokens of a sequence; None where that is not known, as of an artifact.
    """

    name: str
    kind: str
    shape: ModelShape
    precision: str | None = None
    dialect: str = "ort"
    variants: tuple[tuple[float, Allocation], ...] = ()
    positions: int | None = None

    @property
    def usual_context(self) -> int:
        """Tokens of a sequence where nothing else is said."""
        return CONTEXT if self.positions is None else min(CONTEXT, self.positions)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one budget needs. Times are lower bounds.

    Attributes:
        budget: Share of the dense decoder's compute.
        allocation: What runs.
        spread: Whether the allocation is evenly spread, for want of a variant of this budget.
        weight_bytes: Of the matrices that run, embedding and output head included.
        kv_bytes: Of the key and value caches of all sequences.
        fits: Whether both are within the device's memory.
        decode_seconds: Of one token of every sequence, with the context before it.
        prefill_seconds: Of the contexts of all sequences.
        tokens_per_second: Of all sequences together, while decoding.
    """

    budget: float
    allocation: Allocation
    spread: bool
    weight_bytes: int
    kv_bytes: int
    fits: bool
    decode_seconds: float
    prefill_seconds: float
    tokens_per_second: float

    @property
    def total_bytes(self) -> int:
        """Weights and caches."""
        return self.weight_bytes + self.kv_bytes

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object for programs."""
        return {
            "budget": self.budget,
            "allocation": "spread" if self.spread else "variant",
            "layers": len(self.allocation.layers),
            "groups": self.allocation.num_kept_groups,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "decode_seconds": self.decode_seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def read_source(path: str | Path) -> Source:
    """Read a bundle's or an artifact's folder, or the ``config.json`` of a Hugging Face model or its folder.

    Raises:
        BundleError: The bundle is broken.
        ArtifactError: The artifact is broken.
        ConfigError: There is none of these files, or ``config.json`` lacks a key; the message names it.
        UnsupportedModelError: The model belongs to another family.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).exists():
        bundle = Bundle.load(path)
        best: dict[float, Allocation] = {}
        for graph in bundle.variants:
            if graph.budget is not None and graph.allocation is not None:
                known = best.get(graph.budget, graph.allocation)
                best[graph.budget] = max(known, graph.allocation, key=bundle.cost.units)
        variants = tuple(best.items())
        return Source(
            name=bundle.base["name"],
            kind="bundle",
            shape=bundle.shape,
            precision=bundle.precision,
            dialect=bundle.dialect,
            variants=variants,
            positions=bundle.positions,
        )
    if (path / ARTIFACT_FILE).exists():
        artifact = ArtifactConfig.load(path)
        return Source(name=artifact.base["name"], kind="artifact", shape=artifact.shape)
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: no {MANIFEST_FILE}, {ARTIFACT_FILE} or {CONFIG_FILE} to read ({error.strerror}); "
            "give the folder of a bundle, an artifact or a model"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a JSON file: {error}") from None
    try:
        shape, positions = shape_of_config(data), _positions(data)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"{file}: {error}") from None
    return Source(name=file.resolve().parent.name, kind="model", shape=shape, positions=positions)


def shape_of_config(data: object) -> ModelShape:
    """Read the sizes that costs depend on from a Hugging Face config, as plain JSON.

    Raises:
        ConfigError: A key is missing or no size; the message names it.
        UnsupportedModelError: ``model_type`` is none of ``FAMILIES``.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"a model's config must be an object, found {_validate.shown(data)}")
    family = data.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(f"model_type must be one of {', '.join(FAMILIES)}, found {_validate.shown(family)}")

    def size(key: str, default: int | None = None) -> int:
        value = data.get(key)
        if value is None and default is None:
            raise ConfigError(f"key {key!r} is missing")
        return _validate.integer(default if value is None else value, key, ConfigError, minimum=1)

    heads, width = size("num_attention_heads"), size("hidden_size")
    # Where a key is left out, Llama has as many KV heads as heads, and all but Qwen3 divide the width by the heads.
    silent = family == "llama" or "num_key_value_heads" in data  # null is as many, of all families
    groups = size("num_key_value_heads", heads if silent else None)
    head_dim = size("head_dim", None if family == "qwen3" else max(width // heads, 1))
    tied = data.get("tie_word_embeddings")
    return ModelShape(
        num_layers=size("num_hidden_layers"),
        hidden_size=width,
        intermediate_size=size("intermediate_size"),
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        tied=tied is not None and _validate.flag(tied, "tie_word_embeddings", ConfigError),
    )


def _positions(data: dict[str, Any]) -> int | None:
    """Most tokens of a sequence, where a config says it."""
    key = "max_position_embeddings"
    return None if data.get(key) is None else _validate.integer(data[key], key, ConfigError, minimum=1)


def spread(shape: ModelShape, budget: float) -> Allocation:
    """Return as many whole layers as a budget allows, evenly spread over the depth.

    Raises:
        BudgetError: The budget is out of range, or below one layer.
    """
    cost = CostModel(shape=shape)
    count = cost.limit(Budget(compute=budget)) // (cost.layer_units + shape.num_groups * cost.group_units)
    if count == 0:
        raise BudgetError(f"budget {budget:g} is below one layer of {shape.num_layers}; give a larger one")
    layers = (at * shape.num_layers // count for at in range(count))
    return Allocation.of_layers(layers, shape.num_layers, shape.num_groups)


def estimate(
    source: Source,
    device: DeviceProfile,
    budgets: Sequence[float],
    *,
    precision: str = "fp16",
    context: int | None = None,
    batch: int = 1,
) -> tuple[Estimate, ...]:
    """Predict memory and time of each budget by ``CostModel.latency`` and ``CostModel.prefill``.

    A budget that the source has a variant of is that variant, any other is ``spread``.

    Args:
        source: The model.
        device: What it is to run on.
        budgets: Shares of the dense decoder's compute.
        precision: Of the weights, a name of ``PRECISIONS``.
        context: Tokens of each sequence, at least 1; None: ``source.usual_context``.
        batch: Sequences, at least 1.

    Raises:
        BudgetError: A budget is out of range, or below one layer.
        ConfigError: ``precision`` or the dialect is unknown, or the dialect has no such precision; ``context`` or
            ``batch`` is below 1, or the model has fewer positions than ``context``.
    """
    sizes = precision_of(precision, source.dialect)
    if source.dialect not in DIALECTS:
        raise ConfigError(f"dialect must be one of {', '.join(DIALECTS)}, found {_validate.shown(source.dialect)}")
    if (precision, source.dialect) == ("fp8", "ort"):
        raise ConfigError("precision fp8 is of the dialect standard; give --dialect standard, or int8")
    context = source.usual_context if context is None else context
    _validate.integer(context, "context", ConfigError, minimum=1)
    if source.positions is not None and context > source.positions:
        raise ConfigError(f"context {context}: {source.name} has {source.positions} positions; give no more")
    _validate.integer(batch, "batch", ConfigError, minimum=1)
    cost, variants = CostModel(shape=source.shape), dict(source.variants)
    asked: dict[str, Any] = {"context": context, "batch": batch, "precision": precision, "dialect": source.dialect}
    found = []
    for budget in budgets:
        variant = variants.get(budget)
        allocation = spread(source.shape, budget) if variant is None else variant
        weights = cost.weight_bytes(allocation, sizes.weight_bytes, sizes.embedding_bytes)
        caches = batch * cost.kv_bytes(allocation, context, sizes.cache_bytes)
        decode = cost.latency(allocation, device, **asked)
        row = Estimate(
            budget=budget,
            allocation=allocation,
            spread=variant is None,
            weight_bytes=weights,
            kv_bytes=caches,
            fits=weights + caches <= device.memory_bytes,
            decode_seconds=decode,
            prefill_seconds=cost.prefill(allocation, device, **asked),
            tokens_per_second=batch / decode,
        )
        found.append(row)
    return tuple(found)


def recommend(estimates: Sequence[Estimate], target_seconds: float | None = None) -> tuple[float, ...]:
    """Return the budgets that fit the device's memory and decode a token within the target, the largest first."""
    return tuple(
        sorted(
            (
                row.budget
                for row in estimates
                if row.fits and (target_seconds is None or row.decode_seconds <= target_seconds)
            ),
            reverse=True,
        )
    )
