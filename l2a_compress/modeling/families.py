"""Where layers, heads and projections live in the supported Hugging Face families.

This is the one module that knows it. All four families keep their decoder layers in ``model.model.layers`` and
name their projections alike, so a family is a name, and what is checked here is that a model keeps to that form.
"""

from __future__ import annotations

from typing import cast

from optimum.utils import NormalizedConfigManager
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from l2a_compress.cost import ModelShape
from l2a_compress.errors import UnsupportedModelError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def family_of(config: PretrainedConfig) -> str:
    """The family's name.

    Raises:
        UnsupportedModelError: for any model type outside :data:`FAMILIES`.
    """
    kind = str(getattr(config, "model_type", "unknown"))
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {kind!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "Bring a checkpoint of one of these families."
        )
    return kind


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The sizes that cost and gates depend on, read from a model's config by the names optimum knows of its family."""
    named = NormalizedConfigManager.get_normalized_config_class(family_of(config))(config)
    heads = int(named.num_attention_heads)
    return ModelShape(
        num_layers=int(named.num_layers),
        hidden_size=int(named.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=heads,
        num_groups=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or named.hidden_size // heads),
        vocab_size=int(named.vocab_size),
        tied=bool(config.tie_word_embeddings),
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, in place: replacing an entry replaces the layer."""
    family_of(model.config)
    return cast(nn.ModuleList, model.base_model.layers)


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of an unwrapped decoder layer."""
    return cast(nn.Module, layer.self_attn)
