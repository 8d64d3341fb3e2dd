"""The embedded default: a small reasoning model, its tokenizer and its task, usable without any download.

``MODEL_DIR`` is an ordinary Hugging Face model folder (Qwen3 architecture); how it was made is written in
``MODEL_DIR/training_log.jsonl`` and can be repeated with ``python -m l2a_compress.embedded.pretrain``.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR"]
