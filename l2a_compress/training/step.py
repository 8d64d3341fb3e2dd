"""One training step: the teacher's logits, the gated student, and every term of the objective.

It is a module, so that data-parallel wrappers see one forward per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2a_compress.budget import Budget
from l2a_compress.errors import TrainingError
from l2a_compress.modeling.budgets import BudgetBatch, batch_budgets
from l2a_compress.modeling.deciders import GateRequest, GateResult
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.projection import Limits
from l2a_compress.training import objective
from l2a_compress.training.draws import gumbel_noise
from l2a_compress.training.objective import ObjectiveConfig, Supervised
from l2a_compress.training.readout import Teacher, readout

Batch = Mapping[str, Tensor]


class TrainingStep(nn.Module):
    """Batch -> loss and terms. Set ``temperature``, ``noise`` and ``gather`` before a step."""

    def __init__(self, gated: GatedModel, config: ObjectiveConfig, *, seed: int) -> None:
        super().__init__()
        self.gated, self.objective, self.seed = gated, config, seed
        self.temperature, self.noise = 1.0, 0.0
        self.gather: Callable[[Tensor], Tensor] = lambda value: value
        if not gated.gate_config.tokens:
            gated.transition.requires_grad_(False)
        if not gated.gate_config.heads:
            gated.allocator.head_gates.requires_grad_(False)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As the model's own method (the Trainer calls it)."""
        self.gated.activation_checkpointing_enable(**options)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms by name, ``loss`` among them; all scalars.

        ``batch`` holds input_ids, attention_mask, labels, prompt_mask, think_mask [batch, length] and compute, mean,
        price, think, after, switch, lost, think_limit, index [batch]; optionally the cached teacher's teacher_values
        and teacher_indices [batch, length, k].

        Raises:
            TrainingError: the loss is not a number.
        """
        where = Supervised.of(batch["labels"], batch["lost"] > 0)
        teacher = self._teacher(batch, where)
        request = self.request(batch)
        output = self.gated(batch["input_ids"], batch["attention_mask"], request=request)
        states = output.hidden[where.mask]
        gamma, vocabulary = self.objective.weight("kl"), int(self.gated.model.config.vocab_size)
        read = readout(states, self.gated.logits, where, teacher, kl_weight=gamma, vocabulary=vocabulary)
        loss, terms = read.loss, read.terms
        gates = output.gates
        assert gates is not None
        if self.objective.weight("budget"):
            free = batch["mean"].bool() & (not self.gated.gate_config.has_demand)
            terms["budget"] = objective.budget_gap(gates.soft_cost, gates.compute, free, self.gather)
            loss = loss + self.objective.weight("budget") * terms["budget"]
        if self.gated.gate_config.tokens:
            tau = self.gated.transition(output.hidden, request.budgets.features)
            stop = objective.stop_targets(batch["think_mask"], batch["think_limit"])
            terms["tokens"], terms["transition"] = objective.token_terms(tau, batch["think_mask"], stop)
            if "tokens" not in self.objective.without:
                loss = loss + self.objective.tokens * terms["tokens"] + self.objective.transition * terms["transition"]
            else:
                loss = loss + 0.0 * terms["transition"]
        if self.gated.allocator.demand is not None:
            excess = objective.excess(read.nll, read.dense_nll, where)
            terms["demand"] = self._demand(batch, request, gates, excess)
            loss = loss + self.objective.demand * terms["demand"]
        terms |= _realized(gates, self.gated)
        terms["loss"] = loss
        if not torch.isfinite(loss):
            shown = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
            raise TrainingError(f"the loss is not finite ({shown}); lower the learning rate or check the data")
        return terms

    def _demand(self, batch: Batch, request: GateRequest, gates: GateResult, excess: Tensor) -> Tensor:
        """What the demand head should have said: whether each row fails under the budget that it had."""
        demand = self.gated.allocator.demand
        steady = (batch["switch"] >= 1) & (batch["lost"] == 0)
        assert demand is not None
        assert gates.summary is not None
        told = torch.stack([gates.compute, request.budgets.think], dim=-1)
        logits = demand(gates.summary.detach(), told)
        found = functional.binary_cross_entropy_with_logits(logits, objective.failure(excess), reduction="none")
        return (found * steady).mean()

    def request(self, batch: Batch) -> GateRequest:
        """Budgets, noise and switch of a batch, as the gates take them."""
        device = batch["input_ids"].device
        noise = None
        if self.noise > 0:
            shape = (self.gated.shape.num_layers - self.gated.gate_config.stem_layers, 1 + self.gated.shape.num_groups)
            drawn = np.stack([gumbel_noise(self.seed, int(index), shape) for index in batch["index"].tolist()])
            drawn[..., 1:] = -np.sort(-drawn[..., 1:], axis=-1)  # falling with the rank: all widths stay as likely
            noise = self.noise * torch.from_numpy(drawn).to(device)
        after = switch = None
        if bool((batch["switch"] < 1).any()) and self.gated.gate_config.mode == "stem":
            after = self._budgets(batch["after"], batch)
            switch = (batch["switch"] * batch["attention_mask"].sum(1)).long()
            switch = torch.maximum(switch, batch["prompt_mask"].sum(1))  # a prompt is read under one budget
        return GateRequest(
            self._budgets(batch["compute"], batch), batch["prompt_mask"], self.temperature, noise, after, switch
        )

    def _budgets(self, compute: Tensor, batch: Batch) -> BudgetBatch:
        """Cap rows are held to their budget, and mean rows pay the price they drew.

        Without a demand head that is price 0, the score that the budget term keeps calibrated.
        """
        caps = [Budget(compute=round(value, 6)) for value in compute.tolist()]
        budgets = batch_budgets(caps, self.gated.cost, self.gated.gate_config, shares=batch["think"].tolist()).to(
            compute.device
        )
        mean = batch["mean"].bool() & (compute < 1.0)
        if self.gated.gate_config.has_demand and self.noise > 0:
            mean = torch.zeros_like(mean)  # while allocations are still explored nobody can know what a prompt needs
        dense = batch_budgets([Budget()], self.gated.cost, self.gated.gate_config).limits.units.to(compute.device)
        limits = budgets.limits
        return BudgetBatch(
            compute=budgets.compute,
            think=budgets.think,
            limits=Limits(
                units=torch.where(mean, dense, limits.units),
                layers=limits.layers,
                heads=limits.heads,
                price=torch.where(mean, batch["price"] * self.gated.gate_config.has_demand, limits.price),
            ),
        )

    @torch.no_grad()
    def _teacher(self, batch: Batch, where: Supervised) -> Teacher | None:
        """The dense model's states at the labelled positions, or what the cache has of them; None if nobody asks."""
        if not self.objective.weight("kl") and not self.gated.gate_config.has_demand:
            return None
        if "teacher_values" in batch:
            return Teacher(values=batch["teacher_values"][where.mask], indices=batch["teacher_indices"][where.mask])
        with self.gated.teacher():
            return Teacher(hidden=self.gated(batch["input_ids"], batch["attention_mask"]).hidden[where.mask])


def _realized(gates: GateResult, gated: GatedModel) -> dict[str, Tensor]:
    """What was really kept, for the log: means over rows, without gradient."""
    cost = gated.cost
    units = gates.layers.sum(1) * cost.layer_units + gates.groups.sum((1, 2)) * cost.group_units
    stem = cost.dense_units * gated.gate_config.stem_layers / gated.shape.num_layers
    return {
        "cost": ((units + stem) / cost.dense_units).mean(),
        "layer_sparsity": 1
        - (gates.layers.float().sum(1).mean() + gated.gate_config.stem_layers) / gated.shape.num_layers,
    }
