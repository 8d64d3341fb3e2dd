"""The demand head, fitted once more when training is over.

    calibration examples -> each at several budgets -> did it lose what the dense model gets right? -> the demand head

While it trains, the network under the head changes, and each sample tells how one budget went. Now the network stands
still, and every example is asked at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from l2a_compress.budget import Budget
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.deciders import GateRequest
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.objective import Supervised

_LEVELS = 7  # budgets that every example is asked at
_STEPS, _ROWS, _RATE = 400, 256, 3e-3


def fit_demand(gated: GatedModel, batches: Sequence[Mapping[str, Tensor]], *, seed: int) -> None:
    """Fits the demand head, from what it learned while training, to what the network does now.

    Args:
        gated: the model; nothing but its demand head changes.
        batches: whole examples, as of :class:`l2a_compress.training.collate.Collator`.
        seed: of the order in which examples are learned from.
    """
    demand = gated.allocator.demand
    assert demand is not None
    places = torch.linspace(0, len(demand.levels) - 1, _LEVELS).round().long()
    levels = demand.levels[places.to(demand.levels.device)]
    summaries, failed = failures(gated, batches, levels.tolist())
    asked = torch.stack([levels, torch.ones_like(levels)], dim=-1).expand(_ROWS, -1, -1)
    optimizer = torch.optim.AdamW(demand.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        rows, told = (torch.randint(n, (_ROWS,), generator=generator).to(levels.device) for n in (len(failed), _LEVELS))
        # A prompt is read with the budget it was told, which shows in its summary: the head must not mind which.
        logits = demand(summaries[rows, told][:, None].expand(-1, _LEVELS, -1), asked)
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(logits, failed[rows]).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


@torch.no_grad()
def failures(
    gated: GatedModel, batches: Sequence[Mapping[str, Tensor]], levels: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """What happens to each example at each budget.

    Returns:
        (summaries of the prompts, told each budget [examples, levels, 2 * width]; [examples, levels]: 1 where a label
        that is the dense model's own first choice is not the gated model's).
    """
    was_training = gated.training
    gated.eval()
    summaries, failed = [], []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        where = Supervised.of(batch["labels"])
        with gated.teacher():
            right = _first(gated, gated(ids, mask).hidden[where.mask]) == where.targets
        columns, seen = [], []
        for level in levels:
            budgets = batch_budgets([Budget(compute=level)] * len(ids), gated.cost, gated.gate_config).to(ids.device)
            output = gated(ids, mask, request=GateRequest(budgets, batch["prompt_mask"]))
            lost = right & (_first(gated, output.hidden[where.mask]) != where.targets)
            columns.append(torch.zeros(len(ids), device=ids.device).index_add(0, where.rows, lost.float()).clamp(max=1))
            assert output.gates is not None
            assert output.gates.summary is not None
            seen.append(output.gates.summary)
        summaries.append(torch.stack(seen, dim=1))
        failed.append(torch.stack(columns, dim=1))
    gated.train(was_training)
    return torch.cat(summaries), torch.cat(failed)


def _first(gated: GatedModel, hidden: Tensor) -> Tensor:
    """The likeliest word of each position. [n, width] -> [n]."""
    return torch.cat([gated.logits(part).argmax(-1) for part in hidden.split(512)])
