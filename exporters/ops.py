"""A thin layer over onnx-ir: named values, constants and subgraphs, so that a graph reads like the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # gives NumPy its bfloat16
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from l2a_compress.bundle import WEIGHT_FILE
from l2a_compress.exporters.weights import Stored

CONTRIB = "com.microsoft"
OPSET = 23
TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}
Dims = Sequence[int | str]


class Ops:
    """Nodes of one graph, or of one branch of an ``If``."""

    def __init__(self, outer: Ops | None = None) -> None:
        self.tape = ir.tape.Tape()
        self.outer = outer
        self.root: Ops = outer.root if outer else self
        self.initializers: dict[str, ir.Value] = {}
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self._named(self.tape.op(kind, inputs, attributes or None, domain=domain))

    def many(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """One node with several outputs."""
        found = self.tape.op_multi_out(kind, inputs, attributes or None, num_outputs=outputs, domain=domain)
        return [self._named(value) for value in found]

    def constant(self, value: Any, dtype: str) -> ir.Value:
        """A small constant, stored in the graph itself; equal ones are one."""
        array = np.asarray(value, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        root, key = self.root, (dtype, array.shape, array.tobytes())
        if key not in root.constants:
            name = f"const{len(root.constants)}"
            root.constants[key] = root._keep(name, ir.tensor(array, name=name))
        return root.constants[key]

    def weight(self, name: str, stored: Stored) -> ir.Value:
        """A tensor of the weight file, under a name; asked for twice in a graph or its branches it is one initializer.

        It belongs to the graph or branch that uses it: what a branch takes from around it costs time at every run, and
        what it takes from around an outer branch onnxruntime does not prepack.
        """
        at: Ops | None = self
        while at is not None:
            if name in at.initializers:
                return at.initializers[name]
            at = at.outer
        tensor = ir.ExternalTensor(
            WEIGHT_FILE, stored.offset, stored.length, TYPES[stored.dtype], shape=ir.Shape(stored.shape), name=name
        )
        return self._keep(name, tensor)

    def branch(self, name: str, build: Callable[[Ops], Sequence[ir.Value]]) -> ir.Graph:
        """A branch of an ``If``. It may use every value of the graphs around it."""
        inner = Ops(self)
        outputs = build(inner)
        own = [value if _made_by(value, inner) else inner.op("Identity", value) for value in outputs]
        weights = list(inner.initializers.values())
        return ir.Graph([], own, nodes=inner.tape.nodes, initializers=weights, name=name)

    def choose(
        self,
        name: str,
        condition: ir.Value,
        then: Callable[[Ops], Sequence[ir.Value]],
        otherwise: Callable[[Ops], Sequence[ir.Value]],
        outputs: int,
    ) -> list[ir.Value]:
        """An ``If`` node."""
        return self.many(
            "If",
            condition,
            outputs=outputs,
            then_branch=self.branch(f"{name}_then", then),
            else_branch=self.branch(f"{name}_else", otherwise),
        )

    def _keep(self, name: str, tensor: Any) -> ir.Value:
        value = self.initializers[name] = self.tape.initializer(tensor, name)
        value.type = value.shape = None  # the tensor says them; said again they are a fifth of the file
        return value

    def _named(self, value: ir.Value) -> ir.Value:
        self.root._count += 1
        value.name = f"v{self.root._count}"
        node = value.producer()
        assert node is not None
        node.name = node.name or value.name
        return value


def _made_by(value: ir.Value, ops: Ops) -> bool:
    return any(value in node.outputs for node in ops.tape.nodes)


def graph_input(name: str, dtype: str, dims: Dims) -> ir.Value:
    """A typed input of the outermost graph; a text stands for a dimension that is free."""
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(TYPES[dtype]))


def graph_output(value: ir.Value, name: str, dtype: str, dims: Dims) -> ir.Value:
    """Names and types an output of the outermost graph."""
    value.name = name
    value.shape, value.type = ir.Shape(dims), ir.TensorType(TYPES[dtype])
    return value


def model_of(ops: Ops, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, name: str) -> ir.Model:
    """The finished model, without nodes that lead to no output: onnxruntime would run them."""
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=ops.tape.nodes,
        initializers=list(ops.initializers.values()),
        opset_imports={"": OPSET, CONTRIB: 1},
        name=name,
    )
    model = ir.Model(graph, ir_version=11, producer_name="l2a_compress")
    RemoveUnusedNodesPass()(model)
    return model
