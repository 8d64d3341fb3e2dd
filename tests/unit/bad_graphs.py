"""Small graphs, one for each rule of ``exporters/rules.py`` and its variants, that TensorRT-RTX refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

GRAPHS: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {}  # by name: the rule it breaks, and how it is made
WEIGHTS = "weights.bin"  # that the graph of two tensors at one place reads
Dims = Sequence[int | str]


def _breaks(rule: str) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    def keep(make: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        GRAPHS[make.__name__] = (rule, make)
        return make

    return keep


def value(name: str, dims: Dims = (2, 4), dtype: int = T.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def constant(name: str, numbers: object, dtype: str = "int64") -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(numbers, dtype=dtype), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def branch(node: onnx.NodeProto, dims: Dims = (2, 4), dtype: int = T.FLOAT, *more: onnx.NodeProto) -> onnx.GraphProto:
    """One node, and others before it, whose output leaves the branch."""
    return helper.make_graph([*more, node], f"of_{node.output[0]}", [], [value(node.output[0], dims, dtype)])


def choice(
    then: onnx.GraphProto, otherwise: onnx.GraphProto, *, predicate: str = "go", out: str = "y"
) -> onnx.NodeProto:
    return helper.make_node("If", [predicate], [out], name=f"if_{out}", then_branch=then, else_branch=otherwise)


def relu(dims: Dims = (2, 4), source: str = "x", out: str = "a") -> onnx.GraphProto:
    return branch(helper.make_node("Relu", [source], [out]), dims)


def same(dims: Dims = (2, 4), source: str = "x", out: str = "b", dtype: int = T.FLOAT) -> onnx.GraphProto:
    return branch(helper.make_node("Identity", [source], [out]), dims, dtype)


FREE: Dims = ("batch", 4)  # some graphs are refused only where a size is free, as it is in ours
FLAGS = [value("go", (), T.BOOL), value("go_on", (), T.BOOL)]
SQUARE = constant("m", np.ones((4, 4)), "float32")
CUT = [constant("zero", [0]), constant("two", [2]), constant("one", [1])]
AFTER = helper.make_node("Softmax", ["c"], ["y"], name="after", axis=1)


def half_of_x() -> onnx.GraphProto:
    return branch(helper.make_node("Slice", ["x", "zero", "two", "one"], ["b"]), ("batch", 2))


def good() -> onnx.ModelProto:
    """What all of these would be without their fault."""
    return model([choice(relu(), same())], [value("x"), value("go", (), T.BOOL)], [value("y")])


@_breaks("bool-predicate")
def integer_predicate() -> onnx.ModelProto:
    return model([choice(relu(), same())], [value("x"), value("go", (), T.INT32)], [value("y")])


@_breaks("bool-predicate")
def float_predicate() -> onnx.ModelProto:
    return model([choice(relu(), same())], [value("x"), value("go", ())], [value("y")])


@_breaks("scalar-predicate")
def predicate_of_two() -> onnx.ModelProto:
    return model([choice(relu(), same())], [value("x"), value("go", (2,), T.BOOL)], [value("y")])


@_breaks("no-nesting")
def nested_if() -> onnx.ModelProto:
    first = helper.make_node("MatMul", ["x", "m"], ["h"])
    outer = choice(branch(inner_if("a"), FREE, T.FLOAT, first), same(FREE))
    return model([outer], [value("x", FREE), *FLAGS], [value("y", FREE)], [SQUARE])


def if_after_if() -> onnx.ModelProto:
    """What the graph above would be without its fault."""
    first = choice(branch(helper.make_node("MatMul", ["x", "m"], ["a"]), FREE), same(FREE), out="h")
    return model([first, inner_if("y")], [value("x", FREE), *FLAGS], [value("y", FREE)], [SQUARE])


def inner_if(out: str) -> onnx.NodeProto:
    then = branch(helper.make_node("MatMul", ["h", "m"], ["c"]), FREE)
    return choice(then, same(FREE, "h", "d"), predicate="go_on", out=out)


@_breaks("no-nesting")
def loop_in_if() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Relu", ["in"], ["out"])],
        "body",
        [value("round", (), T.INT64), value("on", (), T.BOOL), value("in")],
        [value("still", (), T.BOOL), value("out")],
    )
    loop = helper.make_node("Loop", ["rounds", "", "x"], ["a"], name="loop", body=body)
    flags = [value("x"), value("go", (), T.BOOL)]
    return model([choice(branch(loop), same())], flags, [value("y")], [constant("rounds", 3)])


@_breaks("equal-ranks")
def branches_of_two_ranks() -> onnx.ModelProto:
    flat = branch(helper.make_node("Reshape", ["x", "dims"], ["b"]), (8,))
    made = model([choice(relu(), flat)], [value("x"), value("go", (), T.BOOL)], [value("y")], [constant("dims", [8])])
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return made


@_breaks("equal-shapes")
def branches_of_two_widths() -> onnx.ModelProto:
    return model(
        [choice(relu(FREE), half_of_x(), out="c"), AFTER], [value("x", FREE), *FLAGS[:1]], [value("y", FREE)], CUT
    )


def branches_of_one_width() -> onnx.ModelProto:
    """What the graph above would be without its fault."""
    return model([choice(relu(FREE), same(FREE), out="c"), AFTER], [value("x", FREE), *FLAGS[:1]], [value("y", FREE)])


@_breaks("equal-types")
def branches_of_two_types() -> onnx.ModelProto:
    half = branch(helper.make_node("Cast", ["x"], ["b"], to=T.FLOAT16), (2, 4), T.FLOAT16)
    return model([choice(relu(), half)], [value("x"), value("go", (), T.BOOL)], [value("y")])


def attention(heads: int, dtype: int = T.FLOAT16, queries: int = 1, keys: int = 64) -> list[onnx.ValueInfoProto]:
    """Queries, keys, values."""
    return [value("q", (1, heads, queries, 64), dtype), *(value(n, (1, heads, keys, 64), dtype) for n in ("k", "v"))]


@_breaks("attention-outside-if")
def attention_in_if() -> onnx.ModelProto:
    dims = (1, 8, 4, 64)
    inside = branch(helper.make_node("Attention", ["q", "k", "v"], ["a"], name="attention"), dims, T.FLOAT16)
    inputs = [*attention(8, queries=4), value("go", (), T.BOOL)]
    return model([choice(inside, same(dims, "q", "b", T.FLOAT16))], inputs, [value("y", dims, T.FLOAT16)])


@_breaks("attention-without-cache")
def attention_with_past() -> onnx.ModelProto:
    names = ["q", "k", "v", "", "past_k", "past_v"]
    node = helper.make_node("Attention", names, ["y", "new_k", "new_v"], name="attention")
    past = [value(name, (1, 8, 6, 64), T.FLOAT16) for name in names[4:]]
    new = [value(name, (1, 8, 70, 64), T.FLOAT16) for name in ("new_k", "new_v")]
    return model([node], [*attention(8), *past], [value("y", (1, 8, 1, 64), T.FLOAT16), *new])


@_breaks("attention-kernel")
def attention_of_two_heads() -> onnx.ModelProto:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    return model([node], attention(2), [value("y", (1, 2, 1, 64), T.FLOAT16)])


@_breaks("attention-kernel")
def attention_of_32_bits() -> onnx.ModelProto:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    return model([node], attention(8, T.FLOAT, 4, 4), [value("y", (1, 8, 4, 64))])


@_breaks("standard-operators")
def group_query_attention() -> onnx.ModelProto:
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "lengths", "total"],
        ["y", "new_k", "new_v"],
        domain="com.microsoft",
        name="attention",
        num_heads=8,
        kv_num_heads=4,
        scale=0.125,
    )
    inputs = [value("q", (1, 1, 512), T.FLOAT16), *(value(n, (1, 1, 256), T.FLOAT16) for n in ("k", "v"))]
    inputs += [value(name, (1, 4, 16, 64), T.FLOAT16) for name in ("past_k", "past_v")]
    inputs += [value(name, (1,), T.INT32) for name in ("lengths", "total")]
    outputs = [value("y", (1, 1, 512), T.FLOAT16)]
    return model([node], inputs, outputs + [value(n, (1, 4, 16, 64), T.FLOAT16) for n in ("new_k", "new_v")])


@_breaks("standard-operators")
def four_bits_of_onnxruntime() -> onnx.ModelProto:
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", name="mm", K=64, N=16, bits=4, block_size=32
    )
    weights = [constant("w", np.ones((16, 2, 16)), "uint8"), constant("s", np.ones((16, 2)), "float16")]
    return model([node], [value("x", (2, 64), T.FLOAT16)], [value("y", (2, 16), T.FLOAT16)], weights)


@_breaks("standard-operators")
def transposing_product_of_onnxruntime() -> onnx.ModelProto:
    node = helper.make_node("FusedMatMul", ["x", "m"], ["y"], domain="com.microsoft", name="mm", transB=1)
    return model([node], [value("x")], [value("y")], [constant("m", np.ones((4, 4)), "float32")])


def _part_of_budget() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Mul", ["budget", "four"], ["share"]),
        helper.make_node("Cast", ["share"], ["count"], to=T.INT64),
    ]


@_breaks("no-float-in-a-shape")
def budget_cuts_channels() -> onnx.ModelProto:
    cut = helper.make_node("Slice", ["x", "zero", "count", "one"], ["y"], name="cut")
    weights = [constant("four", 4, "float32"), constant("zero", [0]), constant("one", [1])]
    return model([*_part_of_budget(), cut], [value("x"), value("budget", (1,))], [value("y", (2, "kept"))], weights)


@_breaks("no-float-in-a-shape")
def budget_counts_best() -> onnx.ModelProto:
    best = helper.make_node("TopK", ["x", "count"], ["y", "place"], name="best")
    outputs = [value("y", (2, "kept")), value("place", (2, "kept"), T.INT64)]
    inputs = [value("x"), value("budget", (1,))]
    return model([*_part_of_budget(), best], inputs, outputs, [constant("four", 4, "float32")])


@_breaks("plain-scatter")
def scatter_that_adds() -> onnx.ModelProto:
    node = helper.make_node("ScatterElements", ["x", "at", "more"], ["y"], name="scatter", axis=1, reduction="add")
    return model([node], [value("x"), value("at", (2, 4), T.INT64), value("more")], [value("y")])


@_breaks("plain-scatter")
def scatter_of_rows_that_adds() -> onnx.ModelProto:
    node = helper.make_node("ScatterND", ["x", "at", "more"], ["y"], name="scatter", reduction="add")
    return model([node], [value("x"), value("at", (1, 1), T.INT64), value("more", (1, 4))], [value("y")])


@_breaks("cache-is-an-input")
def cache_written_in_if() -> onnx.ModelProto:
    dims = (1, 8, 16, 64)
    write = branch(helper.make_node("TensorScatter", ["cache", "k", "at"], ["a"], name="write", axis=2), dims)
    inputs = [value("cache", dims), value("k", (1, 8, 1, 64)), value("at", (1,), T.INT64), value("go", (), T.BOOL)]
    return model([choice(write, same(dims, "cache"))], inputs, [value("y", dims)])


@_breaks("known-sizes")
def what_is_not_zero() -> onnx.ModelProto:
    node = helper.make_node("NonZero", ["x"], ["y"], name="nonzero")
    return model([node], [value("x")], [value("y", (2, "found"), T.INT64)])


@_breaks("known-sizes")
def what_is_there_once() -> onnx.ModelProto:
    node = helper.make_node("Unique", ["x"], ["y"], name="unique")
    return model([node], [value("x", (8,), T.INT64)], [value("y", ("found",), T.INT64)])


@_breaks("one-tensor-at-a-place")
def two_tensors_at_one_place() -> onnx.ModelProto:
    def stored(name: str, rows: int) -> onnx.TensorProto:
        tensor = T(name=name, data_type=T.FLOAT, dims=[rows, 4], data_location=T.EXTERNAL)
        for key, text in (("location", WEIGHTS), ("offset", "0"), ("length", str(16 * rows))):
            tensor.external_data.add(key=key, value=text)
        return tensor

    nodes = [
        helper.make_node("Gemm", ["x", "whole"], ["y"], name="whole_product", transB=1),
        helper.make_node("Gemm", ["x", "part"], ["z"], name="part_product", transB=1),
    ]
    return model(nodes, [value("x")], [value("y", (2, 8)), value("z")], [stored("whole", 8), stored("part", 4)])
