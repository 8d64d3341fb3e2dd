"""Opens a bundle's dense graph with optimum-onnx, in its own virtual environment (it pins another Transformers).

    python -m venv optimum-env
    optimum-env/bin/pip install 'optimum-onnx[onnxruntime]'
    optimum-env/bin/python benchmarks/open_with_optimum.py BUNDLE

Greedy tokens of ORTModelForCausalLM must be those of the same graph in plain onnxruntime. optimum-onnx 0.1.0 takes a
head's size to be hidden_size / num_attention_heads: a model of another size (the embedded one, Qwen3) it cannot run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

TOKENS = 48


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim", size) not in (size, None):
        raise SystemExit(
            f"head_dim is {config['head_dim']}, which optimum-onnx takes to be {size}: it cannot run this model"
        )
    prompt = [5 + 7 * number for number in range(12)]
    model = ORTModelForCausalLM.from_pretrained(folder, file_name="b1.onnx", use_io_binding=False)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    expected = plain(folder / "b1.onnx", prompt, end=model.generation_config.eos_token_id)
    if found != expected:
        raise SystemExit(f"tokens differ:\n{found}\n{expected}")
    print(f"{len(found)} greedy tokens of ORTModelForCausalLM equal those of plain onnxruntime")


def plain(path: Path, prompt: list[int], end: int | list[int] | None) -> list[int]:
    """Greedy tokens with a cache that grows; like ``min_new_tokens``, the end is never chosen."""
    session = onnxruntime.InferenceSession(path)
    past = {
        item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), dtype=np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values")
    }
    names, tokens, fed = [item.name for item in session.get_outputs()], list(prompt), list(prompt)
    for _ in range(TOKENS):
        feeds = {"input_ids": np.array([fed]), "attention_mask": np.ones((1, len(tokens)), dtype=np.int64)}
        values = dict(zip(names, session.run(None, feeds | past), strict=True))
        logits = values["logits"][0, -1]
        logits[np.array([] if end is None else end, dtype=np.int64)] = -np.inf
        fed = [int(logits.argmax())]
        tokens += fed
        past = {name: values[name.replace("past_key_values", "present")] for name in past}
    return tokens[len(prompt) :]


if __name__ == "__main__":
    main()
