"""The demand head is fitted to what the finished network does at each budget, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from l2a_compress.budget import Budget
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.calibration import calibration_prompts, demand_batches
from l2a_compress.training.demand import failures, fit_demand
from l2a_compress.training.run import train
from toy_data import word_tokenizer
from toy_models import new_gated, new_model, save_base, tiny_recipe, trainable

LEVELS = (0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def gated() -> GatedModel:
    """Wide adapters, so that it loses much of what the dense model gets right."""
    return new_gated(model=new_model(vocab_size=len(word_tokenizer())))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("none"), evaluation={"demand_rows": 48})
    return demand_batches(recipe, word_tokenizer(), batch_size=16)


def test_the_head_is_fitted_on_other_prompts_than_prices_where_there_are_enough(tmp_path: Path) -> None:
    def prompts(available: int | None) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        sizes = {"calibration": 16, "demand_rows": 24}
        recipe = tiny_recipe(tmp_path, evaluation=sizes, data={"subset": "easy", "limit": available})
        tokenizer = word_tokenizer()
        priced = [
            tuple(row[kept.bool()].tolist())
            for ids, mask in calibration_prompts(recipe, tokenizer, 16)
            for row, kept in zip(ids, mask, strict=True)
        ]
        fitted = [
            tuple(row[: int(length)].tolist())
            for batch in demand_batches(recipe, tokenizer)
            for row, length in zip(batch["input_ids"], batch["prompt_length"], strict=True)
        ]
        assert (len(priced), len(fitted)) == (16, 24)
        return set(priced), set(fitted)

    apart = prompts(None)
    assert not apart[0] & apart[1]
    shared = prompts(30)
    assert len(shared[0] & shared[1]) == 10


def test_a_row_fails_where_it_loses_a_label_that_the_dense_model_gets_right(
    gated: GatedModel, batches: list[dict[str, torch.Tensor]]
) -> None:
    for batch in batches:  # an untrained network gets hardly any right: what it says itself is the text
        with gated.teacher(), torch.no_grad():
            said = gated.logits(gated(batch["input_ids"], batch["attention_mask"]).hidden).argmax(-1)
        known = batch["labels"][:, 1:] != -100
        batch["labels"][:, 1:][known] = said[:, :-1][known]
    summaries, failed = failures(gated, batches, LEVELS)
    assert summaries.shape == (48, len(LEVELS), 2 * gated.shape.hidden_size)
    assert failed.shape == (48, len(LEVELS))
    assert set(failed.unique().tolist()) <= {0.0, 1.0}
    batch, level = batches[0], 1
    with torch.no_grad():
        allocations = gated.allocate(
            batch["input_ids"], batch["prompt_mask"], [Budget(compute=LEVELS[level])] * 16, contract="cap"
        )
        for row in range(16):
            mask = batch["labels"][row, 1:] != -100
            with gated.forced([allocations[row]]):
                gated.state.offset = gated.think_offset(batch["input_ids"][row : row + 1], torch.tensor([[0.75, 1.0]]))
                hidden = gated(batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]).hidden
            found = gated.logits(hidden).argmax(-1)[0, :-1]
            assert bool(failed[row, level]) == bool((found != batch["labels"][row, 1:])[mask].any())


def test_a_network_that_is_the_dense_one_never_fails(batches: list[dict[str, torch.Tensor]]) -> None:
    plain = new_gated(model=new_model(vocab_size=len(word_tokenizer())), trained=False)
    assert not failures(plain, batches, [1.0])[1].any()


def test_fitting_changes_the_demand_head_alone_and_for_the_better(
    gated: GatedModel, batches: list[dict[str, torch.Tensor]]
) -> None:
    demand = gated.allocator.demand
    assert demand is not None
    summaries, failed = failures(gated, batches, LEVELS)

    def loss() -> float:
        """Over every budget that was told and every one that is asked about."""
        count = len(LEVELS)
        asked = torch.tensor([[level, 1.0] for level in LEVELS])
        logits = demand(summaries[:, :, None].expand(-1, -1, count, -1), asked.expand(len(summaries), count, -1, -1))
        return float(functional.binary_cross_entropy_with_logits(logits, failed[:, None].expand_as(logits)).detach())

    before, values = loss(), {name: value.clone() for name, value in trainable(gated).items()}
    fit_demand(gated, batches, seed=0)
    assert loss() < 0.7 * before
    changed = {name for name, value in trainable(gated).items() if not torch.equal(value, values[name])}
    assert changed
    assert all(".demand." in name for name in changed)
    assert all(value.grad is None for value in demand.parameters())


def test_a_run_ends_with_the_fit_where_it_is_asked_for(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    gates = {}
    for rows in (0, 16):
        recipe = tiny_recipe(base, optim={"steps": 1}, evaluation={"calibration": 16, "demand_rows": rows})
        artifact = train(recipe, tmp_path / str(rows), quiet=True)
        gates[rows] = safetensors.torch.load_file(artifact / "gates.safetensors")
        assert json.loads((artifact / "artifact.json").read_text())["training"]["evaluation"]["demand_rows"] == rows
    differ = {name for name, value in gates[0].items() if not torch.equal(value, gates[16][name])}
    assert differ
    assert all(".demand." in name for name in differ)
