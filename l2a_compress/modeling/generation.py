"""Greedy or sampled generation of `<think> ... </think><answer> ... </answer>` under budgets.

The runtime keeps two promises that the network alone does not: reasoning ends at the think cap (or when the
transition gate says so), and an answer always follows it.

    prompt -> prefill (stem, gates, allocation) -> think tokens -> forced </think><answer> -> answer tokens -> end
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import AllocationError
from l2a_compress.limits import Contract
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.reasoning import Reasoning, Tags


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Limits of a generation.

    Attributes:
        max_think_tokens: hard cap for every row; a budget's or allocation's own cap applies besides it.
        max_answer_tokens: tokens between ``<answer>`` and ``</answer>``.
        tau_threshold: reasoning stops once tau exceeds it; None does not ask the transition gate.
        temperature: 0 is greedy.
        seed: of the sampling.
    """

    max_think_tokens: int = 160
    max_answer_tokens: int = 16
    tau_threshold: float | None = 0.9
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One row's output: think and answer token ids without tags, why thinking ended, and what ran."""

    think: list[int]
    answer: list[int]
    stopped_by: str  # "model", "cap" or "tau"
    allocation: Allocation | None


@torch.no_grad()
def generate(
    gated: GatedModel,
    tags: Tags,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    budgets: Sequence[Budget] | None = None,
    allocations: Sequence[Allocation] | None = None,
    contract: Contract = "cap",
    config: GenerationConfig | None = None,
    openings: list[list[int]] | None = None,
    teacher: bool = False,
) -> list[Generated]:
    """Generates one output per row.

    Args:
        gated: the model; it is left dense.
        tags: ids of the tags.
        input_ids: [batch, length], left-padded prompts that end in ``<think>``.
        attention_mask: [batch, length].
        budgets: one per row: the gates allocate. Without gates' say give ``allocations``.
        allocations: one per row, run as given (a baseline, or a decision made before); the budgets, if given as well,
            are then only what the network is told at ``<think>``.
        contract: under which the gates allocate.
        config: limits.
        openings: think tokens each row starts with (a style word, say), equally many; they count as think tokens, and a
            row's cap cuts them.
        teacher: run the frozen model, without adapters and gates: dense, or with ``allocations`` as a static baseline.

    Raises:
        AllocationError: an allocation skips layer 0, whose cache tells how long the text is.
        BudgetError: a budget the model cannot keep to.
    """
    config = config or GenerationConfig()
    count = input_ids.shape[0]
    if any(not allocation.groups[0] for allocation in allocations or ()):
        raise AllocationError("an allocation skips layer 0, which always runs in generation; keep it")
    openings = openings or [[] for _ in range(count)]
    assert len({len(ids) for ids in openings}) == 1, "openings must be of one length"
    rows = [
        Reasoning(tags, cap=cap, max_answer=config.max_answer_tokens, opening=opening)
        for cap, opening in zip(_caps(budgets, allocations, config, count), openings, strict=True)
    ]
    was_training = gated.training
    gated.eval()
    try:
        if teacher:
            with gated.teacher(), gated.forced(allocations):
                _decode(gated, rows, openings, input_ids, attention_mask, None, config)
            decided: Sequence[Allocation | None] = allocations or [None] * count
        else:
            decided = _allocate(gated, input_ids, attention_mask, budgets, allocations, contract)
            told = budgets or [Budget()] * count
            run = [item for item in decided if item is not None]
            with gated.forced(run or None):
                _decode(gated, rows, openings, input_ids, attention_mask, told, config)
    finally:
        gated.train(was_training)
    return [
        Generated(think=row.think, answer=row.answer, stopped_by=row.stopped_by, allocation=allocation)
        for row, allocation in zip(rows, decided, strict=True)
    ]


