"""An ``If`` graph with its decisions taken: what is left is the computation of one allocation, without any ``If``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto

_LAYER = re.compile(r"layer_(\d+)(?:_width_(\d+)|_mlp)?_then")


def specialize(model: ModelProto, widths: Sequence[int], kept: Sequence[int]) -> ModelProto:
    """Replaces each ``If`` of a graph of the dialect ``standard`` by the branch that runs.

    Args:
        model: the graph ``if`` or ``told``; external weights need not be loaded.
        widths: groups that its layers can run with, ascending (``Bundle.widths``).
        kept: groups that each layer keeps.

    Returns:
        A new model. Inputs that nothing reads any more are left out.
    """
    found = ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    nodes: list[NodeProto] = []
    same: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        branch = _branch(node, widths, kept)
        graph.initializer.extend(branch.initializer)
        nodes += branch.node
        same |= dict(zip(node.output, (value.name for value in branch.output), strict=True))
    _rename(nodes, graph, same)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    inputs = [value for value in graph.input if value.name in read]
    del graph.input[:]
    graph.input.extend(inputs)
    return found


def _branch(node: NodeProto, widths: Sequence[int], kept: Sequence[int]) -> GraphProto:
    branches = {attribute.name: attribute.g for attribute in node.attribute}
    then: GraphProto = branches["then_branch"]
    otherwise: GraphProto = branches["else_branch"]
    found = _LAYER.fullmatch(then.name)
    if found is None:  # the allocator's, which is not asked
        return otherwise
    count = kept[int(found[1])]
    runs = count > 0
    if found[2] is not None:
        runs = runs and min(width for width in widths if width >= count) == int(found[2])
    return then if runs else otherwise


def _rename(nodes: Sequence[NodeProto], graph: GraphProto, same: Mapping[str, str]) -> None:
    """Lets the output of a branch have the name that the ``If`` gave it."""
    names = {inner: outer for outer, inner in same.items()}
    for node in nodes:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
