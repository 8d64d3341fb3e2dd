"""The allocator as a graph: the gates on the stem's output, and the projection of their scores to the budget."""

from __future__ import annotations

import onnx_ir as ir

from l2a_compress.cost import CostModel
from l2a_compress.exporters.blocks import Blocks, Shared
from l2a_compress.exporters.ops import Ops
from l2a_compress.modeling.deciders import level_units
from l2a_compress.modeling.gates import SCORE_LIMIT, demand_levels


def allocate(
    build: Blocks,
    ops: Ops,
    hidden: ir.Value,
    shared: Shared,
    told: ir.Value,
    limits: ir.Value,
    price: ir.Value,
    cost: CostModel,
) -> ir.Value:
    """Kept groups of each layer [batch, layers].

    Args:
        build: of the decoder around it.
        ops: the branch that decides.
        hidden: the stem's output for the prompt, [batch, sequence, width].
        shared: which tokens are real.
        told: [batch, 2], compute and think share.
        limits: [batch, 3], int64: units, layers and groups that may be spent behind the stem.
        price: [batch]: what a compute budget of 1 costs in failures, or, without a demand head, the score that an item
            must exceed; minus infinity where the budget is a cap.
        cost: units of a layer and of a group.
    """
    shape, gates = build.spec.shape, build.spec.gates
    reading = build.spec.reading
    summary = _summary(build, ops, hidden, shared) if reading or gates.has_demand else told
    if gates.has_demand:
        told, limits, price = _demanded(build, ops, summary, told, limits, price, cost)
    features = ops.op("Concat", summary, build.budget(ops, "gates", told), axis=-1) if reading else told
    layers = ops.op("Squeeze", _scores(build, ops, features, "layers", 1), ops.constant([2], "int64"))
    heads = _scores(build, ops, features, "heads", shape.num_groups) if gates.heads else None
    counts = _project(build, ops, layers, heads, limits, price, cost)
    stem = build.part(ops, counts, 0, 1, 1)  # any [batch, 1]
    full = ops.op("Mul", stem, ops.constant(0, "int64"))
    full = ops.op("Add", full, ops.constant([[shape.num_groups] * build.spec.gates.stem_layers], "int64"))
    return ops.op("Concat", full, counts, axis=1)


def _summary(build: Blocks, ops: Ops, hidden: ir.Value, shared: Shared) -> ir.Value:
    """Mean and last state of the prompt, normed. [batch, 2 * width]."""
    kind, hidden = build.spec.gates.summary, build.activation(ops, hidden)
    real = ops.op("Cast", shared.real, to=ir.DataType.FLOAT)
    total = ops.op("Squeeze", ops.op("MatMul", build.unsqueeze(ops, real, 1), hidden), ops.constant([1], "int64"))
    mean = ops.op("Div", total, ops.op("ReduceSum", real, ops.constant([1], "int64"), keepdims=1))
    last = build.at_last(ops, hidden, shared)
    if kind == "mean":
        last = ops.op("Mul", last, ops.constant(0.0, "float32"))
    both = ops.op("Concat", mean, last, axis=-1)
    normed = ops.op(
        "LayerNormalization", both, build.weight(ops, "gates.norm"), build.weight(ops, "gates.norm_bias"), axis=-1
    )
    return ops.op("Mul", normed, ops.constant(0.0, "float32")) if kind == "none" else normed


