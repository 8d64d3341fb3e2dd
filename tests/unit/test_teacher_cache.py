"""The cached teacher says what the online teacher says, is used again, and is rebuilt where it cannot be trusted."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from l2a_compress.errors import DataError
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.training import objective, teacher
from l2a_compress.training.draws import DrawConfig
from l2a_compress.training.examples import Example
from l2a_compress.training.objective import ObjectiveConfig, Supervised
from l2a_compress.training.recipe import OptimConfig
from l2a_compress.training.samples import SampleCollator, Samples
from l2a_compress.training.step import TrainingStep
from l2a_compress.training.teacher import TeacherCache, key_of
from toy_data import bpe_tokenizer

COLLATE = SampleCollator(bpe_tokenizer())


def make_samples(count: int = 8, seed: int = 0) -> Samples:
    """``count`` samples of 3 problems, so that sequences come again."""
    examples = [
        Example(
            prompt=f"{number} and {number}?",
            traces={"long": f"{number} + {number} = {2 * number}", "short": "sum"},
            answer=str(2 * number),
            kind="reasoning",
            meta={},
        )
        for number in (3, 14, 159)
    ]
    sizes = {"count": count, "seed": seed, "max_length": lambda _: 64, "think_reference": 16}
    return Samples(examples, bpe_tokenizer(), DrawConfig(), **sizes)


def make_gated(seed: int = 0) -> GatedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=len(bpe_tokenizer()), num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.normal_(std=0.5)  # a teacher with an opinion
    gated = GatedModel.wrap(model, GateConfig(stem_layers=1), AdapterConfig(rank=2))
    for value in gated.adapter_parameters.values():
        value.data.normal_(std=0.3)
    return gated


def optim(top_k: int = 8, **other: object) -> OptimConfig:
    return OptimConfig(teacher="cached", teacher_top_k=top_k, **other)  # type: ignore[arg-type]


def test_with_all_words_it_is_the_online_teacher(tmp_path: Path) -> None:
    gated, samples = make_gated(), make_samples()
    online = COLLATE([samples[index] for index in range(8)])["batch"]
    samples.teacher = TeacherCache.build(gated, samples, COLLATE, optim(10_000), tmp_path)
    cached = COLLATE([samples[index] for index in range(8)])["batch"]
    step = TrainingStep(gated, ObjectiveConfig(), seed=0).eval()
    expected, found = step(online), step(cached)
    assert "teacher_values" in cached
    assert "teacher_values" not in online
    assert float(expected["kl"].detach()) > 0.05
    torch.testing.assert_close(found["kl"], expected["kl"], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found["ce"], expected["ce"])


def test_the_lumped_rest_bounds_the_divergence_from_below(tmp_path: Path) -> None:
    gated, samples = make_gated(), make_samples()
    cache = TeacherCache.build(gated, samples, COLLATE, optim(4), tmp_path)
    encoded = samples[0]
    where = Supervised.of(torch.tensor([encoded["labels"]]))
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad(), gated.teacher():
        dense = gated.logits(gated(ids).hidden[where.mask]).log_softmax(-1)
    values, indices = (part[None][where.mask] for part in cache(encoded))  # type: ignore[arg-type]
    assert torch.equal(indices.long(), dense.topk(4).indices)
    torch.testing.assert_close(values, dense.topk(4).values, atol=2e-3, rtol=1e-3)
    student = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    lumped = objective.kl_top_k(student, values, indices.long(), where)
    assert 0 < lumped < objective.kl_divergence(student, dense, where)
    assert objective.kl_top_k(dense, values, indices.long(), where).abs() < 1e-3


def test_rows_stand_where_the_next_token_is_labelled(tmp_path: Path) -> None:
    samples = make_samples()
    cache = TeacherCache.build(make_gated(), samples, COLLATE, optim(), tmp_path)
    encoded = samples[1]
    values, indices = cache(encoded)  # type: ignore[arg-type]
    mask = Supervised.of(torch.tensor([encoded["labels"]])).mask[0]
    assert values.shape == indices.shape == (len(encoded["input_ids"]), 8)
    assert torch.equal((values != 0).any(-1), mask)


def test_a_sequence_is_computed_once_and_files_are_small(tmp_path: Path) -> None:
    samples = make_samples(40)
    distinct = {key_of(samples[index]) for index in range(40)}  # type: ignore[arg-type]
    cache = TeacherCache.build(make_gated(), samples, COLLATE, optim(), tmp_path)
    assert len(cache) == len(distinct) < 40
    (shard,) = tmp_path.glob("shard-*")
    assert np.load(shard / "values.npy").dtype == np.float16
    assert np.load(shard / "indices.npy").dtype == np.uint16
    about = json.loads((tmp_path / "teacher.json").read_text())
    assert (about["top_k"], about["count"], about["samples"], about["seed"]) == (8, len(distinct), 40, 0)


def test_a_resumed_run_computes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, samples = make_gated(), make_samples(40)
    monkeypatch.setattr(teacher, "_SHARD_TOKENS", 60)
    whole = TeacherCache.build(gated, samples, COLLATE, optim(), tmp_path / "whole")
    shards = sorted((tmp_path / "whole").glob("shard-*"))
    assert len(shards) > 1
    done: list[int] = []
    compute = teacher._compute
    monkeypatch.setattr(teacher, "_compute", lambda *args: (done.append(len(args[3])), compute(*args))[1])
    TeacherCache.build(gated, samples, COLLATE, optim(), tmp_path / "whole")
    assert done == []  # nothing to do
    lost = len(np.load(shards[0] / "keys.npy"))
    (shards[0] / "keys.npy").unlink()  # as if killed before it was written
    again = TeacherCache.build(gated, samples, COLLATE, optim(), tmp_path / "whole")
    assert sum(done) == lost
    for index in range(40):
        for one, other in zip(whole(samples[index]), again(samples[index]), strict=True):  # type: ignore[arg-type]
            assert torch.equal(one, other)


@pytest.mark.parametrize("harm", ["values.npy", "shard.json", "other base", "other k"])
def test_what_cannot_be_trusted_is_built_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples()
    TeacherCache.build(make_gated(1 if harm == "other base" else 0), samples, COLLATE, optim(), tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    settings = optim(4) if harm == "other k" else optim()
    if (shard / harm).is_file():
        data = bytearray((shard / harm).read_bytes())
        data[-9] ^= 0x55
        (shard / harm).write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        found = TeacherCache.build(make_gated(), samples, COLLATE, settings, tmp_path)
    assert "is computed again" in caplog.text
    right = TeacherCache.build(make_gated(), samples, COLLATE, settings, tmp_path / "right")
    for one, other in zip(found(samples[0]), right(samples[0]), strict=True):  # type: ignore[arg-type]
        assert torch.equal(one, other)


def test_an_unknown_sequence_is_one_clear_error(tmp_path: Path) -> None:
    cache = TeacherCache.build(make_gated(), make_samples(), COLLATE, optim(), tmp_path)
    with pytest.raises(DataError, match="does not hold a sequence of 3 tokens"):
        cache({"input_ids": [1, 2, 3], "labels": [1, 2, 3]})  # type: ignore[typeddict-item]


def test_the_prompt_share_of_a_batch_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, samples = make_gated(), make_samples()
    whole = TeacherCache.build(gated, samples, COLLATE, optim(), tmp_path / "a")
    monkeypatch.setattr(teacher, "_BATCH_TOKENS", 1)  # one sequence at a time, no padding
    monkeypatch.setattr(teacher, "_LOGIT_NUMBERS", 1)  # one position at a time
    alone = TeacherCache.build(gated, samples, COLLATE, dataclasses.replace(optim()), tmp_path / "b")
    for index in range(8):
        one, other = whole(samples[index]), alone(samples[index])  # type: ignore[arg-type]
        torch.testing.assert_close(one[0], other[0], atol=2e-3, rtol=1e-3)
