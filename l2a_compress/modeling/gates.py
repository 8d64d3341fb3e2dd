"""The gating networks: budget embedding, layer and head gates, transition gate (paper, section 3).

Scores are logits: a gate is ``sigmoid(score / temperature)`` while training and a comparison with a threshold at
inference. All layers' MLPs are stacked in one module, which is one batched product instead of two per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from l2a_compress.allocation import Allocation
from l2a_compress.errors import ConfigError

GateMode = Literal["stem", "inline"]
Summary = Literal["mean+last", "mean", "none"]
SCORE_LIMIT = 6.0
DEMAND_LEVELS = 25


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Shape of the gates.

    Attributes:
        mode: ``stem`` decides everything once, after the always-on layers; ``inline`` is the paper's form, where the
            gate of layer l reads that layer's input.
        stem_layers: the first layers that always run.
        hidden: width of each gate's hidden layer.
        budget_dim: width of the budget embedding e(b).
        min_groups: KV groups that a kept layer has at least.
        heads: whether KV groups are gated (else a kept layer keeps all).
        tokens: whether the transition gate is trained and used.
        summary: what the gates see of the prompt: its mean and its last state, its mean, or nothing (input-blind).
        think_reference: think tokens that count as a full think budget, to turn a cap into a share.
        demand: whether, under the ``mean`` contract, each input gets the budget that is worth its price to it
            (:class:`Demand`, stem gates only). Without it a price is what an item's score must exceed.
        least_compute: smallest budget that an input is given under ``mean``.
    """

    mode: GateMode = "stem"
    stem_layers: int = 2
    hidden: int = 64
    budget_dim: int = 16
    min_groups: int = 1
    heads: bool = True
    tokens: bool = True
    summary: Summary = "mean+last"
    think_reference: int = 128
    demand: bool = True
    least_compute: float = 0.4

    def __post_init__(self) -> None:
        if self.mode not in get_args(GateMode):
            raise ConfigError(f"gates mode {self.mode!r}: choose one of {', '.join(get_args(GateMode))}")
        if self.summary not in get_args(Summary):
            raise ConfigError(f"gates summary {self.summary!r}: choose one of {', '.join(get_args(Summary))}")
        for name in ("stem_layers", "hidden", "budget_dim", "min_groups", "think_reference"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"gates {name} = {value!r}: must be a whole number of at least 1")

        if not 0 < self.least_compute < 1:
            raise ConfigError(f"gates least_compute = {self.least_compute!r}: must lie between 0 and 1")

    @property
    def has_demand(self) -> bool:
        """Whether there is a demand head: inline gates decide layer by layer and have none."""
        return self.demand and self.mode == "stem"

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GateConfig:
        """The inverse of :meth:`to_json`."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"gates: unknown settings {sorted(unknown)}; known: {sorted(cls.__dataclass_fields__)}")
        return cls(**data)


def bounded(raw: Tensor) -> Tensor:
    """A score within +-SCORE_LIMIT: a gate that is pushed one way for long still gets a gradient to come back."""
    return SCORE_LIMIT * torch.tanh(raw / SCORE_LIMIT)


class BudgetEmbedding(nn.Module):
    """e(b): a learned embedding of (compute, think share), each in [0, 1]. [batch, 2] -> [batch, width].

    Cosine features of several frequencies make nearby budgets alike and distant ones different.
    """

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(waves, dtype=torch.float32), persistent=False)
        self.linear = nn.Linear(2 * waves, width)

    def forward(self, budget: Tensor) -> Tensor:
        """[batch, 2] -> [batch, width]."""
        waves = torch.cos(budget[..., None].float() * self.frequencies).flatten(-2)
        return torch.tanh(self.linear(waves.to(self.linear.weight.dtype)))


class StackedMLP(nn.Module):
    """``count`` separate 2-layer MLPs, evaluated together or one at a time.

    The last layer starts at zero, so that its bias alone (the prior) decides until something is learned.
    """

    def __init__(self, count: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(count, inputs, hidden).normal_(std=inputs**-0.5))
        self.inner_bias = nn.Parameter(torch.zeros(count, hidden))
        self.outer = nn.Parameter(torch.zeros(count, hidden, outputs))
        self.outer_bias = nn.Parameter(torch.zeros(count, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, count, outputs]."""
        hidden = torch.einsum("bi,nih->bnh", features, self.inner) + self.inner_bias
        return torch.einsum("bnh,nho->bno", nn.functional.silu(hidden), self.outer) + self.outer_bias

    def one(self, index: int, features: Tensor) -> Tensor:
        """The MLP of that index alone. [batch, inputs] -> [batch, outputs]."""
        hidden = features @ self.inner[index] + self.inner_bias[index]
        return nn.functional.silu(hidden) @ self.outer[index] + self.outer_bias[index]


