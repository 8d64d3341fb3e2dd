"""The decoder as an ONNX graph: static, fixed to one allocation, or with an ``If`` per layer.

    input_ids -> embed (+ e(b) at <think>) -> stem -> [allocator] -> gated layers -> norm -> head of the last token

Inputs and outputs are those of docs/bundle.md. What a layer is made of is up to the dialect: ``ort`` or ``standard``.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from l2a_compress.allocation import Allocation
from l2a_compress.cost import CostModel
from l2a_compress.exporters.allocator import allocate
from l2a_compress.exporters.blocks import BATCH, Blocks, Present
from l2a_compress.exporters.ops import TYPES, graph_input, graph_output, model_of
from l2a_compress.exporters.ort import OrtBlocks
from l2a_compress.exporters.spec import GraphSpec
from l2a_compress.exporters.standard import StandardBlocks


def static_graph(spec: GraphSpec, allocation: Allocation, offset: Sequence[float] | None) -> ir.Model:
    """One allocation, whose skipped layers and pruned groups are not there at all.

    Args:
        spec: of the model.
        allocation: keeps a prefix of each layer's groups.
        offset: what is added at ``<think>`` under the budget of this variant, [width]; None for nothing.
    """
    build = _blocks(spec)
    ops, inputs = build.ops, build.common_inputs()
    widths = [len(kept) for kept in allocation.groups]
    caches = {index: build.cache(index, width) for index, width in enumerate(widths) if width}
    shared = build.shared(*inputs)
    hidden = build.embed(inputs[0])
    if offset is not None:
        at_think = build.at_think(inputs[0])
        hidden = ops.op("Add", hidden, ops.op("Mul", at_think, build.number(ops, offset)))
    presents: dict[int, Present] = {}
    for index, cache in caches.items():
        hidden, presents[index] = build.layer(ops, index, hidden, cache, shared, widths[index])
    logits = build.head(build.last(hidden, shared))
    outputs = [graph_output(logits, "logits", "float32", [BATCH, 1, spec.shape.vocab_size])]
    outputs += build.presents(presents, widths)
    return model_of(ops, [*inputs, *(value for pair in caches.values() for value in pair)], outputs, name="variant")


def if_graph(spec: GraphSpec, cost: CostModel) -> ir.Model:
    """Every allocation in one graph: gates decide where ``allocation`` is -1, and each layer stands in an ``If``."""
    build = _blocks(spec)
    ops, shape = build.ops, spec.shape
    inputs = build.common_inputs()
    told, limits, price = decision = build.decision_inputs()
    given = graph_input("allocation", "int64", [BATCH, shape.num_layers])
    caches = [build.cache(index, shape.num_groups) for index in range(shape.num_layers)]
    shared = build.shared(*inputs)
    hidden = build.embed_told(inputs[0], told)
    presents: dict[int, Present] = {}
    stem = spec.gates.stem_layers
    for index in range(stem):
        hidden, presents[index] = build.layer(ops, index, hidden, caches[index], shared, shape.num_groups)

    undecided = ops.op("Less", ops.op("ReduceMin", given, keepdims=0), ops.constant(0, "int64"))
    (allocation,) = ops.choose(
        "allocator",
        undecided,
        lambda inner: [allocate(build, inner, hidden, shared, told, limits, price, cost)],
        lambda inner: [inner.op("Identity", given)],
        1,
    )
    widest = ops.op("ReduceMax", allocation, ops.constant([0], "int64"), keepdims=0)  # [layers]
    heads = _head_masks(build, allocation)
    for index in range(stem, shape.num_layers):
        hidden, presents[index] = build.gated_layer(index, hidden, caches[index], shared, widest, heads)

    last = build.last(hidden, shared)
    outputs = [graph_output(build.head(last), "logits", "float32", [BATCH, 1, shape.vocab_size])]
    outputs.append(graph_output(allocation, "kept_groups", "int64", [BATCH, shape.num_layers]))
    if spec.gates.tokens:
        outputs.append(graph_output(build.tau(last, told), "tau", "float32", [BATCH]))
    outputs += build.presents(presents, [shape.num_groups] * shape.num_layers)
    inputs = [*inputs, *decision, given, *(value for pair in caches for value in pair)]
    return model_of(ops, inputs, outputs, name="if_graph")


def told_graph(spec: GraphSpec) -> ir.Model:
    """As the ``If`` graph, without its gates: the host says what runs, and knows every predicate before the run.

    Beside ``allocation``, whose entries are all at least 0, a scalar ``runs.L.N`` for each gated layer and width:
    whether the widest row of the layer keeps at most N groups and more than the width below.
    """
    build = StandardBlocks(spec)
    ops, shape, stem = build.ops, spec.shape, spec.gates.stem_layers
    inputs = build.common_inputs()
    told = graph_input("budget", "float32", [BATCH, 2])
    given = graph_input("allocation", "int64", [BATCH, shape.num_layers])
    caches = [build.cache(index, shape.num_groups) for index in range(shape.num_layers)]
    shared = build.shared(*inputs)
    hidden = build.embed_told(inputs[0], told)
    heads = _head_masks(build, given)
    presents: dict[int, Present] = {}
    flags: list[ir.Value] = []
    for index in range(shape.num_layers):
        if index < stem:
            hidden, presents[index] = build.layer(ops, index, hidden, caches[index], shared, shape.num_groups)
            continue
        runs = [graph_input(f"runs.{index}.{width}", "bool", []) for width in spec.widths]
        flags += runs
        hidden, presents[index] = build.told_layer(index, hidden, caches[index], shared, runs, heads)
    last = build.last(hidden, shared)
    outputs = [graph_output(build.head(last), "logits", "float32", [BATCH, 1, shape.vocab_size])]
    if spec.gates.tokens:
        outputs.append(graph_output(build.tau(last, told), "tau", "float32", [BATCH]))
        inputs.append(told)
    outputs += build.presents(presents, [shape.num_groups] * shape.num_layers)
    inputs += [given, *flags, *(value for pair in caches for value in pair)]
    return model_of(ops, inputs, outputs, name="told_graph")


def _head_masks(build: Blocks, allocation: ir.Value) -> ir.Value:
    """1 where a row keeps the group of a channel. [batch, layers, channels of all heads]."""
    ops, shape = build.ops, build.spec.shape
    size = shape.heads_per_group * shape.head_dim
    owners = [channel // size for channel in range(shape.num_groups * size)]
    heads = ops.op("Greater", build.unsqueeze(ops, allocation, 2), ops.constant(owners, "int64"))
    return ops.op("Cast", heads, to=TYPES[build.spec.dtype])


def router_graph(spec: GraphSpec, cost: CostModel, variants: Sequence[tuple[float, Allocation]]) -> ir.Model:
    """What the gates choose for a prompt, without the layers behind them: the stem and the allocator alone.

    Where there are ``variants`` (budget, allocation), also which of them serves the prompt best: of the largest budget
    that is within the row's, the one whose groups differ least from what the gates choose.
    """
    build = _blocks(spec)
    ops, shape = build.ops, spec.shape
    inputs, decision = build.common_inputs(), build.decision_inputs()
    told, limits, price = decision
    shared = build.shared(*inputs)
    hidden = build.embed_told(inputs[0], told)
    for index in range(spec.gates.stem_layers):
        hidden, _ = build.layer(ops, index, hidden, (None, None), shared, shape.num_groups)
    kept = allocate(build, ops, hidden, shared, told, limits, price, cost)

    outputs = [graph_output(kept, "kept_groups", "int64", [BATCH, shape.num_layers])]
    if variants:
        outputs.append(graph_output(_nearest(build, kept, told, variants), "variant", "int64", [BATCH]))
    return model_of(ops, [*inputs, *decision], outputs, name="router")


def _nearest(build: Blocks, kept: ir.Value, told: ir.Value, variants: Sequence[tuple[float, Allocation]]) -> ir.Value:
    """Place of the variant that serves each row; -1 where all are beyond its budget. [batch]."""
    ops, shape = build.ops, build.spec.shape
    widths = ops.constant([[len(groups) for groups in allocation.groups] for _, allocation in variants], "int64")
    apart = ops.op("Abs", ops.op("Sub", build.unsqueeze(ops, kept, 1), widths))
    apart = ops.op("ReduceSum", apart, ops.constant([2], "int64"), keepdims=0)  # [batch, variants]
    budgets = ops.constant([budget for budget, _ in variants], "float32")
    asked = ops.op("Add", build.part(ops, told, 0, 1, 1), ops.constant(1e-6, "float32"))
    within = ops.op("Where", ops.op("LessOrEqual", budgets, asked), budgets, ops.constant(-1.0, "float32"))
    largest = ops.op("ReduceMax", within, ops.constant([1], "int64"), keepdims=1)  # [batch, 1]
    far = ops.constant(shape.num_layers * shape.num_groups + 1, "int64")
    apart = ops.op("Where", ops.op("Equal", within, largest), apart, far)
    nearest = ops.op("ArgMin", apart, axis=1, keepdims=0)
    none = ops.op("Less", ops.op("Squeeze", largest, ops.constant([1], "int64")), ops.constant(0.0, "float32"))
    return ops.op("Where", none, ops.constant(-1, "int64"), nearest)


def _blocks(spec: GraphSpec) -> Blocks:
    return OrtBlocks(spec) if spec.dialect == "ort" else StandardBlocks(spec)
