"""Budgets of a batch as tensors: what the gates read and what the projection must keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.limits import Contract, Prices, limits_of, think_share
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.projection import Limits


@dataclass(frozen=True, kw_only=True)
class BudgetBatch:
    """One budget per row; every tensor is [batch].

    ``compute`` and ``think`` (share of the reference think length) are what the gates see; ``limits`` is enforced.
    """

    compute: Tensor
    think: Tensor
    limits: Limits

    @property
    def features(self) -> Tensor:
        """[batch, 2]: the input of the budget embeddings."""
        return torch.stack([self.compute, self.think], dim=-1)

    def to(self, device: torch.device) -> BudgetBatch:
        """The same on another device."""
        limits = Limits(**{name: value.to(device) for name, value in self.limits.__dict__.items()})
        return BudgetBatch(compute=self.compute.to(device), think=self.think.to(device), limits=limits)


def minimum_compute(cost: CostModel, config: GateConfig) -> float:
    """The smallest compute budget that a gated model can keep to: its stem."""
    return config.stem_layers / cost.shape.num_layers


def batch_budgets(
    budgets: Sequence[Budget],
    cost: CostModel,
    config: GateConfig,
    *,
    contract: Contract = "cap",
    prices: Prices = (),
    shares: Sequence[float] | None = None,
) -> BudgetBatch:
    """Tensors for a list of budgets, one per row.

    Under ``mean`` a row may take up to the whole model unless a cap says otherwise, and pays the price of its budget.

    Raises:
        BudgetError: a budget lies below what the stem alone costs, or ``mean`` is asked without calibrated prices.
    """
    rows = [limits_of(budget, cost, config.stem_layers, contract=contract, prices=prices) for budget in budgets]
    return BudgetBatch(
        compute=torch.tensor([b.compute for b in budgets], dtype=torch.float32),
        think=torch.tensor(shares if shares is not None else [think_share(b, config.think_reference) for b in budgets]),
        limits=Limits(
            units=torch.tensor([row.units for row in rows]),
            layers=torch.tensor([row.layers for row in rows]),
            heads=torch.tensor([row.heads for row in rows]),
            price=torch.tensor([row.price for row in rows], dtype=torch.float32),
        ),
    )
