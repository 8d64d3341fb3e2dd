"""Budgets of a batch as tensors: what the gates read and what the projection must keep to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.errors import BudgetError
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.projection import Limits

Contract = Literal["cap", "mean"]
Prices = Sequence[tuple[float, float]]


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


def think_share(budget: Budget, config: GateConfig) -> float:
    """A budget's think cap as a share of the reference length, at most 1; no cap is 1."""
    if budget.think_tokens is None:
        return 1.0
    return min(1.0, budget.think_tokens / config.think_reference)


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
    stem, shape = config.stem_layers, cost.shape
    stem_units = stem * (cost.layer_units + shape.num_groups * cost.group_units)
    units, layers, heads, price = [], [], [], []
    for budget in budgets:
        _check_feasible(budget, cost, config)
        limit = cost.limit(budget) if contract == "cap" else cost.dense_units
        units.append(limit - stem_units)
        layers.append((shape.num_layers if budget.layers is None else budget.layers) - stem)
        total = shape.num_layers * shape.num_groups
        heads.append((total if budget.heads is None else budget.heads) - stem * shape.num_groups)
        price.append(price_of(budget.compute, prices) if contract == "mean" else -torch.inf)
    return BudgetBatch(
        compute=torch.tensor([b.compute for b in budgets], dtype=torch.float32),
        think=torch.tensor(shares if shares is not None else [think_share(b, config) for b in budgets]),
        limits=Limits(
            units=torch.tensor(units),
            layers=torch.tensor(layers),
            heads=torch.tensor(heads),
            price=torch.tensor(price, dtype=torch.float32),
        ),
    )


def _check_feasible(budget: Budget, cost: CostModel, config: GateConfig) -> None:
    stem, shape = config.stem_layers, cost.shape
    least = minimum_compute(cost, config)
    stem_units = stem * (cost.layer_units + shape.num_groups * cost.group_units)
    if cost.limit(budget) < stem_units:
        raise BudgetError(
            f"compute budget {budget.compute} is below {least:.4f}, what the {stem} always-on layers cost; raise it"
        )
    if budget.layers is not None and budget.layers < stem:
        raise BudgetError(f"layer cap {budget.layers} is below the {stem} always-on layers; raise it")
    if budget.heads is not None and budget.heads < stem * shape.num_groups:
        least_heads = stem * shape.num_groups
        raise BudgetError(
            f"head cap {budget.heads} is below the {least_heads} KV groups of the always-on layers; raise it"
        )


def price_of(compute: float, prices: Prices) -> float:
    """The price at a compute budget, by linear interpolation of the calibrated (budget, price) pairs.

    Raises:
        BudgetError: no prices, or a budget outside the calibrated range.
    """
    if not prices:
        raise BudgetError("contract 'mean' needs calibrated prices, and this model has none; calibrate it or use 'cap'")
    budgets = [pair[0] for pair in prices]
    if compute >= 1.0:
        return -1e9  # the whole budget: everything runs
    if not budgets[0] - 1e-9 <= compute <= budgets[-1] + 1e-9:
        raise BudgetError(f"budget {compute} lies outside the calibrated range {budgets[0]}..{budgets[-1]} of 'mean'")
    if len(budgets) == 1:
        return prices[0][1]
    right = min(max(bisect_left(budgets, compute), 1), len(budgets) - 1)
    (b0, p0), (b1, p1) = prices[right - 1], prices[right]
    return p0 + (p1 - p0) * (compute - b0) / (b1 - b0)


def as_prices(table: Mapping[str, float]) -> list[tuple[float, float]]:
    """Sorted (budget, price) pairs from a JSON table."""
    return sorted((float(key), value) for key, value in table.items())
