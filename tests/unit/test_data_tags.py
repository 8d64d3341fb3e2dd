"""The four tags: found, refused or added with their embeddings."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from l2a_compress.errors import TokenizerError
from l2a_compress.modeling.tags import TAGS, ensure_tags
from toy_data import bpe_tokenizer, new_bpe, word_tokenizer


def tiny_llama(vocabulary: int, *, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes))


def assert_ordinary(rows: torch.Tensor, old: torch.Tensor) -> None:
    """They lie as far from the mean as old rows do, and apart: equal rows would be one word to the network."""
    usual = (old - old.mean(dim=0)).norm(dim=1)
    assert ((rows - old.mean(dim=0)).norm(dim=1) < 2 * usual.max()).all()
    assert torch.pdist(rows).min() > usual.min()


def test_added_rows_are_the_same_each_time() -> None:
    weights = []
    for _ in range(2):
        tokenizer = new_bpe()
        model = tiny_llama(len(tokenizer), tied=True)
        ensure_tags(tokenizer, model, add=True)
        weights.append(model.get_input_embeddings().weight)
    assert torch.equal(*weights)  # an artifact knows its base model by a digest of these


def test_the_embedded_tokenizer_has_them() -> None:
    tags = ensure_tags(word_tokenizer())
    assert (tags.think, tags.end_think, tags.answer, tags.end_answer, tags.added) == (1, 2, 3, 4, ())


def test_missing_tags_are_refused_and_nothing_is_changed() -> None:
    tokenizer = new_bpe()
    size = len(tokenizer)
    with pytest.raises(TokenizerError, match="<think>, </think>, <answer>, </answer>; pass --add-tags"):
        ensure_tags(tokenizer)
    tokenizer.add_tokens(list(TAGS[:2]))
    with pytest.raises(TokenizerError, match="no single token for <answer>, </answer>;"):
        ensure_tags(tokenizer)
    assert len(tokenizer) == size + 2


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_are_ordinary_and_distinct_and_old_rows_stay(tied: bool) -> None:
    tokenizer = new_bpe()
    size = len(tokenizer)
    model = tiny_llama(size, tied=tied)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    tags = ensure_tags(tokenizer, model, add=True)
    assert tags.added == tuple(range(size, size + 4))
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert layer.weight.shape[0] == size + 4
        torch.testing.assert_close(layer.weight[:size], old, rtol=0, atol=0)
        assert_ordinary(layer.weight[size:], old)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == size + 4
    assert tokenizer("x<think>y")["input_ids"].count(tags.think) == 1
    assert ensure_tags(tokenizer, model, add=True).added == ()  # a second time changes nothing


def test_spare_rows_of_a_padded_vocabulary_are_used() -> None:
    tokenizer = new_bpe()
    size = len(tokenizer)
    model = tiny_llama(size + 64, tied=True)
    old = model.get_input_embeddings().weight.detach().clone()
    ensure_tags(tokenizer, model, add=True)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == size + 64
    rest = torch.cat([old[:size], old[size + 4 :]])
    assert_ordinary(weight[size : size + 4], rest)


def test_a_model_smaller_than_its_tokenizer_is_refused_or_grown() -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_llama(len(tokenizer) - 4, tied=True)
    with pytest.raises(TokenizerError, match=f"model has only {len(tokenizer) - 4} embeddings"):
        ensure_tags(tokenizer, model)
    assert ensure_tags(tokenizer, model, add=True).added == ()
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