def _demanded(
    build: Blocks, ops: Ops, summary: ir.Value, told: ir.Value, limits: ir.Value, price: ir.Value, cost: CostModel
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """:class:`l2a_compress.modeling.gates.Demand` as a graph: ``told``, ``limits`` and ``price`` of caps alone."""
    config = build.spec.gates
    levels = demand_levels(config).tolist()

    def each(value: ir.Value, size: int) -> ir.Value:
        """[batch, size] -> [batch * levels, size]."""
        shape = ops.constant([1, len(levels), 1], "int64")
        return ops.op(
            "Reshape", ops.op("Tile", build.unsqueeze(ops, value, 1), shape), ops.constant([-1, size], "int64")
        )

    compute, think = ops.many("Split", told, outputs=2, axis=1, num_outputs=2)
    zeros = ops.op("Mul", think, ops.constant([[0.0] * len(levels)], "float32"))
    offered = ops.op("Add", zeros, ops.constant([levels], "float32"))  # [batch, levels]
    pairs = ops.op("Concat", ops.op("Reshape", offered, ops.constant([-1, 1], "int64")), each(think, 1), axis=1)
    width = 2 * build.spec.shape.hidden_size
    features = ops.op("Concat", each(summary, width), build.budget(ops, "gates.demand", pairs), axis=-1)
    inner = build.silu(ops, build.affine(ops, features, "gates.demand.inner"))
    failure = ops.op("Sigmoid", build.affine(ops, inner, "gates.demand.outer"))
    failure = ops.op("Reshape", failure, ops.constant([-1, len(levels)], "int64"))
    column = build.unsqueeze(ops, price, 1)
    priced = ops.op("Greater", column, ops.constant(-3.0e38, "float32"))  # [batch, 1]
    paid = ops.op("Where", priced, column, ops.constant(0.0, "float32"))
    spent = ops.op("Add", failure, ops.op("Mul", paid, ops.constant([levels], "float32")))
    chosen = ops.op("ArgMin", spent, axis=1, keepdims=1)  # [batch, 1]
    level = ops.op("Gather", ops.constant(levels, "float32"), chosen)
    units = ops.op("Gather", ops.constant(level_units(config, cost), "int64"), chosen)
    told = ops.op("Concat", ops.op("Where", priced, level, compute), think, axis=1)
    most, layers, heads = ops.many("Split", limits, outputs=3, axis=1, num_outputs=3)
    most = ops.op("Where", priced, ops.op("Min", most, units), most)
    limits = ops.op("Concat", most, layers, heads, axis=1)
    return (
        told,
        limits,
        ops.op(
            "Where",
            ops.op("Squeeze", priced, ops.constant([1], "int64")),
            ops.constant(float("-inf"), "float32"),
            price,
        ),
    )


def _scores(build: Blocks, ops: Ops, features: ir.Value, kind: str, outputs: int) -> ir.Value:
    """Bounded scores of all gated layers. [batch, layers, outputs]. ``features``: [batch, any]."""
    name, gated = f"gates.{kind}", build.spec.shape.num_layers - build.spec.gates.stem_layers
    if f"{name}.inner" in build.spec.tensors:
        inner = build.silu(ops, build.affine(ops, features, f"{name}.inner"))
        split = ops.op("Reshape", inner, ops.constant([0, gated, 1, build.spec.gates.hidden], "int64"))
        found = ops.op("MatMul", split, build.weight(ops, f"{name}.outer"))  # [batch, gated, 1, outputs]
    else:  # a row of zeros for each input
        column = ops.op("Mul", build.part(ops, features, 0, 1, 1), ops.constant(0.0, "float32"))
        found = build.unsqueeze(ops, build.unsqueeze(ops, column, 2), 3)
    found = ops.op("Add", found, build.weight(ops, f"{name}.outer_bias"))
    found = ops.op("Reshape", found, ops.constant([0, gated, outputs], "int64"))
    limit = ops.constant(SCORE_LIMIT, "float32")
    return ops.op("Mul", ops.op("Tanh", ops.op("Div", found, limit)), limit)


def _project(
    build: Blocks,
    ops: Ops,
    layers: ir.Value,
    heads: ir.Value | None,
    limits: ir.Value,
    price: ir.Value,
    cost: CostModel,
) -> ir.Value:
    """:func:`l2a_compress.modeling.projection.project` as a graph: kept groups of gated layers [batch, gated]."""
    shape, gates = build.spec.shape, build.spec.gates
    gated, groups = shape.num_layers - gates.stem_layers, shape.num_groups
    least = gates.min_groups if gates.heads else groups

    def whole(value: int | list[int]) -> ir.Value:
        return ops.constant(value, "int64")

    parts, lowest = [layers], None
    for rank in range(groups if groups > least else 0):
        score = ops.op("Gather", heads, whole(rank), axis=2)
        lowest = score if lowest is None else ops.op("Min", lowest, score)
        if rank >= least:
            parts.append(ops.op("Min", lowest, layers))
    # By layer, then by rank, as the stable sort of the reference has them.
    if len(parts) > 1:
        optional = ops.op("Concat", *(build.unsqueeze(ops, part, 2) for part in parts[1:]), axis=2)
        flat = ops.op("Reshape", optional, whole([0, gated * (groups - least)]))
        scores = ops.op("Concat", layers, flat, axis=1)
    else:
        scores = layers
    count = gated * (1 + groups - least)
    scores, order = ops.many("TopK", scores, whole([count]), outputs=2, axis=1, largest=1, sorted=1)
    is_layer = ops.op("Less", order, whole(gated))
    place = ops.op("Div", ops.op("Sub", order, whole(gated)), whole(max(groups - least, 1)))
    owner = ops.op("Where", is_layer, order, place)
    items = ops.op("Where", is_layer, whole(least), whole(1))
    costs = ops.op("Where", is_layer, whole(cost.layer_units + least * cost.group_units), whole(cost.group_units))
    units, most_layers, most_heads = ops.many("Split", limits, outputs=3, axis=1, num_outputs=3)
    wanted = ops.op("Greater", scores, build.unsqueeze(ops, price, 1))

    def sums(value: ir.Value) -> ir.Value:
        return ops.op("CumSum", value, whole(1))

    def number(value: ir.Value) -> ir.Value:
        return ops.op("Cast", value, to=ir.DataType.INT64)

    room = ops.op("LessOrEqual", sums(number(is_layer)), most_layers)
    fits = ops.op("And", wanted, ops.op("LessOrEqual", sums(costs), units))
    fits = ops.op("And", fits, ops.op("LessOrEqual", sums(items), most_heads))
    fits = ops.op("And", fits, ops.op("Or", ops.op("Not", is_layer), room))
    taken = ops.op("Equal", sums(number(ops.op("Not", fits))), whole(0))
    # By comparison and sum: TensorRT does not know a ScatterElements that adds.
    owned_by = ops.op("Equal", build.unsqueeze(ops, owner, 2), whole(list(range(gated))))  # [batch, items, gated]

    def by_layer(value: ir.Value) -> ir.Value:
        """Sums of [batch, items] over the items of each layer."""
        return ops.op(
            "ReduceSum", ops.op("Where", owned_by, build.unsqueeze(ops, value, 2), whole(0)), whole([1]), keepdims=0
        )

    kept = by_layer(number(ops.op("And", taken, is_layer)))
    owned = ops.op("Greater", ops.op("GatherElements", kept, owner, axis=1), whole(0))
    more = ops.op("And", ops.op("And", owned, wanted), ops.op("Not", is_layer))
    asked = ops.op("Or", taken, more)
    within = ops.op("LessOrEqual", sums(ops.op("Mul", costs, number(asked))), units)
    heads_fit = ops.op("LessOrEqual", sums(ops.op("Mul", items, number(asked))), most_heads)
    taken = ops.op("And", ops.op("And", asked, within), heads_fit)
    return by_layer(ops.op("Mul", items, number(taken)))