@torch.no_grad()
def confirm(
    gated: GatedModel,
    tags: Tags,
    input_ids: Tensor,
    attention_mask: Tensor,
    drafts: Sequence[Sequence[int]],
    *,
    budgets: Sequence[Budget],
    allocations: Sequence[Allocation],
    config: GenerationConfig,
    opened: int = 0,
    teacher: bool = False,
) -> list[Generated | None]:
    """What greedy generation gives to the rows whose draft it is, in one forward; None for the others.

    Each row's draft is read after its prompt, and goes through the same steps as a generation: what the model proposes
    at each place must lead to the token that the draft has there. So a confirmed row is what :func:`generate` would
    have written, at the cost of reading it.

    Args:
        gated: the model; it is left dense.
        tags: ids of the tags.
        input_ids: [batch, length], left-padded: prompts that end in ``<think>``, each with its draft but for its end.
        attention_mask: [batch, length].
        drafts: token ids that may follow the prompts, up to and with ``</answer>``.
        budgets: as of :func:`generate`.
        allocations: one per row.
        config: limits; its temperature must be 0.
        opened: how many of a draft's first tokens are an opening that is given, not proposed.
        teacher: as of :func:`generate`.
    """
    rows = [
        Reasoning(tags, cap=cap, max_answer=config.max_answer_tokens, opening=draft[:opened])
        for cap, draft in zip(_caps(budgets, allocations, config, len(drafts)), drafts, strict=True)
    ]
    features = batch_budgets(budgets, gated.cost, gated.gate_config).to(input_ids.device).features
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    tokens = gated.gate_config.tokens and not teacher
    with gated.teacher() if teacher else nullcontext(), gated.forced(allocations):
        if tokens:
            gated.state.offset = gated.think_offset(input_ids, features)
        hidden = gated(input_ids, attention_mask, position_ids=positions).hidden
        hidden = hidden[:, -max(map(len, drafts)) :]
        logits = gated.logits(hidden).float()
        stop = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        if tokens and config.tau_threshold is not None:
            stop = torch.sigmoid(gated.transition(hidden, features)) > config.tau_threshold
    best = logits.topk(2).indices.tolist()
    return [
        _confirmed(row, draft[opened:], best[at][-len(draft) + opened :], stop[at, -len(draft) + opened :].tolist())
        for at, (row, draft) in enumerate(zip(rows, drafts, strict=True))
    ]


def _confirmed(row: Reasoning, draft: Sequence[int], best: list[list[int]], stop: list[bool]) -> Generated | None:
    for token, (first, second), end in zip(draft, best, stop, strict=True):
        banned = row.begins_answer and first == row.tags.end_answer
        if row.advance(second if banned else first, end) != token:
            return None
    if row.stage != "done":
        return None
    return Generated(think=row.think, answer=row.answer, stopped_by=row.stopped_by, allocation=None)


def _allocate(
    gated: GatedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    budgets: Sequence[Budget] | None,
    allocations: Sequence[Allocation] | None,
    contract: Contract,
) -> Sequence[Allocation | None]:
    if allocations is not None:
        return allocations
    if budgets is not None:
        return gated.allocate(input_ids, attention_mask, budgets, contract=contract)
    return [None] * input_ids.shape[0]


def _caps(
    budgets: Sequence[Budget] | None, allocations: Sequence[Allocation] | None, config: GenerationConfig, count: int
) -> list[int]:
    caps = [config.max_think_tokens] * count
    for source in (budgets, allocations):
        limits = [item.think_tokens for item in source or ()]
        for row, limit in enumerate(limits):
            caps[row] = caps[row] if limit is None else min(caps[row], limit)
    return caps


def _decode(
    gated: GatedModel,
    rows: Sequence[Reasoning],
    openings: list[list[int]],
    input_ids: Tensor,
    attention_mask: Tensor,
    told: Sequence[Budget] | None,
    config: GenerationConfig,
) -> None:
    device, tags = input_ids.device, rows[0].tags
    features = None
    if told is not None:
        features = batch_budgets(told, gated.cost, gated.gate_config).to(device).features
    generator = torch.Generator(device=device).manual_seed(config.seed)
    opening = torch.tensor(openings, dtype=torch.long, device=device).view(len(rows), -1)
    kept = torch.tensor([len(row.think) for row in rows], device=device)
    tokens = torch.cat([input_ids, opening], dim=1)
    # What a cap cuts off an opening is hidden; such a row is full, so what it proposes there does not count.
    mask = torch.cat([attention_mask, (torch.arange(opening.shape[1], device=device) < kept[:, None]).long()], dim=1)
    cache = DynamicCache()
    limit = max(row.cap for row in rows) + config.max_answer_tokens + 4
    for _ in range(limit):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if features is not None:  # at every <think>, as in training
            gated.state.offset = gated.think_offset(tokens, features)
        hidden = gated(tokens, mask, cache=cache, position_ids=positions).hidden[:, -1:]
        logits = gated.logits(hidden)[:, 0].float()
        stop = [False] * len(rows)
        if features is not None and config.tau_threshold is not None and gated.gate_config.tokens:
            stop = (torch.sigmoid(gated.transition(hidden, features))[:, 0] > config.tau_threshold).tolist()
        logits[[at for at, row in enumerate(rows) if row.begins_answer], tags.end_answer] = -torch.inf
        if config.temperature > 0:
            proposed = torch.multinomial(torch.softmax(logits / config.temperature, -1), 1, generator=generator)[:, 0]
        else:
            proposed = logits.argmax(-1)
        fed = [row.advance(token, end) for row, token, end in zip(rows, proposed.tolist(), stop, strict=True)]
        if all(row.stage == "done" for row in rows):
            return
        tokens = torch.tensor(fed, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(fed), 1)], dim=1)
