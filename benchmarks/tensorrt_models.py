"""Artifacts that engines are built of: real or random weights, and gates that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.cost import CostModel
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.modeling.tags import ensure_tags
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.store import save_artifact

LAYERS = {"smollm2-135m": (30,), "qwen3-4b": (4,), "llama-3-8b": (3, 4)}  # by model: the depths that are measured
_SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3-4b": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    ),
    "llama-3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
        },
    ),
}


def make_artifact(model: str, layers: int, folder: Path) -> None:
    """Writes ``folder/artifact``, and ``folder/base`` where the weights are random."""
    if model in _SHAPES:
        _random_base(model, layers, folder / "base")
        base = [f'model.name="{folder / "base"}"', 'model.dtype="bfloat16"']
        recipe = Recipe.named("mini", base)
    else:
        file = fetch(model)
        recipe = Recipe.named(model, [f'model.name="{file.parent}"', f'model.gguf_file="{file.name}"'])
    settings = recipe.model
    loaded, tokenizer = load_base(settings.name, gguf_file=settings.gguf_file, dtype=settings.dtype)
    ensure_tags(tokenizer, loaded, add=settings.add_tags)
    digest = digest_of(loaded)
    gated = GatedModel.wrap(loaded, recipe.gates, recipe.adapter)
    save_artifact(gated, tokenizer, recipe, folder / "artifact", base_digest=digest, metrics={})


def nested(artifact: Path, budgets: Sequence[float]) -> tuple[tuple[float, Allocation], ...]:
    """For each budget the stem and as many of the layers behind it as it pays for, the last ones left out first."""
    config = ArtifactConfig.load(artifact)
    shape, stem = config.shape, config.gates["stem_layers"]
    cost, found = CostModel(shape=shape), []
    for budget in budgets:
        for count in range(shape.num_layers, stem - 1, -1):
            allocation = Allocation.of_layers(range(count), shape.num_layers, shape.num_groups)
            if cost.fraction(allocation) <= budget + 1e-9:
                found.append((budget, allocation))
                break
    return tuple(found)


def _random_base(model: str, layers: int, folder: Path) -> None:
    kind, config, sizes = _SHAPES[model]
    _, tokenizer = load_base("embedded")
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    kind(config(num_hidden_layers=layers, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
