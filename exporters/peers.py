"""What lets other runtimes open the dense graph: a Hugging Face ``config.json`` and a ``genai_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from l2a_compress.bundle import GraphEntry
from l2a_compress.cost import ModelShape
from l2a_compress.files import write_atomic


def write_configs(
    folder: Path,
    entry: GraphEntry,
    *,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    shape: ModelShape,
    positions: int,
    end: int,
) -> None:
    """Writes both files for a graph whose layers and groups are all there.

    Args:
        folder: the bundle's.
        entry: the dense graph.
        config: of the base model.
        tokenizer: whose padding id is told.
        shape: sizes of the decoder.
        positions: most tokens of a sequence.
        end: id of ``</answer>``, where generation ends.
    """
    write_atomic(folder / "config.json", config.to_json_string())
    ends = [end, *([tokenizer.eos_token_id] if tokenizer.eos_token_id not in (None, end) else [])]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    decoder: dict[str, Any] = {
        "filename": entry.file,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "num_hidden_layers": shape.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    data = {
        "model": {
            "type": config.model_type,
            "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
            "eos_token_id": ends,
            "pad_token_id": padding,
            "vocab_size": shape.vocab_size,
            "context_length": positions,
            "decoder": decoder,
        },
        "search": {"max_length": positions, "past_present_share_buffer": True, "do_sample": False},
    }
    write_atomic(folder / "genai_config.json", json.dumps(data, indent=2) + "\n")
