"""GatedModel: a Hugging Face causal LM whose layers and KV groups run as a budget allows.

    input_ids -> stem layers -> pooled prompt -> gates -> projection to the budget -> plans of all layers -> logits

The Hugging Face model is changed in place (layers and output projections are wrapped, LoRA is injected) and
:meth:`GatedModel.unload` undoes it. The teacher is the same network with adapters and gates off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.cost import CostModel
from l2a_compress.errors import AllocationError, ConfigError
from l2a_compress.limits import Contract, Prices
from l2a_compress.modeling.adapters import AdapterConfig, add_adapters, remove_adapters, set_adapters
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.deciders import GateRequest, GateResult, InlineDecider, StemDecider
from l2a_compress.modeling.families import attention_of, decoder_layers, shape_of
from l2a_compress.modeling.gates import Allocator, GateConfig, TransitionGate
from l2a_compress.modeling.layers import GatedLayer, GatedProjection, GateState, LayerPlan, plan_from_masks


@dataclass
class GatedOutput:
    """``hidden`` [batch, length, width] after the final norm; ``gates`` None where nothing was decided."""

    hidden: Tensor
    gates: GateResult | None
    cache: Cache | None


class GatedModel(nn.Module):
    """A causal LM with gates. Make one with :meth:`wrap`."""

    def __init__(self, model: PreTrainedModel, gates: GateConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        self.shape = shape_of(model.config)
        self.cost = CostModel(shape=self.shape)
        self.gate_config, self.adapter_config = gates, adapter
        gated = self.shape.num_layers - gates.stem_layers
        if gated < 1 or gates.min_groups > self.shape.num_groups:
            raise ConfigError(
                f"{gates.stem_layers} stem layers and {gates.min_groups} groups at least do not fit a model of "
                f"{self.shape.num_layers} layers and {self.shape.num_groups} KV groups"
            )
        self.state = GateState([LayerPlan() for _ in range(self.shape.num_layers)])
        self._unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adapter_parameters = add_adapters(model, adapter)
        width = self.shape.hidden_size
        self.allocator = Allocator(gates, hidden_size=width, gated_layers=gated, num_groups=self.shape.num_groups)
        self.transition = TransitionGate(gates, hidden_size=width)
        self.to(model.device)
        self.model = model
        self.prices: Prices = ()
        self.think_id: int | None = None
        _wrap_layers(model, self.state)

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, gates: GateConfig | None = None, adapter: AdapterConfig | None = None
    ) -> GatedModel:
        """Wraps ``model`` in place.

        Raises:
            UnsupportedModelError: for a family that is not supported.
            ConfigError: for gates that do not fit the model.
        """
        return cls(model, gates or GateConfig(), adapter or AdapterConfig())

    def unload(self) -> PreTrainedModel:
        """Takes gates and adapters off; the model's outputs are then bit-equal to what they were before."""
        _unwrap_layers(self.model)
        remove_adapters(self.model)
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        return self.model

    @property
    def gate_parameters(self) -> dict[str, nn.Parameter]:
        """The gates' parameters by name."""
        parts = {"allocator": self.allocator, "transition": self.transition}
        return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As the wrapped model's own method (the Trainer calls it)."""
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        request: GateRequest | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        probe: bool = False,
    ) -> GatedOutput:
        """Runs the decoder.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, cached + length], 1 on real tokens.
            request: budgets to decide by. None keeps the current plans (dense, or what :meth:`forced` set).
            cache: KV cache to read and extend.
            position_ids: [batch, length]; by default 0, 1, ...
            probe: stop working behind the stem: only the decision is wanted (stem gates).
        """
        decider: StemDecider | InlineDecider | None = None
        if request is not None:
            kind = StemDecider if self.gate_config.mode == "stem" else InlineDecider
            decider = kind(request, self.allocator, self.cost, self.state, probe=probe)
            self.state.reset()
            self.state.hook = decider
            self.state.offset = self.think_offset(input_ids, request.budgets.features)
        try:
            output = self.model.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        finally:
            self.state.hook, self.state.offset = None, None
        return GatedOutput(output.last_hidden_state, decider.result if decider else None, output.past_key_values)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of any selection of hidden states. [..., width] -> [..., vocabulary]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def think_offset(self, input_ids: Tensor, budget: Tensor) -> Tensor | None:
        """What shows the budget at ``<think>``: [batch, length], [batch, 2] -> [batch, length, width], or nothing."""
        if self.think_id is None or not self.gate_config.tokens:
            return None
        at_think = (input_ids == self.think_id)[..., None]
        return at_think * self.transition.think_offset(budget)[:, None]

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Adapters and gates off: the frozen dense model."""
        plans = self.state.plans
        self.state.reset()
        set_adapters(self.model, enabled=False)
        try:
            yield
        finally:
            set_adapters(self.model, enabled=True)
            self.state.plans = plans

    @contextmanager
    def forced(self, allocations: Sequence[Allocation] | None, *, skip: bool = True) -> Iterator[None]:
        """Runs with the given allocations, one per row (or one for all); None is dense with adapters on.

        ``skip=False`` multiplies by masks even where a layer could be skipped: the reference for tests.
        """
        before = self.state.plans
        self.state.reset()
        if allocations is not None:
            self.state.plans = self.plans_of(allocations, skip=skip)
        try:
            yield
        finally:
            self.state.plans = before

    def plans_of(self, allocations: Sequence[Allocation], *, skip: bool = True) -> list[LayerPlan]:
        """The plans that carry out one allocation per row (or one for all rows).

        Raises:
            AllocationError: an allocation is of another model shape.
        """
        for allocation in allocations:
            if allocation.num_layers != self.shape.num_layers or allocation.num_groups != self.shape.num_groups:
                raise AllocationError(
                    f"allocation for {allocation.num_layers} layers x {allocation.num_groups} groups, but the model "
                    f"has {self.shape.num_layers} x {self.shape.num_groups}"
                )
        if len(set(allocations)) == 1:
            allocations = allocations[:1]
        groups = torch.zeros(len(allocations), self.shape.num_layers, self.shape.num_groups, device=self.model.device)
        for row, allocation in enumerate(allocations):
            for layer, kept in enumerate(allocation.groups):
                groups[row, layer, list(kept)] = 1.0
        layers = groups.amax(-1)
        pairs = zip(layers.unbind(1), groups.unbind(1), strict=True)
        return [plan_from_masks(layer[:, None], group[:, None], exact=skip) for layer, group in pairs]

    @torch.no_grad()
    def allocate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        budgets: Sequence[Budget],
        *,
        contract: Contract = "cap",
    ) -> list[Allocation]:
        """One allocation per row, by running the stem and the gates on the prompt (with ``<think>`` at its end).

        Raises:
            BudgetError: a budget the model cannot keep to.
        """
        batch = batch_budgets(budgets, self.cost, self.gate_config, contract=contract, prices=self.prices)
        request = GateRequest(batch.to(input_ids.device), attention_mask)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        stem_only = self.gate_config.mode == "stem"
        output = self(input_ids, attention_mask, request=request, position_ids=positions, probe=stem_only)
        self.state.reset()
        return self.allocations_of(output.gates, budgets)

    def allocations_of(self, gates: GateResult, budgets: Sequence[Budget]) -> list[Allocation]:
        """Hard decisions as values, one per row."""
        stem = [tuple(range(self.shape.num_groups))] * self.gate_config.stem_layers
        found = []
        for row, budget in enumerate(budgets):
            kept = [tuple(torch.nonzero(layer).flatten().tolist()) for layer in gates.groups[row]]
            found.append(
                Allocation(num_groups=self.shape.num_groups, groups=(*stem, *kept), think_tokens=budget.think_tokens)
            )
        return found


def _wrap_layers(model: PreTrainedModel, state: GateState) -> None:
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        attention = attention_of(layer)
        attention.o_proj = GatedProjection(cast(nn.Module, attention.o_proj), index, state)
        layers[index] = GatedLayer(layer, index, state)


def _unwrap_layers(model: PreTrainedModel) -> None:
    layers = decoder_layers(model)
    for index, wrapped in enumerate(layers):
        layer = cast(GatedLayer, wrapped).layer
        attention = attention_of(layer)
        attention.o_proj = cast(GatedProjection, attention.o_proj).projection
        layers[index] = layer
