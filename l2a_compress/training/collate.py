"""Encoded examples to one right-padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from l2a_compress.errors import ConfigError, TokenizerError
from l2a_compress.training.encode import IGNORE
from l2a_compress.training.examples import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator", "left_padded"]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads encoded examples on the right.

    A batch has these int64 tensors, of B examples by T tokens: ``input_ids`` [B, T]; ``attention_mask`` [B, T];
    ``labels`` [B, T], -100 where there is no loss; ``prompt_mask`` [B, T], 1 on the tokens that the allocator may pool;
    ``think_mask`` [B, T], 1 on reasoning tokens without the tags; and ``prompt_length`` [B].

    Attributes:
        pad_token_id: What fills up; never seen by the loss or by attention.
        pad_to_multiple_of: Rounds T up, for kernels that like round shapes.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of must be at least 1, found {self.pad_to_multiple_of}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, pad_to_multiple_of: int = 1) -> Collator:
        """A collator with the tokenizer's padding token, or with its end token where it has none.

        Raises:
            TokenizerError: The tokenizer has neither.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise TokenizerError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
        return cls(pad_token_id=int(pad), pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Pads ``examples``, at least one, to the longest of them."""
        longest = max(len(example["input_ids"]) for example in examples)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        sizes = torch.tensor([[len(example["input_ids"])] for example in examples])
        prompt = torch.tensor([[example["prompt_length"]] for example in examples])
        start = torch.tensor([[example["think_start"]] for example in examples])
        end = torch.tensor([[example["think_end"]] for example in examples])
        places = torch.arange(width)[None, :]
        return {
            "input_ids": _column(examples, "input_ids", self.pad_token_id, width),
            "attention_mask": (places < sizes).long(),
            "labels": _column(examples, "labels", IGNORE, width),
            "prompt_mask": (places < prompt).long(),
            "think_mask": ((places >= start) & (places < end)).long(),
            "prompt_length": prompt[:, 0],
        }


def _column(examples: Sequence[Encoded], key: str, fill: int, width: int) -> torch.Tensor:
    column = torch.full((len(examples), width), fill, dtype=torch.long)
    for row, example in enumerate(examples):
        values: list[int] = example[key]  # type: ignore[literal-required]
        column[row, : len(values)] = torch.tensor(values, dtype=torch.long)
    return column


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)`` for generation, both [rows, longest], the real tokens at the end."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