class BudgetedLogit(nn.Module):
    """A 2-layer MLP on a state and e(b): [..., width], [..., 2] -> [...]."""

    def __init__(self, config: GateConfig, *, width: int) -> None:
        super().__init__()
        self.embedding = BudgetEmbedding(config.budget_dim)
        self.inner = nn.Linear(width + config.budget_dim, config.hidden)
        self.outer = nn.Linear(config.hidden, 1)

    def logit(self, state: Tensor, embedded: Tensor) -> Tensor:
        """The logit of a state [..., width] and its embedded budget [..., budget_dim]."""
        inner = self.inner(torch.cat([state.to(embedded.dtype), embedded], dim=-1))
        logit: Tensor = self.outer(nn.functional.silu(inner)).squeeze(-1)
        return logit


class Demand(BudgetedLogit):
    """What an input needs: the chance that it fails at each compute budget, and the budget worth its price.

    The layer and head gates say what to run with a budget; this says how much of a shared budget an input should get.
    Minimizing the mean failure of a stream at a mean cost is, with a price for the cost, a minimum for each input
    alone: ``min over b of failure(x, b) + price * b``.
    """

    levels: Tensor

    def __init__(self, config: GateConfig, *, hidden_size: int) -> None:
        super().__init__(config, width=2 * hidden_size)
        self.register_buffer("levels", demand_levels(config), persistent=False)

    def forward(self, summary: Tensor, budget: Tensor) -> Tensor:
        """Logit of the failure. ``summary`` [..., 2 * width], ``budget`` (compute, think share) [..., 2] -> [...]."""
        return self.logit(summary, self.embedding(budget))

    @torch.no_grad()
    def failure(self, summary: Tensor, think: Tensor) -> Tensor:
        """The chance of a failure at each of ``levels``. [batch, 2 * width], [batch] -> [batch, levels]."""
        batch, count = len(summary), len(self.levels)
        told = torch.stack([self.levels.expand(batch, -1), think[:, None].expand(-1, count)], dim=-1)
        return torch.sigmoid(self(summary[:, None].expand(-1, count, -1), told))

    def worth(self, failure: Tensor, price: Tensor) -> Tensor:
        """Which of ``levels`` each input gets. [batch, levels], [batch] -> [batch], long."""
        return (failure + price[:, None] * self.levels).argmin(-1)


def demand_levels(config: GateConfig) -> Tensor:
    """The compute budgets that an input may get under ``mean``, ascending to exactly 1."""
    return torch.linspace(config.least_compute, 1.0, DEMAND_LEVELS, dtype=torch.float64).round(decimals=4).float()


