"""Which allocations a bundle's static variants are fixed to: a nested ladder, mined from what the gates choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.modeling.gated import GatedModel

Prompts = Sequence[tuple[Tensor, Tensor]]


def mine(
    gated: GatedModel, prompts: Prompts, budgets: Sequence[float], *, per_budget: int = 1
) -> list[tuple[float, Allocation]]:
    """For each budget the allocations chosen most often of those that are a part of one of the budget before it.

    Where the gates never choose such a one, it is the most frequent one cut down to the first of the budget before it.

    Args:
        gated: with trained gates.
        prompts: left-padded ``(input_ids, attention_mask)``, ending in ``<think>``.
        budgets: falling.
        per_budget: most allocations of a budget.

    Raises:
        BudgetError: a budget below what the always-on layers cost.
    """
    before = [Allocation.dense(gated.shape.num_layers, gated.shape.num_groups)]
    ladder = []
    for budget in budgets:
        counts: Counter[Allocation] = Counter()
        for ids, mask in prompts:
            counts.update(gated.allocate(ids, mask, [Budget(compute=budget)] * len(ids)))
        ranked = [allocation for allocation, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0].key))]
        nested = [allocation for allocation in ranked if any(map(allocation.is_subset, before))][:per_budget]
        before = nested or [_part(ranked[0], before[0])]
        ladder += [(budget, allocation) for allocation in before]
    return ladder


def _part(allocation: Allocation, whole: Allocation) -> Allocation:
    """What both keep. Groups are prefixes of one order, so this is the narrower prefix of each layer."""
    pairs = zip(allocation.groups, whole.groups, strict=True)
    return replace(allocation, groups=tuple(tuple(sorted(set(mine) & set(theirs))) for mine, theirs in pairs))
