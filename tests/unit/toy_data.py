"""Small tokenizers, rows and data sets that the data tests share."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from l2a_compress.embedded import pretrain
from l2a_compress.modeling.tags import ensure_tags

REPOSITORY = Path(__file__).parents[2]
TINY_GSM8K = REPOSITORY / "tests" / "data" / "gsm8k_tiny.jsonl"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded task's own tokenizer."""
    return pretrain.build_tokenizer()


def new_bpe(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the spot, without the four tags."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_GSM8K.read_text(encoding="utf-8").splitlines(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """The same with the tags added."""
    tokenizer = new_bpe()
    ensure_tags(tokenizer, add=True)
    return tokenizer


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gsm8k_file() -> Path:
    """The real GSM8K training problems; skips the test with a reason where they are absent."""
    folder = os.environ.get("L2A_DATA")
    path = Path(folder or "") / "gsm8k" / "train.jsonl"
    if not folder or not path.exists():
        absent = f"{path} is absent" if folder else "L2A_DATA is not set"
        pytest.skip(f"{absent}: set L2A_DATA to a folder with gsm8k/train.jsonl (see docs/data.md)")
    return path
