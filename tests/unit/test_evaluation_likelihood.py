"""Teacher-forced figures against a direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.evaluation.likelihood import measure_likelihoods
from l2a_compress.evaluation.points import Bench, allocate, dense_run, point_of
from l2a_compress.evaluation.prompts import held_out
from l2a_compress.evaluation.values import Run
from l2a_compress.modeling.generation import GenerationConfig
from l2a_compress.training.data_config import DataConfig
from toy_data import bpe_tokenizer, word_tokenizer, write_jsonl
from toy_evaluation import new_bench
from toy_models import new_gated, new_model, random_allocations


@pytest.fixture(scope="module")
def bench() -> Bench:
    return new_bench(metric="nll")


def mixed(bench: Bench) -> Run:
    allocations = tuple(random_allocations(len(bench.problems)))
    return Run(name="l2a", budget=Budget(compute=0.8), contract="cap", allocations=allocations)


@torch.no_grad()
def test_the_dense_run_is_the_plain_model(bench: Bench) -> None:
    (measured,) = measure_likelihoods(bench, [dense_run(bench)])
    plain = new_model()
    for problem, row in zip(bench.problems, measured.rows, strict=True):
        assert problem.encoded is not None
        ids, labels = (torch.tensor([problem.encoded[key]]) for key in ("input_ids", "labels"))
        logits = plain(ids).logits[0, :-1]
        expected = functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        assert row.nll == pytest.approx(float(expected), rel=1e-4)
        assert row.trials == row.hits == int((labels[0, 1:] != -100).sum())
        assert row.kl == pytest.approx(0.0, abs=1e-4)


@torch.no_grad()
def test_a_gated_run_row_by_row(bench: Bench) -> None:
    run, gated = mixed(bench), bench.gated
    (measured,) = measure_likelihoods(bench, [run])
    for problem, row in zip(bench.problems, measured.rows, strict=True):
        assert problem.encoded is not None
        ids = torch.tensor([problem.encoded["input_ids"]])
        mask = torch.tensor([problem.encoded["labels"][1:]]) != -100
        with gated.teacher():
            dense = gated.logits(gated(ids).hidden)[:, :-1][mask].log_softmax(-1)
        with gated.forced([row.allocation], skip=False):
            told = torch.tensor([[0.8, 1.0]])
            gated.state.offset = (ids == gated.think_id)[..., None] * gated.transition.think_offset(told)[:, None]
            found = gated.logits(gated(ids).hidden)[:, :-1][mask].log_softmax(-1)
        kl = functional.kl_div(found, dense, log_target=True, reduction="sum")
        nll = functional.nll_loss(found, ids[:, 1:][mask], reduction="sum")
        assert (row.kl, row.nll) == pytest.approx((float(kl), float(nll)), rel=1e-3)
        assert row.hits == int((found.argmax(-1) == dense.argmax(-1)).sum())
        assert row.kl > 0.01


def test_the_point_has_the_means_over_tokens(bench: Bench) -> None:
    runs = [mixed(bench), allocate(bench, Budget(compute=0.6), "cap")]
    told: list[int] = []
    measured = measure_likelihoods(bench, runs, lambda label, count: told.append(count))
    assert sum(told) == 2 * len(bench.problems)
    found = point_of(runs[0], measured[0], bench.gated.cost, metric="nll", seed=0)
    rows = measured[0].rows
    tokens = sum(row.trials for row in rows)
    assert found.nll == pytest.approx(sum(row.nll for row in rows) / tokens)
    assert found.perplexity == pytest.approx(math.exp(found.nll or 0))
    assert found.kl == pytest.approx(sum(row.kl for row in rows) / tokens)
    assert found.accuracy == found.agreement == sum(row.hits for row in rows) / tokens
    assert found.nll_by_problem == pytest.approx([row.nll / row.trials for row in rows], abs=1e-5)
    assert found.agreement_by_problem == pytest.approx([row.hits / row.trials for row in rows], abs=1e-5)
    assert (found.think_tokens, found.empty_answers, found.think_histogram) == (None, None, ())


def test_plain_text_is_measured_and_has_no_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": f"Number {n} is followed by {n + 1}."} for n in range(6)])
    data = DataConfig(source=str(path), kind="text", heldout_share=1.0, calibration_share=0.0)
    tokenizer = bpe_tokenizer()
    gated = new_gated(model=new_model(vocab_size=len(tokenizer)))
    gated.think_id = None
    problems = held_out(data, tokenizer, metric="nll", count=100, seed=0)
    assert len(problems) == 6
    text = Bench(gated=gated, tokenizer=tokenizer, problems=problems, generation=GenerationConfig(), batch_size=4)
    run = allocate(text, Budget(compute=0.7), "cap")
    dense, found = measure_likelihoods(text, [dense_run(text), run])
    assert all(row.hits == row.trials for row in dense.rows)
    assert sum(row.nll for row in found.rows) != pytest.approx(sum(row.nll for row in dense.rows), rel=1e-3)
    with pytest.raises(ConfigError, match="use --metric nll"):
        held_out(data, word_tokenizer(), metric="accuracy", count=2, seed=0)
