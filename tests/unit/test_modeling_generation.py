"""Generation: the cache changes nothing, reasoning keeps its cap, and an answer always follows."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import AllocationError
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.generation import Generated, GenerationConfig, confirm, generate
from l2a_compress.modeling.tags import Tags, read_tags
from l2a_compress.training.collate import left_padded
from toy_data import word_tokenizer
from toy_models import FAMILIES, GROUPS, LAYERS, new_gated, new_model, prompts, random_allocations

SHORT = GenerationConfig(max_think_tokens=8, max_answer_tokens=4, tau_threshold=None)


def tags() -> Tags:
    return read_tags(word_tokenizer())


def reference(gated: GatedModel, prompt: list[int], cap: int, allocation: Allocation | None) -> Generated:
    """Greedy generation of one row without a cache, token by token in plain Python."""
    known = tags()
    text, think, answer = list(prompt), [], []
    stopped_by = "cap"

    def next_token(forbidden: int | None = None) -> int:
        with torch.no_grad(), gated.forced(None if allocation is None else [allocation]):
            hidden = gated(torch.tensor([text]), offset_budget(gated)).hidden[:, -1]
        logits = gated.logits(hidden)[0]
        if forbidden is not None:
            logits[forbidden] = -torch.inf
        return int(logits.argmax())

    while True:
        token = next_token()
        if token in (known.end_think, known.answer, known.end_answer):
            stopped_by = "cap" if len(think) >= cap and token != known.end_think else "model"
            break
        if len(think) >= cap:
            break
        think.append(token)
        text.append(token)
    text += [known.end_think, known.answer]
    while len(answer) < SHORT.max_answer_tokens:
        token = next_token(None if answer else known.end_answer)
        if token == known.end_answer:
            break
        answer.append(token)
        text.append(token)
    return Generated(think=think, answer=answer, stopped_by=stopped_by, allocation=allocation)


def offset_budget(gated: GatedModel) -> None:
    """The reference knows no budget at ``<think>``: the tests that use it take a model without token gates."""
    assert not gated.gate_config.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_left_padded_batch_generates_what_each_row_generates_alone(family: str) -> None:
    ids, mask = prompts(6)
    gated = new_gated(family, tokens=False)
    mixed = random_allocations(6, seed=2)
    together = generate(gated, tags(), ids, mask, allocations=mixed, config=SHORT)
    for row, allocation in enumerate(mixed):
        prompt = ids[row, int((mask[row] == 0).sum()) :].tolist()
        assert together[row] == reference(gated, prompt, 8, allocation)
    assert len({tuple(row.think) for row in together}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_in_one_batch_are_as_if_alone(family: str) -> None:
    ids, mask = prompts(6)
    gated = new_gated(family)
    budgets = [Budget(compute=0.3 + 0.1 * row, think_tokens=row + 2) for row in range(6)]
    together = generate(gated, tags(), ids, mask, budgets=budgets, config=SHORT)
    for row, budget in enumerate(budgets):
        start = int((mask[row] == 0).sum())
        alone = generate(
            gated, tags(), ids[row : row + 1, start:], mask[row : row + 1, start:], budgets=[budget], config=SHORT
        )
        assert alone == together[row : row + 1]


@pytest.mark.parametrize("teacher", [False, True])
def test_a_draft_is_confirmed_if_it_is_what_generation_writes(teacher: bool) -> None:
    gated, (ids, mask) = new_gated(), prompts(12)
    set_tau(gated, -1.0)
    allocations, config = random_allocations(12), GenerationConfig(max_think_tokens=12, max_answer_tokens=5)
    budgets = [Budget(compute=0.5, think_tokens=None if row % 3 else 7) for row in range(12)]
    ends = tags()
    common = {"budgets": budgets, "allocations": allocations, "config": config, "teacher": teacher}
    written = generate(gated, ends, ids, mask, **common)  # type: ignore[arg-type]
    drafts = [[*one.think, ends.end_think, ends.answer, *one.answer, ends.end_answer] for one in written]
    known = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    found = confirm(gated, ends, *padded(known, drafts), drafts, **common)  # type: ignore[arg-type]
    assert found == [dataclasses.replace(one, allocation=None) for one in written]
    assert len({one.stopped_by for one in written}) > 1 - teacher
    for draft in drafts:
        draft[len(draft) // 2] += 1 if draft[len(draft) // 2] < 40 else -1
    assert confirm(gated, ends, *padded(known, drafts), drafts, **common) == [None] * 12  # type: ignore[arg-type]


def padded(prompts: list[list[int]], drafts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts with their drafts but for the last token, as ``confirm`` reads them."""
    return left_padded([[*prompt, *draft[:-1]] for prompt, draft in zip(prompts, drafts, strict=True)], 0)


