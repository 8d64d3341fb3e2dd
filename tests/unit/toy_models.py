"""Tiny random models of every family, artifacts of them, and prompts for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from l2a_compress.allocation import Allocation
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.store import save_artifact
from toy_data import word_tokenizer

FAMILIES: Mapping[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
LAYERS, GROUPS = 6, 2


def new_model(family: str = "qwen3", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of 6 layers, 4 heads in 2 KV groups and the embedded task's vocabulary, in evaluation mode."""
    config_class, model_class = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": len(word_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": GROUPS,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # the usual 0.02 makes every allocation answer the same
        "pad_token_id": word_tokenizer().pad_token_id,
        "eos_token_id": word_tokenizer().eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(**settings | changes))
    return model.eval()


def new_gated(
    family: str = "qwen3", *, rank: int = 4, seed: int = 0, trained: bool = True, model: Any = None, **gates: Any
) -> GatedModel:
    """A wrapped model; ``trained`` gives gates and adapters random values, as if they had learned something."""
    settings = {"stem_layers": 1, "hidden": 8, "think_reference": 16} | gates
    base = model if model is not None else new_model(family, seed=seed)
    gated = GatedModel.wrap(base, GateConfig(**settings), AdapterConfig(rank=rank))
    gated.think_id = word_tokenizer().convert_tokens_to_ids("<think>")
    if trained:
        scramble(gated, seed)
    return gated.eval()


def scramble(gated: GatedModel, seed: int = 0) -> None:
    """Random values for everything that is trained, and a random order of the KV groups."""
    generator = torch.Generator().manual_seed(seed + 1)
    demand = {name: value for name, value in trainable(gated).items() if ".demand." in name}
    for name, parameter in trainable(gated).items():
        if name not in demand:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    order = torch.rand(gated.allocator.group_order.shape, generator=generator).argsort(-1)
    gated.allocator.group_order.data.copy_(order)
    for parameter in demand.values():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def trainable(gated: GatedModel) -> dict[str, nn.Parameter]:
    """Gates and adapters by name."""
    gates = {name: value for name, value in gated.gate_parameters.items() if value.is_floating_point()}
    return {**gates, **gated.adapter_parameters}


def prompts(rows: int = 4, length: int = 10, *, seed: int = 0, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Left-padded ``(input_ids, attention_mask)`` [rows, length] of random tokens that end in ``<think>``."""
    tokenizer = word_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(tokenizer), (rows, length), generator=generator)
    ids[:, -1] = tokenizer.convert_tokens_to_ids("<think>")
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        ids[row, : row % 4] = tokenizer.pad_token_id
        mask[row, : row % 4] = 0
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position ids of left-padded rows."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def random_allocations(count: int, *, seed: int = 0, stem: int = 1) -> list[Allocation]:
    """Allocations that keep the stem and about two thirds of everything else."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kept = torch.rand(LAYERS, GROUPS, generator=generator) < 0.6
        kept[:stem] = True
        groups = tuple(tuple(row.nonzero().flatten().tolist()) for row in kept)
        found.append(Allocation(num_groups=GROUPS, groups=groups))
    return found


def kept_groups(gated: GatedModel, widths: Sequence[int]) -> Allocation:
    """That many groups of each layer, the first of its order."""
    order = [list(range(gated.shape.num_groups))] * gated.gate_config.stem_layers + gated.allocator.group_order.tolist()
    groups = (tuple(sorted(ranked[:width])) for ranked, width in zip(order, widths, strict=True))
    return Allocation(num_groups=gated.shape.num_groups, groups=tuple(groups))


def save_base(folder: Path, family: str = "qwen3", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder with tokenizer, as ``from_pretrained`` reads it."""
    new_model(family, seed=seed, **changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def tiny_recipe(base: Path, **changes: Any) -> Recipe:
    """Six steps of eight samples on the embedded task, with a model of :func:`save_base`; sections may be changed."""
    data: dict[str, Any] = {
        "seed": 3,
        "model": {"name": str(base), "attention": "eager"},
        "gates": {"stem_layers": 1, "hidden": 8, "think_reference": 96},
        "adapter": {"rank": 2},
        "data": {"subset": "easy"},
        "optim": {"steps": 6, "batch_size": 8, "log_steps": 1, "save_steps": 3, "threads": 1},
        "evaluation": {"calibration": 16},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, Mapping) else values
    return Recipe.from_json(data)


def new_artifact(
    folder: Path,
    family: str = "qwen3",
    *,
    model: dict[str, object] | None = None,
    dtype: str = "float32",
    **gates: object,
) -> Path:
    """An artifact with random gates and adapters, whose groups are in a random order."""
    sizes = {"head_dim": 16, "intermediate_size": 64}  # what onnxruntime's attention and blocks of 32 need
    recipe = tiny_recipe(save_base(folder / "base", family, **sizes | (model or {})), model={"dtype": dtype})
    recipe = dataclasses.replace(recipe, gates=dataclasses.replace(recipe.gates, **gates))
    model, tokenizer = load_base(recipe.model.name, dtype=dtype, attention=recipe.model.attention)
    digest = digest_of(model)
    gated = GatedModel.wrap(model, recipe.gates, recipe.adapter)
    scramble(gated)
    for value in gated.adapter_parameters.values():
        value.data *= 0.3  # larger ones make attention so sharp that the rounding of sums shows
    gated.prices = ((0.3, 2.0), (1.0, -1.5))
    save_artifact(gated, tokenizer, recipe, folder / "artifact", base_digest=digest, metrics={})
    return folder / "artifact"
