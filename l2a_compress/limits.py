"""A budget as the numbers that gates are told and that their projection keeps to; for training and serving alike."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.errors import BudgetError, ConfigError

Contract = Literal["cap", "mean"]
Prices = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class BudgetLimits:
    """What the layers behind the stem may spend.

    Attributes:
        units: Most units of the cost model.
        layers: Most layers.
        heads: Most KV groups.
        price: Minus infinity under ``cap``; else the score that a layer or group must exceed, or, where there is a
            demand head, failures for the dense compute.
    """

    units: int
    layers: int
    heads: int
    price: float


def limits_of(
    budget: Budget, cost: CostModel, stem_layers: int, *, contract: Contract = "cap", prices: Prices = ()
) -> BudgetLimits:
    """The limits of one request.

    Under ``mean`` it may take up to the whole model unless a cap says otherwise, and pays the price of its budget.

    Raises:
        BudgetError: the budget lies below what the stem alone costs, or ``mean`` is asked without calibrated prices.
        ConfigError: there is no such contract.
    """
    if contract not in get_args(Contract):
        raise ConfigError(f"contract must be one of {', '.join(get_args(Contract))}, found {contract!r}")
    shape = cost.shape
    stem_heads = stem_layers * shape.num_groups
    stem_units = stem_layers * cost.layer_units + stem_heads * cost.group_units
    if cost.limit(budget) < stem_units:
        raise BudgetError(
            f"compute budget {budget.compute} is below {stem_layers / shape.num_layers:.4f}, what the {stem_layers} "
            "always-on layers cost; raise it"
        )
    if budget.layers is not None and budget.layers < stem_layers:
        raise BudgetError(f"layer cap {budget.layers} is below the {stem_layers} always-on layers; raise it")
    if budget.heads is not None and budget.heads < stem_heads:
        raise BudgetError(
            f"head cap {budget.heads} is below the {stem_heads} KV groups of the always-on layers; raise it"
        )
    return BudgetLimits(
        units=(cost.limit(budget) if contract == "cap" else cost.dense_units) - stem_units,
        layers=(shape.num_layers if budget.layers is None else budget.layers) - stem_layers,
        heads=(shape.num_layers * shape.num_groups if budget.heads is None else budget.heads) - stem_heads,
        price=price_of(budget.compute, prices) if contract == "mean" else -math.inf,
    )


def think_share(budget: Budget, think_reference: int) -> float:
    """A budget's think cap as a share of the reference length, at most 1; no cap is 1."""
    return 1.0 if budget.think_tokens is None else min(1.0, budget.think_tokens / think_reference)


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
