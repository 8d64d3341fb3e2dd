"""What TensorRT refuses in an ONNX graph, found and named before its builder fails with an error that names neither.

Each rule was measured on TensorRT-RTX 1.7.1 (``tests/unit/bad_graphs.py`` has a graph for each that it refuses).
Where the builder takes some graphs of a kind and fails on others, the rule keeps to what it always takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from l2a_compress.exporters.facts import Values, initializers, nodes

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_LEAST_HEADS = 4
# Inputs that say how large an output is, by operator.
_SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
}
_UNSIZED = ("Compress", "NonZero", "Unique", "StringNormalizer")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One node, or tensor, that breaks a rule.

    Attributes:
        node: its name, or that of its first output.
        kind: its operator.
        rule: short name of the rule.
        found: what is wrong.
        fix: what to do.
    """

    node: str
    kind: str
    rule: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.kind}) breaks the rule {self.rule}: {self.found}; {self.fix}"


def check(model: ModelProto) -> list[Finding]:
    """All findings in a model, those of its branches included. External weights need not be loaded."""
    with suppress(onnx.shape_inference.InferenceError):  # then what is known without it is checked
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = Values(inputs={value.name for value in model.graph.input})
    values.learn(model.graph)
    found = list(_places(model.graph))
    for node, inside in nodes(model.graph):
        for rule in _RULES:
            found += rule(node, inside, values)
    return found


def _finding(node: NodeProto, rule: str, found: str, fix: str) -> Finding:
    name = node.name or next(iter(node.output), "?")
    return Finding(node=name, kind=node.op_type, rule=rule, found=found, fix=fix)


def _standard(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.domain not in ("", "ai.onnx"):
        yield _finding(
            node,
            "standard-operators",
            f"it is of the domain {node.domain}, for which TensorRT has no plugin",
            "export with --dialect standard",
        )


def _nested(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type in ("If", "Loop", "Scan") and inside:
        yield _finding(
            node,
            "no-nesting",
            f"it stands inside of {' and '.join(inside)}",
            "join the predicates by And and let one If follow the other",
        )


def _predicate(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type != "If":
        return
    kind, dims = values.types.get(node.input[0]), values.dims.get(node.input[0])
    if kind is not None and kind != TensorProto.BOOL:
        yield _finding(
            node,
            "bool-predicate",
            f"its predicate {node.input[0]} is of the type {TensorProto.DataType.Name(kind)}",
            "compare it with a number, or cast it to BOOL",
        )
    if dims is not None and any(size != 1 for size in dims):
        yield _finding(
            node,
            "scalar-predicate",
            f"its predicate {node.input[0]} has the shape {dims}",
            "reduce or gather it to one element",
        )


def _outputs(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type != "If":
        return
    by_name = {attribute.name: attribute.g for attribute in node.attribute}
    then, otherwise = by_name["then_branch"], by_name["else_branch"]
    for place, (one, other) in enumerate(zip(then.output, otherwise.output, strict=False)):
        rule = f"output {place} of its branches, {one.name} and {other.name}, differs in"
        kinds = {values.types.get(one.name), values.types.get(other.name)} - {None}
        if len(kinds) > 1:
            names = " and ".join(sorted(TensorProto.DataType.Name(kind) for kind in kinds if kind))
            yield _finding(node, "equal-types", f"{rule} type: {names}", "cast one of them")
        shapes = [values.dims.get(value.name) for value in (one, other)]
        if None in shapes:
            continue
        first, second = (shape or [] for shape in shapes)
        if len(first) != len(second):
            yield _finding(node, "equal-ranks", f"{rule} rank: {len(first)} and {len(second)}", "reshape one of them")
        elif any(a is not None and b is not None and a != b for a, b in zip(first, second, strict=True)):
            yield _finding(
                node,
                "equal-shapes",
                f"{rule} shape: {first} and {second}",
                "give both one shape; keep what grows, such as keys and values, outside of the If",
            )


def _attention(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type != "Attention" or node.domain:
        return
    primitive = "write it as MatMul, Softmax and MatMul"
    if "If" in inside:
        yield _finding(node, "attention-outside-if", "it stands inside of an If", primitive)
    if len([name for name in node.output if name]) > 1 or any(node.input[4:6]):
        yield _finding(
            node,
            "attention-without-cache",
            "it reads past keys and values, or gives more than one output",
            "put the new keys and values behind the past ones by Concat or TensorScatter before it",
        )
    dims, kind = values.dims.get(node.input[0]), values.types.get(node.input[0])
    if dims is None or len(dims) != 4:
        return  # three dimensions are taken apart by the builder itself
    heads = dims[1]
    if (heads is not None and heads < _LEAST_HEADS) or (kind is not None and kind not in _HALVES):
        yield _finding(
            node,
            "attention-kernel",
            f"{heads} query heads of {TensorProto.DataType.Name(kind or 0)} in four dimensions have no kernel",
            f"{primitive}, or give it three dimensions, or at least {_LEAST_HEADS} heads of 16 bits",
        )


def _sizes(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    for place in _SIZES.get(node.op_type, ()):
        if place < len(node.input) and node.input[place] and (name := values.float_from_input(node.input[place])):
            yield _finding(
                node,
                "no-float-in-a-shape",
                f"its size {node.input[place]} comes from {name}, a float that depends on an input",
                "compute sizes from integers and shapes alone; choose among fixed sizes by If",
            )


def _scatter(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type in ("ScatterElements", "ScatterND"):
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        if reduction != "none":
            yield _finding(
                node, "plain-scatter", f"it has the reduction {reduction}", "compare indices with a range and sum"
            )
    if node.op_type == "TensorScatter" and (inside or node.input[0] not in values.inputs):
        yield _finding(
            node,
            "cache-is-an-input",
            f"it writes into {node.input[0]}" + (" inside of an If" if inside else ", which is no input of the graph"),
            "write into past keys and values, which are inputs, outside of every If",
        )


def _unsized(node: NodeProto, inside: tuple[str, ...], values: Values) -> Iterator[Finding]:
    if node.op_type in _UNSIZED:
        yield _finding(
            node, "known-sizes", "how large its output is depends on the values of its input", "use a mask and Where"
        )


def _places(graph: GraphProto) -> Iterator[Finding]:
    """Two tensors that begin at one place of a weight file must be equally long."""
    known: dict[tuple[str, int], tuple[str, int]] = {}
    for tensor in initializers(graph):
        place: Mapping[str, str] = {item.key: item.value for item in tensor.external_data}
        if not place:
            continue
        start, length = (place["location"], int(place.get("offset", 0))), int(place.get("length", 0))
        name, other = known.setdefault(start, (tensor.name, length))
        if other != length:
            yield Finding(
                node=tensor.name,
                kind="initializer",
                rule="one-tensor-at-a-place",
                found=f"it begins where {name} begins and has {length} bytes instead of {other}",
                fix="keep one of them and slice it",
            )


_RULES: tuple[Callable[[NodeProto, tuple[str, ...], Values], Iterator[Finding]], ...] = (
    _standard,
    _nested,
    _predicate,
    _outputs,
    _attention,
    _sizes,
    _scatter,
    _unsized,
)