def test_an_allocation_without_the_first_layer_is_refused() -> None:
    ids, mask = prompts(2)
    given = [Allocation.dense(LAYERS, GROUPS), Allocation.of_layers([1, 2, 4, 5], LAYERS, GROUPS)]
    with pytest.raises(AllocationError, match="skips layer 0"):  # its cache would not know how long the text is
        generate(new_gated(), tags(), ids, mask, allocations=given, config=SHORT)


def test_a_sliding_window_shorter_than_the_text() -> None:
    ids, mask = prompts(4, 12)
    gated = new_gated(model=new_model("mistral", sliding_window=5), tokens=False)
    mixed = random_allocations(4, seed=3)
    found = generate(gated, tags(), ids, mask, allocations=mixed, config=SHORT)
    for row, allocation in enumerate(mixed):
        prompt = ids[row, int((mask[row] == 0).sum()) :].tolist()
        assert found[row] == reference(gated, prompt, 8, allocation)


def test_the_teacher_generates_as_the_untouched_model() -> None:
    ids, mask = prompts(4)
    plain = new_gated(rank=0, trained=False, tokens=False)
    expected = generate(plain, tags(), ids, mask, allocations=[Allocation.dense(LAYERS, GROUPS)] * 4, config=SHORT)
    found = generate(new_gated(), tags(), ids, mask, config=SHORT, teacher=True)
    assert [(row.think, row.answer) for row in found] == [(row.think, row.answer) for row in expected]


@pytest.mark.parametrize("opening", [[], [20, 21, 22]])
def test_the_answer_comes_and_the_cap_holds_in_1000_generations(opening: list[int]) -> None:
    draw = random.Random(len(opening))
    gated = new_gated(seed=3)
    count, stops = 0, set()
    for batch in range(5):
        ids, mask = prompts(200, 6, seed=batch)
        caps = [draw.randint(0, 20) for _ in range(200)]
        budgets = [Budget(compute=draw.uniform(0.3, 1), think_tokens=cap) for cap in caps]
        config = GenerationConfig(max_think_tokens=15, max_answer_tokens=3, temperature=1.0, seed=batch)
        openings = [opening] * 200 if opening else None
        found = generate(gated, tags(), ids, mask, budgets=budgets, config=config, openings=openings)
        for row, cap, budget in zip(found, caps, budgets, strict=True):
            assert len(row.think) <= min(cap, 15)
            assert row.think[: len(opening)] == opening[: len(row.think)]
            assert 1 <= len(row.answer) <= 3
            assert not {*row.think} & {tags().end_think, tags().answer, tags().end_answer}
            assert tags().end_answer not in row.answer
            assert row.allocation is not None
            assert gated.cost.fits(row.allocation, budget)
            stops.add(row.stopped_by)
            count += 1
    assert count == 1000
    assert {"model", "cap"} <= stops


