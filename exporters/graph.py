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
from l2a_compress.exporters.blocks import BATCH, Blocks, Cache
from l2a_compress.exporters.ops import graph_input, graph_output, model_of
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
        hidden = ops.op("Add", hidden, ops.op("Mul", at_think, ops.constant(offset, "float32")))
    presents: dict[int, Cache] = {}
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
    told = graph_input("budget", "float32", [BATCH, 2])
    limits = graph_input("limits", "int64", [BATCH, 3])
    price = graph_input("price", "float32", [BATCH])
    given = graph_input("allocation", "int64", [BATCH, shape.num_layers])
    caches = [build.cache(index, shape.num_groups) for index in range(shape.num_layers)]
    shared = build.shared(*inputs)
    hidden = build.embed(inputs[0])
    if spec.gates.tokens:
        offset = build.matmul(ops, build.budget(ops, "transition", told), "transition.at_think")
        hidden = ops.op("Add", hidden, ops.op("Mul", build.at_think(inputs[0]), build.unsqueeze(ops, offset, 1)))
    presents: dict[int, Cache] = {}
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
    kept = build.unsqueeze(ops, allocation, 2)
    heads = ops.op("Greater", kept, ops.constant(range(shape.num_groups), "int64"))  # [batch, layers, groups]
    heads = ops.op("Cast", heads, to=ir.DataType.FLOAT)
    for index in range(stem, shape.num_layers):
        hidden, presents[index] = build.gated_layer(index, hidden, caches[index], shared, widest, heads)

    last = build.last(hidden, shared)
    outputs = [graph_output(build.head(last), "logits", "float32", [BATCH, 1, shape.vocab_size])]
    outputs.append(graph_output(allocation, "kept_groups", "int64", [BATCH, shape.num_layers]))
    if spec.gates.tokens:
        outputs.append(graph_output(build.tau(last, told), "tau", "float32", [BATCH]))
    outputs += build.presents(presents, [shape.num_groups] * shape.num_layers)
    inputs = [*inputs, told, limits, price, given, *(value for pair in caches for value in pair)]
    return model_of(ops, inputs, outputs, name="if_graph")


def _blocks(spec: GraphSpec) -> Blocks:
    return OrtBlocks(spec) if spec.dialect == "ort" else StandardBlocks(spec)
