"""What is known of the nodes and values of an ONNX model, those of branches included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_MEASURES = ("Shape", "Size")  # what depends on sizes alone, whatever is in their input


def nodes(graph: GraphProto, inside: tuple[str, ...] = ()) -> Iterator[tuple[NodeProto, tuple[str, ...]]]:
    """All nodes with the kinds of the nodes around them, the outermost first."""
    for node in graph.node:
        yield node, inside
        for branch in branches(node):
            yield from nodes(branch, (*inside, node.op_type))


def branches(node: NodeProto) -> list[GraphProto]:
    """The graphs within a node."""
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph and of its branches."""
    yield from graph.initializer
    for node in graph.node:
        for branch in branches(node):
            yield from initializers(branch)


@dataclass
class Values:
    """What is known of all values of a model, those of branches included."""

    producers: dict[str, NodeProto] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    dims: dict[str, list[int | None]] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)  # of the outermost graph

    def learn(self, graph: GraphProto) -> None:
        """Takes in a graph and its branches."""
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                self.types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.dims[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        for initializer in graph.initializer:
            self.types[initializer.name] = initializer.data_type
            self.dims[initializer.name] = list(initializer.dims)
        for node in graph.node:
            self.producers.update(dict.fromkeys(node.output, node))
            for branch in branches(node):
                self.learn(branch)

    def float_from_input(self, start: str) -> str | None:
        """A float on the way from what the graph's inputs hold to a size."""
        for name in self._behind(start):
            if self.types.get(name) in _FLOATS and not self.inputs.isdisjoint(self._behind(name)):
                return name
        return None

    def _behind(self, start: str) -> Iterator[str]:
        """A value and all that it depends on, but for what only the size of matters."""
        seen, left = set[str](), [start]
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            producer = self.producers.get(name)
            if producer is not None and producer.op_type not in _MEASURES:
                left += producer.input
