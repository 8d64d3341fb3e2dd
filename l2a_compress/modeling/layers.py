"""Wrappers that stand in for a decoder layer and for its output projection, and the plan they follow.

The wrapped modules are kept unchanged inside, so that unwrapping restores the model exactly. No forward of
Transformers is copied: a gated layer calls the layer it wraps, or does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LayerPlan:
    """What one layer does in the current forward.

    ``layer`` [batch, 1 or length, 1] multiplies the residual update (None: it runs for every row), ``groups``
    [batch, 1 or length, KV groups] multiplies the head outputs before the output projection, and ``skip`` means that no
    row needs the layer, so it is not run at all.
    """

    layer: Tensor | None = None
    groups: Tensor | None = None
    skip: bool = False


@dataclass
class GateState:
    """What all wrappers of one model read in the current forward.

    ``hook`` is called before each layer with its index and input [batch, length, width], and may fill the plans from
    there on.
    ``offset`` [batch, length, width] is added to the input of the first layer.
    """

    plans: list[LayerPlan]
    hook: Callable[[int, Tensor], None] | None = None
    offset: Tensor | None = None

    def reset(self) -> None:
        """Back to dense: every layer and group runs."""
        self.plans = [LayerPlan() for _ in self.plans]
        self.hook, self.offset = None, None


class GatedLayer(nn.Module):
    """A decoder layer whose residual update is gated: h + mask * (F(h) - h)."""

    def __init__(self, layer: nn.Module, index: int, state: GateState) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.state = state

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the wrapped layer: [batch, length, width] -> the same."""
        state = self.state
        if self.index == 0 and state.offset is not None:
            hidden_states = hidden_states + state.offset.to(hidden_states.dtype)
        if state.hook is not None:
            state.hook(self.index, hidden_states)
        plan = state.plans[self.index]
        if plan.skip:
            return hidden_states
        updated: Tensor = self.layer(hidden_states, *args, **kwargs)
        if plan.layer is None:
            return updated
        # One kernel instead of three, and exact where the mask is 0 or 1 (h + 1 * (F - h) is not F in floating point).
        return torch.lerp(hidden_states.to(updated.dtype), updated, plan.layer.to(updated.dtype))


class GatedProjection(nn.Module):
    """An attention output projection whose input is gated by KV group."""

    def __init__(self, projection: nn.Module, index: int, state: GateState) -> None:
        super().__init__()
        self.projection = projection
        self.index = index
        self.state = state

    def forward(self, heads: Tensor) -> Tensor:
        """[batch, length, heads * head_dim] -> [batch, length, width]."""
        mask = self.state.plans[self.index].groups
        if mask is not None:
            split = heads.view(*heads.shape[:-1], mask.shape[-1], -1)
            heads = (split * mask.to(heads.dtype)[..., None]).view_as(heads)
        projected: Tensor = self.projection(heads)
        return projected


def plan_from_masks(layer: Tensor, groups: Tensor, *, exact: bool) -> LayerPlan:
    """The plan of one layer from its masks.

    Args:
        layer: [batch, 1 or length] of 0/1 (with straight-through gradients while training).
        groups: [batch, 1 or length, KV groups].
        exact: whether the masks carry no gradient, so that a layer no row needs is skipped, and a mask of ones dropped.
    """
    if not exact:
        return LayerPlan(layer=layer[..., None], groups=groups)
    if not bool(layer.any()):
        return LayerPlan(skip=True)
    every_layer = bool(layer.all())
    # A row that does not run the layer has no groups in its mask; that must not stop the others' shortcut.
    every_group = bool((groups.bool() | ~layer.bool()[..., None]).all())
    return LayerPlan(layer=None if every_layer else layer[..., None], groups=None if every_group else groups)
