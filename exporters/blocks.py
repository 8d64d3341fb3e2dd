"""Pieces of the decoder that both dialects share, and what each of them must bring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from l2a_compress.exporters.ops import TYPES, Ops, graph_input, graph_output
from l2a_compress.exporters.spec import GraphSpec

BATCH, SEQUENCE, TOTAL, PAST, PRESENT = "batch", "sequence", "total", "past", "present"
Cache = tuple[ir.Value | None, ir.Value | None]  # None: nothing is cached
Present = tuple[ir.Value, ir.Value]
Rows = tuple[int, int]  # start, count


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Values that all layers read.

    Attributes:
        last: [batch], int64: the place of each row's last real token among those that are fed.
        real: [batch, sequence], bool: which of them are real.
        parts: what the dialect's attention needs besides.
    """

    last: ir.Value
    real: ir.Value
    parts: tuple[ir.Value, ...]


class Blocks(ABC):
    """Builds one graph. ``ops`` is the outermost graph; methods take the graph, or branch, they write into."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec, self.ops = spec, Ops()
        self._rotary: tuple[ir.Value, ir.Value] | None = None

    # what a dialect brings

    @abstractmethod
    def shared(self, ids: ir.Value, mask: ir.Value) -> Shared:
        """What all layers read, from ``input_ids`` [batch, sequence] and ``attention_mask`` [batch, total]."""

    @abstractmethod
    def matmul_t(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """``value`` [batch, n, in] @ a matrix stored [out, in], or some of its rows, transposed."""

    @abstractmethod
    def silu(self, ops: Ops, value: ir.Value) -> ir.Value:
        """SiLU: x * sigmoid(x)."""

    @abstractmethod
    def add_norm(self, ops: Ops, update: ir.Value, hidden: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""

    @abstractmethod
    def layer(
        self, ops: Ops, index: int, hidden: ir.Value, cache: Cache, shared: Shared, width: int
    ) -> tuple[ir.Value, Present]:
        """A layer of ``width`` groups that runs for every row: (hidden, present)."""

    @abstractmethod
    def gated_layer(
        self, index: int, hidden: ir.Value, cache: Cache, shared: Shared, widest: ir.Value, heads: ir.Value
    ) -> tuple[ir.Value, Present]:
        """A layer that runs when a row needs it; masks keep it from the rows that do not.

        Args:
            index: of the layer.
            hidden: [batch, sequence, width].
            cache: past keys and values of all groups.
            shared: what all layers read.
            widest: [layers], int64: the most groups that any row keeps.
            heads: [batch, layers, channels of all heads], float: 1 where a row keeps the channel's group.
        """

    # inputs and outputs

    def common_inputs(self) -> list[ir.Value]:
        """``input_ids`` and ``attention_mask``."""
        return [
            graph_input("input_ids", "int64", [BATCH, SEQUENCE]),
            graph_input("attention_mask", "int64", [BATCH, TOTAL]),
        ]

    def decision_inputs(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``budget``, ``limits`` and ``price``, which the allocator decides by."""
        return (
            graph_input("budget", "float32", [BATCH, 2]),
            graph_input("limits", "int64", [BATCH, 3]),
            graph_input("price", "float32", [BATCH]),
        )

    def cache(self, index: int, width: int) -> Present:
        """The inputs of a layer's past keys and values."""
        dims: list[int | str] = [BATCH, width, PAST, self.spec.shape.head_dim]
        names = (f"past_key_values.{index}.{part}" for part in ("key", "value"))
        key, value = (graph_input(name, self.spec.dtype, dims) for name in names)
        return key, value

    def presents(self, found: Mapping[int, Present], widths: Sequence[int]) -> list[ir.Value]:
        """The outputs of all layers' present keys and values, of ``widths`` groups each."""
        return [
            graph_output(
                value,
                f"present.{index}.{part}",
                self.spec.dtype,
                [BATCH, widths[index], PRESENT, self.spec.shape.head_dim],
            )
            for index, pair in found.items()
            for part, value in zip(("key", "value"), pair, strict=True)
        ]

    # small helpers

    def weight(self, ops: Ops, name: str, rows: Rows | None = None) -> ir.Value:
        """A tensor of the file, or some of its rows."""
        stored = self.spec.tensors[name]
        if rows is None or rows == (0, stored.shape[0]):
            found = ops.weight(name, stored)
            if not name.startswith(("gates.", "transition.")) or stored.dtype == "float32":
                return found
            found = self.full(ops, found)  # DequantizeLinear in a branch is what onnxruntime's optimizer fails on
            return ops.op("Mul", found, self.weight(ops, f"{name}.scales")) if stored.dtype == "int8" else found
        return ops.weight(f"{name}[{rows[0]}:{sum(rows)}]", stored.rows(*rows))

    def matmul(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """``value`` @ a matrix stored [in, out], or some of its rows."""
        return ops.op("MatMul", value, self.weight(ops, name, rows))

    def norm(self, ops: Ops, value: ir.Value, name: str) -> ir.Value:
        """RMS norm over the last axis."""
        return ops.op("RMSNormalization", value, self.weight(ops, name), epsilon=self.spec.epsilon, axis=-1)

    def full(self, ops: Ops, value: ir.Value) -> ir.Value:
        """To float32, which gates and logits are computed in."""
        return ops.op("Cast", value, to=ir.DataType.FLOAT)

    def activation(self, ops: Ops, value: ir.Value) -> ir.Value:
        """A value of the decoder in float32."""
        return value if self.spec.dtype == "float32" else self.full(ops, value)

    def rotary(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [positions, head_dim / 2]: constant, so computed once, as a graph is opened."""
        if self._rotary is None:
            ops, spec = self.ops, self.spec
            bounds = (ops.constant(float(at), "float32") for at in (0, spec.positions, 1))
            angles = ops.op(
                "Mul", self.unsqueeze(ops, ops.op("Range", *bounds), 1), self.weight(ops, "rotary.frequencies")
            )
            scale = ops.constant(spec.rotary_scale, "float32")
            cos, sin = (self.rounded(ops, ops.op("Mul", ops.op(kind, angles), scale)) for kind in ("Cos", "Sin"))
            self._rotary = cos, sin
        return self._rotary

    def rounded(self, ops: Ops, value: ir.Value) -> ir.Value:
        """From float32 to what the decoder computes in."""
        return value if self.spec.dtype == "float32" else ops.op("Cast", value, to=TYPES[self.spec.dtype])

    def number(self, ops: Ops, value: float | Sequence[float]) -> ir.Value:
        """A constant that the decoder computes with."""
        return ops.constant(value, self.spec.dtype)

    def unsqueeze(self, ops: Ops, value: ir.Value, axis: int) -> ir.Value:
        """One more axis of length 1."""
        return ops.op("Unsqueeze", value, ops.constant([axis], "int64"))

    def part(self, ops: Ops, value: ir.Value, start: int, end: int, axis: int) -> ir.Value:
        """A slice along one axis."""
        return ops.op("Slice", value, *(ops.constant([at], "int64") for at in (start, end, axis)))

    def affine(self, ops: Ops, value: ir.Value, name: str) -> ir.Value:
        """``value`` @ a matrix + its bias."""
        return ops.op("Add", self.matmul(ops, value, name), self.weight(ops, f"{name}_bias"))

    # the decoder

    def embed(self, ids: ir.Value) -> ir.Value:
        """[batch, sequence] -> [batch, sequence, width]."""
        return self.ops.op("Gather", self.weight(self.ops, "embed"), ids)

    def embed_told(self, ids: ir.Value, told: ir.Value) -> ir.Value:
        """As ``embed``, with the budget [batch, 2] added at ``<think>``."""
        ops, hidden = self.ops, self.embed(ids)
        if not self.spec.gates.tokens:
            return hidden
        offset = self.rounded(ops, self.matmul(ops, self.budget(ops, "transition", told), "transition.at_think"))
        return ops.op("Add", hidden, ops.op("Mul", self.at_think(ids), self.unsqueeze(ops, offset, 1)))

    def at_think(self, ids: ir.Value) -> ir.Value:
        """1.0 where the token is ``<think>``. [batch, sequence, 1]."""
        found = self.ops.op("Equal", ids, self.ops.constant(self.spec.think_id, "int64"))
        return self.unsqueeze(self.ops, self.ops.op("Cast", found, to=TYPES[self.spec.dtype]), 2)

    def heads(self, ops: Ops, index: int, part: str, normed: ir.Value, groups: int) -> ir.Value:
        """Queries, keys or values (``part`` q, k, v) of the first ``groups``, with their bias and their norm."""
        shape, size = self.spec.shape, self.spec.shape.head_dim
        heads = groups * shape.heads_per_group if part == "q" else groups
        start = {"q": 0, "k": shape.num_heads, "v": shape.num_heads + shape.num_groups}[part] * size
        found = self.projected(ops, index, normed, (start, heads * size))
        norm = f"layers.{index}.{part}_norm"
        if norm in self.spec.tensors:
            split = ops.op("Reshape", found, ops.constant([0, 0, heads, size], "int64"))
            found = ops.op("Reshape", self.norm(ops, split, norm), ops.constant([0, 0, heads * size], "int64"))
        return found

    def projected(self, ops: Ops, index: int, normed: ir.Value, rows: Rows | None) -> ir.Value:
        """Some rows, or all, of queries, keys and values behind one another, with their bias."""
        name = f"layers.{index}.qkv"
        found, bias = self.matmul_t(ops, normed, name, rows), f"{name}_bias"
        return ops.op("Add", found, self.weight(ops, bias, rows)) if bias in self.spec.tensors else found

    def masked(self, ops: Ops, attended: ir.Value, mask: ir.Value, width: int) -> ir.Value:
        """Heads of ``width`` groups without what ``mask`` [batch, 1, channels of all heads] leaves out."""
        shape = self.spec.shape
        if width < shape.num_groups:
            mask = self.part(ops, mask, 0, width * shape.heads_per_group * shape.head_dim, 2)
        return ops.op("Mul", attended, mask)

    def project(self, ops: Ops, index: int, attended: ir.Value, width: int) -> ir.Value:
        """The output projection of the first ``width`` groups."""
        name = f"layers.{index}.o"
        shape = self.spec.shape
        found = self.matmul(ops, attended, name, (0, width * shape.heads_per_group * shape.head_dim))
        bias = f"{name}_bias"
        return ops.op("Add", found, self.weight(ops, bias)) if bias in self.spec.tensors else found

    def mlp(self, ops: Ops, index: int, update: ir.Value, hidden: ir.Value, row: ir.Value | None) -> ir.Value:
        """Adds the attention's ``update`` and then the MLP's; ``row`` [batch, 1, 1] leaves out rows."""
        prefix = f"layers.{index}"
        if row is not None and f"{prefix}.o_bias" in self.spec.tensors:
            update = ops.op("Mul", update, row)  # masked heads still leave the bias
        normed, summed = self.add_norm(ops, update, hidden, f"{prefix}.post_norm")
        gate = self.silu(ops, self.matmul(ops, normed, f"{prefix}.gate"))
        inner = ops.op("Mul", gate, self.matmul(ops, normed, f"{prefix}.up"))
        found = self.matmul(ops, inner, f"{prefix}.down")
        if row is not None:
            found = ops.op("Mul", found, row)
        return ops.op("Add", found, summed)

    def last(self, hidden: ir.Value, shared: Shared) -> ir.Value:
        """The state, after the last norm, of each row's last token. [batch, 1, width]."""
        return self.norm(self.ops, self.unsqueeze(self.ops, self.at_last(self.ops, hidden, shared), 1), "norm")

    def at_last(self, ops: Ops, hidden: ir.Value, shared: Shared) -> ir.Value:
        """[batch, sequence, width] -> [batch, width]."""
        return ops.op("GatherND", hidden, self.unsqueeze(ops, shared.last, 1), batch_dims=1)

    def head(self, last: ir.Value) -> ir.Value:
        """[batch, 1, width] -> [batch, 1, vocabulary]."""
        logits = self.matmul_t(self.ops, last, "embed" if self.spec.shape.tied else "head")
        return self.activation(self.ops, logits)

    # gates

    def budget(self, ops: Ops, owner: str, told: ir.Value) -> ir.Value:
        """e(b) of the allocator or the transition gate. [batch, 2] -> [batch, width]."""
        prefix = f"{owner}.embedding"
        waves = ops.op("Mul", self.unsqueeze(ops, told, 2), self.weight(ops, f"{prefix}.frequencies"))
        flat = ops.op("Flatten", ops.op("Cos", waves), axis=1)
        found = ops.op("Add", self.matmul(ops, flat, f"{prefix}.weight"), self.weight(ops, f"{prefix}.bias"))
        return ops.op("Tanh", found)

    def tau(self, last: ir.Value, told: ir.Value) -> ir.Value:
        """The transition gate at the last token. [batch]."""
        ops = self.ops
        state = self.activation(ops, ops.op("Squeeze", last, ops.constant([1], "int64")))
        features = ops.op("Concat", state, self.budget(ops, "transition", told), axis=-1)
        inner = self.silu(ops, self.affine(ops, features, "transition.inner"))
        logit = self.affine(ops, inner, "transition.outer")
        return ops.op("Sigmoid", ops.op("Squeeze", logit, ops.constant([1], "int64")))