def test_a_row_whose_cap_cuts_its_opening_leaves_the_others_alone() -> None:
    ids, mask = prompts(3, padded=False)
    gated = new_gated()
    free = [Budget(compute=0.7)] * 3
    openings = [[20], [20], [20]]
    expected = generate(gated, tags(), ids, mask, budgets=free, config=SHORT, openings=openings)
    capped = [free[0], Budget(compute=0.7, think_tokens=0), free[2]]
    found = generate(gated, tags(), ids, mask, budgets=capped, config=SHORT, openings=openings)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    without = generate(gated, tags(), ids[1:2], mask[1:2], budgets=capped[1:2], config=SHORT)
    assert found[1] == without[0]


def test_caps_of_allocations_hold_as_well() -> None:
    ids, mask = prompts(4)
    caps = [0, 1, 3, None]
    given = [Allocation.dense(LAYERS, GROUPS, think_tokens=cap) for cap in caps]
    found = generate(new_gated(), tags(), ids, mask, allocations=given, config=SHORT)
    assert all(len(row.think) <= (8 if cap is None else cap) for row, cap in zip(found, caps, strict=True))
    assert found[0].think == []


def set_tau(gated: GatedModel, logit: float) -> None:
    """A transition gate that always says the same."""
    with torch.no_grad():
        gated.transition.outer.weight.zero_()
        gated.transition.outer.bias.fill_(logit)


@pytest.mark.parametrize(
    ("logit", "threshold", "stops"), [(3.0, 0.9, True), (3.0, 0.97, False), (-3.0, 0.9, False), (3.0, None, False)]
)
def test_reasoning_stops_when_tau_says_so(logit: float, threshold: float | None, stops: bool) -> None:
    ids, mask = prompts(8)
    gated = new_gated()
    set_tau(gated, logit)
    config = GenerationConfig(max_think_tokens=5, max_answer_tokens=2, tau_threshold=threshold)
    found = generate(gated, tags(), ids, mask, budgets=[Budget()] * 8, config=config)
    assert all(row.answer for row in found)
    if stops:
        assert {(row.stopped_by, len(row.think)) for row in found} <= {("tau", 0), ("model", 0)}
        assert "tau" in {row.stopped_by for row in found}
    else:
        assert "tau" not in {row.stopped_by for row in found}
        assert max(len(row.think) for row in found) == 5


def sampled(gated: GatedModel, ids: Tensor, mask: Tensor, **settings: Any) -> list[Generated]:
    config = GenerationConfig(max_think_tokens=8, max_answer_tokens=4, temperature=1.0, **settings)
    return generate(gated, tags(), ids, mask, budgets=[Budget(compute=0.7)] * len(ids), config=config)


def test_sampling_repeats_for_a_seed_and_does_not_touch_the_global_one() -> None:
    ids, mask = prompts(4)
    gated = new_gated()
    state = torch.random.get_rng_state()
    first = sampled(gated, ids, mask, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sampled(gated, ids, mask, seed=5) == first
    assert sampled(gated, ids, mask, seed=6) != first


def test_generating_leaves_the_model_dense_and_its_mode_as_it_was() -> None:
    ids, mask = prompts(2)
    gated = new_gated()
    gated.train()
    with torch.no_grad():
        before = gated(ids, mask).hidden
    generate(gated, tags(), ids, mask, budgets=[Budget(compute=0.4)] * 2, config=SHORT)
    assert gated.training
    with torch.no_grad():
        assert torch.equal(gated(ids, mask).hidden, before)
    assert gated.state.offset is None


def test_the_network_is_told_its_budget_at_think() -> None:
    ids, mask = prompts(8, padded=False)  # one prompt alone may be answered the same by chance
    gated = new_gated(summary="none")
    given = [Allocation.dense(LAYERS, GROUPS)] * 8
    texts = []
    for compute in (1.0, 0.5):
        budgets = [Budget(compute=compute)] * 8
        found = generate(gated, tags(), ids, mask, budgets=budgets, allocations=given, config=SHORT)
        texts.append([(text.think, text.answer) for text in found])
    assert texts[0] != texts[1]
