"""The four tags of the think and answer format, each of which must be one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2a_compress.errors import TokenizerError
from l2a_compress.reasoning import Tags

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["TAGS", "Tags", "ensure_tags", "read_tags"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def read_tags(tokenizer: PreTrainedTokenizerBase) -> Tags:
    """The ids of the tags.

    Raises:
        TokenizerError: A tag is not in the vocabulary.
    """
    found = {tag: _token_id(tokenizer, tag) for tag in TAGS}
    ids = [number for number in found.values() if number is not None]
    if len(ids) < len(TAGS):
        raise _missing([tag for tag, number in found.items() if number is None])
    think, end_think, answer, end_answer = ids
    return Tags(think=think, end_think=end_think, answer=answer, end_answer=end_answer)


def ensure_tags(tokenizer: PreTrainedTokenizerBase, model: Any = None, *, add: bool = False) -> Tags:
    """Makes sure that each tag is one token and that the model has an embedding for it.

    Args:
        tokenizer: Changed in place when tags are added.
        model: A Hugging Face causal LM, or ``None`` to look at the tokenizer alone.
        add: Add missing tags as special tokens. New rows of the embedding (and of an untied output layer) are drawn
            around the mean of the old ones, as far from it as those: an untrained token then does not stand out.

    Returns:
        The ids, and which of them are new. With a frozen base the new rows stay as they are, so they must differ: a
        network with equal rows could neither tell the tags apart nor write the right one.

    Raises:
        TokenizerError: A tag is not one token, or the model has no row for it, and ``add`` is false.
    """
    missing = [tag for tag in TAGS if not _is_one_token(tokenizer, tag)]
    if missing and not add:
        raise _missing(missing)
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    tags = read_tags(tokenizer)
    added = tuple(number for tag in missing if (number := _token_id(tokenizer, tag)) is not None)
    if model is not None:
        _ensure_rows(model, len(tokenizer), max(tags.think, tags.end_think, tags.answer, tags.end_answer), added, add)
    return Tags(think=tags.think, end_think=tags.end_think, answer=tags.answer, end_answer=tags.end_answer, added=added)


def _token_id(tokenizer: PreTrainedTokenizerBase, tag: str) -> int | None:
    number = tokenizer.convert_tokens_to_ids(tag)
    return number if isinstance(number, int) and number != tokenizer.unk_token_id else None


def _is_one_token(tokenizer: PreTrainedTokenizerBase, tag: str) -> bool:
    # In the middle of text: a vocabulary entry that ordinary splitting never yields is of no use.
    return _token_id(tokenizer, tag) in tokenizer(f"a{tag}b", add_special_tokens=False)["input_ids"]


def _ensure_rows(model: Any, size: int, highest: int, added: tuple[int, ...], add: bool) -> None:
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows and not add:
        raise TokenizerError(
            f"the tokenizer has the tags (up to id {highest}) but the model has only {rows} embeddings; "
            "pass --add-tags (add=True) to add the rows"
        )
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    new = sorted({*added, *range(rows, size)})
    if not new:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # tied layers are one tensor
            weight[new] = 0
            count = weight.shape[0] - len(new)
            mean = weight.sum(dim=0, dtype=torch.float64) / count
            spread = (
                (torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64) ** 2 / count - mean**2)
                .clamp(min=0)
                .sqrt()
            )
            weight[new] = (mean + spread * _directions(len(new), weight.shape[1]).to(mean.device)).to(weight.dtype)


def _directions(count: int, width: int) -> Tensor:
    """Fixed standard normal rows: a base model with added tags must have the same digest each time it is loaded."""
    import torch

    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _missing(tags: list[str]) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer has no single token for {', '.join(tags)}; pass --add-tags (add=True) to add them as special "
        "tokens, or choose a tokenizer that has all four"
    )
