"""Base models and tokenizers by name: the embedded one, a local folder, or the hub."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from l2a_compress.embedded import MODEL_DIR
from l2a_compress.errors import ConfigError, UnsupportedModelError
from l2a_compress.modeling.families import family_of


def resolve(name: str) -> str:
    """The folder or hub name that stands behind a model name."""
    return str(MODEL_DIR) if name == "embedded" else name


def load_base(
    name: str, *, gguf_file: str | None = None, dtype: str = "float32", attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in evaluation mode and its tokenizer (which pads on the left).

    Raises:
        ConfigError: nothing can be loaded by that name.
        UnsupportedModelError: the model's family is not supported.
    """
    where = resolve(name)
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        family_of(AutoConfig.from_pretrained(where, **extra))
        tokenizer = AutoTokenizer.from_pretrained(where, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, dtype), attn_implementation=attention, **extra, **_unpacked(gguf_file)
        )
    except UnsupportedModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot be loaded: {first}; give 'embedded', a local model folder or a hub name"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    return model, tokenizer


def _unpacked(gguf_file: str | None) -> dict[str, Any]:
    """Arguments that make dense weights of a GGUF file: adapters cannot be trained on packed ones."""
    packed = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {"quantization_config": packed(dequantize=True)} if gguf_file and packed else {}


def digest_of(model: PreTrainedModel) -> str:
    """SHA-256 over the names and the values of a model's parameters: what an artifact is bound to."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
