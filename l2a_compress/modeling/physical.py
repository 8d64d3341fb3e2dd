"""One static allocation carried out physically: skipped layers are not called, pruned KV groups are sliced out.

    q_proj   rows of the heads of kept groups       (bias too)
    k_proj   rows of kept groups                    (bias too)
    v_proj   rows of kept groups                    (bias too)
    o_proj   columns of the heads of kept groups

Heads of group g are g * heads_per_group and those after it, in all families. The KV cache shrinks with the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from l2a_compress.allocation import Allocation
from l2a_compress.cost import ModelShape
from l2a_compress.errors import AllocationError
from l2a_compress.modeling.adapters import ADAPTER_NAME
from l2a_compress.modeling.families import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, attention_of, decoder_layers
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.layers import GatedLayer, GatedProjection, LayerPlan


@contextmanager
def specialized(gated: GatedModel, allocation: Allocation) -> Iterator[None]:
    """Runs ``gated`` under ``allocation`` for every row, with dense matrices of just the size that is needed.

    Adapters are merged into copies of the weights (in at least 32 bits, then rounded to the base's type); within
    ``gated.teacher()`` they are left out. The original modules are set aside and put back as they were, bit for bit.
    For inference: no gradient reaches the adapters, and gates are not asked. A KV cache that was filled inside fits
    this allocation only.

    Raises:
        AllocationError: the allocation is of another model shape, or skips the first layer, whose cache tells the
            length.
    """
    plans = gated.plans_of([allocation])
    if not allocation.groups[0]:
        raise AllocationError("the allocation skips layer 0, which always runs; keep it")
    before = gated.state.plans
    with ExitStack() as stack:
        for index, wrapper in enumerate(decoder_layers(gated.model)):
            if allocation.groups[index]:
                assert isinstance(wrapper, GatedLayer)
                _specialize(wrapper.layer, allocation.groups[index], gated.shape, stack)
        gated.state.reset()
        gated.state.plans = [LayerPlan(skip=plan.skip) for plan in plans]
        try:
            yield
        finally:
            gated.state.plans = before


def _specialize(layer: nn.Module, groups: Sequence[int], shape: ModelShape, stack: ExitStack) -> None:
    """Replaces the projections of one layer until ``stack`` is closed."""
    per_group = shape.num_heads // shape.num_groups
    keys = _ranges(groups, shape.head_dim)
    queries = _ranges(groups, per_group * shape.head_dim)
    attention = attention_of(layer)
    whole = len(groups) == shape.num_groups
    for name in ATTENTION_PROJECTIONS:
        rows = None if whole or name == "o_proj" else queries if name == "q_proj" else keys
        columns = queries if name == "o_proj" and not whole else None
        _replace(attention, name, rows, columns, stack)
    for name in MLP_PROJECTIONS:
        _replace(layer.mlp, name, None, None, stack)  # type: ignore[arg-type]


def _ranges(groups: Sequence[int], width: int) -> Tensor:
    """Indices of the kept groups' rows, where each group has ``width`` of them."""
    return (torch.tensor(groups)[:, None] * width + torch.arange(width)).flatten()


def _replace(parent: nn.Module, name: str, rows: Tensor | None, columns: Tensor | None, stack: ExitStack) -> None:
    original = getattr(parent, name)
    stack.callback(setattr, parent, name, original)
    setattr(parent, name, sliced_linear(original, rows, columns))


@torch.no_grad()
def sliced_linear(
    module: nn.Module, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """The linear layer that ``module`` amounts to on those rows and columns; the base layer where nothing changes.

    Args:
        module: a projection, with or without gates and adapters.
        rows: that are kept; None: all.
        columns: likewise.
        dtype: of the result; None: the base's, to which merged adapters are then rounded.
    """
    if isinstance(module, GatedProjection):
        module = module.projection
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    assert isinstance(base, nn.Linear)
    dtype = dtype or base.weight.dtype
    adapted = None
    if isinstance(module, LoraLayer) and not module.disable_adapters:
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        delta: Tensor = module.get_delta_weight(ADAPTER_NAME)  # type: ignore[operator]
        adapted = (base.weight.to(wide) + delta.to(wide)).to(dtype)
    if adapted is None and rows is None and columns is None and dtype == base.weight.dtype:
        return base
    weight = base.weight.to(dtype) if adapted is None else adapted
    bias: Tensor | None = None if base.bias is None else base.bias.to(dtype)
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = bias[rows.to(weight.device)] if bias is not None else None
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made.train(module.training)