class Allocator(nn.Module):
    """The layer and head gates of all gated layers: (prompt summary, e(b)) -> scores."""

    def __init__(self, config: GateConfig, *, hidden_size: int, gated_layers: int, num_groups: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = BudgetEmbedding(config.budget_dim)
        self.norm = nn.LayerNorm(2 * hidden_size)
        inputs = 2 * hidden_size + config.budget_dim
        self.layer_gates = StackedMLP(gated_layers, inputs, config.hidden, 1)
        self.head_gates = StackedMLP(gated_layers, inputs, config.hidden, num_groups)
        self.demand = Demand(config, hidden_size=hidden_size) if config.has_demand else None
        order = torch.arange(num_groups).repeat(gated_layers, 1)
        self.group_order = nn.Parameter(order, requires_grad=False)  # a parameter, to be saved with the gates

    def summarize(self, hidden: Tensor, prompt_mask: Tensor) -> Tensor:
        """Mean and last state of the prompt. [batch, length, width], [batch, length] -> [batch, 2 * width]."""
        with _full_precision(hidden):
            return self._summarize(hidden, prompt_mask)

    def _summarize(self, hidden: Tensor, prompt_mask: Tensor) -> Tensor:
        hidden = hidden.float()  # a sum over a long prompt is more than 16 bits hold
        mask = prompt_mask.to(hidden.dtype)[..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last_at = (prompt_mask.long() * positions).argmax(dim=1)
        last = hidden[torch.arange(hidden.shape[0], device=hidden.device), last_at]
        if self.config.summary == "mean":
            last = torch.zeros_like(last)
        summary = torch.cat([mean, last], dim=-1)
        return torch.zeros_like(summary) if self.config.summary == "none" else self.norm(summary)

    def features(self, summary: Tensor, budget: Tensor) -> Tensor:
        """What every gate reads, [summary; e(b)], of a prompt's summary and its budget [batch, 2]."""
        with _full_precision(summary):
            return torch.cat([summary, self.embedding(budget)], dim=-1)

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Layer scores [batch, gated layers] and group scores [batch, gated layers, groups], by rank."""
        with _full_precision(features):
            return bounded(self.layer_gates(features).squeeze(-1)), bounded(self.head_gates(features))

    def scores_at(self, index: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of one gated layer: [batch] and [batch, groups], by rank."""
        with _full_precision(features):
            layer, groups = self.layer_gates.one(index, features).squeeze(-1), self.head_gates.one(index, features)
        return bounded(layer), bounded(groups)

    @property
    def min_groups(self) -> int:
        """KV groups that a kept layer has at least: all of them where groups are not gated."""
        return self.config.min_groups if self.config.heads else self.group_order.shape[1]

    @property
    def learns_order(self) -> bool:
        """Whether the gates learn by gradient which layers run; else they are told, by a search or an allocation."""
        return self.layer_gates.outer_bias.requires_grad

    def by_group(self, ranks: Tensor, layer: int | None = None) -> Tensor:
        """From rank order to the groups' own: [batch, gated layers, groups], or [batch, groups] of one gated layer."""
        places = self.group_order.argsort(-1)
        places = places if layer is None else places[layer]
        return ranks.gather(-1, places.expand_as(ranks))

    @torch.no_grad()
    def set_prior(self, layer_scores: Tensor, group_scores: Tensor) -> None:
        """Starts the gates from measured importance, and orders each layer's groups by it.

        Args:
            layer_scores: [gated layers].
            group_scores: [gated layers, groups], in the groups' own order.
        """
        self.layer_gates.outer_bias.copy_(layer_scores[:, None])
        ranked, order = group_scores.sort(dim=-1, descending=True, stable=True)
        self.head_gates.outer_bias.copy_(ranked)
        self.group_order.copy_(order)

    @torch.no_grad()
    def fix(self, allocation: Allocation) -> None:
        """Makes all gates say one allocation, whatever the input, for good: they are not trained.

        Args:
            allocation: of the whole model; its always-on layers are not looked at.
        """
        kept = torch.full((len(self.layer_gates.outer_bias), self.group_order.shape[1]), -SCORE_LIMIT)
        for layer, groups in zip(kept, allocation.groups[-len(kept) :], strict=True):
            layer[list(groups)] = SCORE_LIMIT
        self.set_prior(kept.amax(1), kept)
        for gates in (self.layer_gates, self.head_gates):
            gates.outer.zero_()
        self.requires_grad_(False)


def _full_precision(like: Tensor) -> torch.autocast:
    """Scores and costs of 16 bits would differ from those at inference, and by more than a budget may be missed by."""
    return torch.autocast(like.device.type, enabled=False)


class TransitionGate(BudgetedLogit):
    """tau_t = sigmoid(MLP([h_t; e(b)])): whether reasoning may stop after token t; also shows b at ``<think>``."""

    def __init__(self, config: GateConfig, *, hidden_size: int) -> None:
        super().__init__(config, width=hidden_size)
        self.at_think = nn.Linear(config.budget_dim, hidden_size, bias=False)
        nn.init.zeros_(self.at_think.weight)  # an untrained gate leaves the network as it was
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, -3.0)

    def forward(self, hidden: Tensor, budget: Tensor) -> Tensor:
        """Logit of tau. [batch, length, width], [batch, 2] -> [batch, length]."""
        embedded = self.embedding(budget)[:, None].expand(-1, hidden.shape[1], -1)
        return self.logit(hidden, embedded)

    def think_offset(self, budget: Tensor) -> Tensor:
        """What is added to the input embedding at ``<think>``. [batch, 2] -> [batch, width]."""
        offset: Tensor = self.at_think(self.embedding(budget))
        return offset
