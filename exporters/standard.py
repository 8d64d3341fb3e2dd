"""The ``standard`` dialect: opset 23 without contrib operators, for any conforming runtime and for TensorRT.

The mask marks slots: ``attention_mask`` [batch, total] is 1 on every slot of past and present that holds a real token,
so padding may stand on either side. Present keys and values are past ones with the new behind them. Their projection
stands outside every ``If``, so a cache is always whole, and no ``If`` stands in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import onnx_ir as ir

from l2a_compress.exporters.blocks import Blocks, Cache, Present, Rows, Shared
from l2a_compress.exporters.ops import Ops
from l2a_compress.exporters.weights import BY_INPUT

_NEVER = -6e4  # added to a score that must not count; finite in 16 bits too, so that a row of padding has no NaN


class StandardBlocks(Blocks):
    """Primitive attention."""

    def shared(self, ids: ir.Value, mask: ir.Value) -> Shared:
        """Parts: positions [batch, sequence], int64, and bias [batch, 1, 1, sequence, total], float."""
        ops = self.ops
        one = ops.constant(1, "int64")
        fed = ops.op("Gather", ops.op("Shape", ids), one)
        total = ops.op("Gather", ops.op("Shape", mask), one)
        past = ops.op("Sub", total, fed)
        starts, ends = self.unsqueeze(ops, past, 0), self.unsqueeze(ops, total, 0)
        axis = ops.constant([1], "int64")
        counted = ops.op("CumSum", mask, one)
        new = ops.op("Slice", counted, starts, ends, axis)
        positions = ops.op("Max", ops.op("Sub", new, one), ops.constant(0, "int64"))
        real = ops.op("Cast", ops.op("Slice", mask, starts, ends, axis), to=ir.DataType.BOOL)

        slots = ops.op("Range", ops.constant(0, "int64"), total, one)
        queries = self.unsqueeze(ops, ops.op("Range", past, total, one), 1)
        seen = self.unsqueeze(ops, ops.op("LessOrEqual", slots, queries), 0)  # [1, sequence, total]
        if self.spec.window is not None:  # of tokens, not of slots: free ones may stand between
            ends_at = ops.op("Add", counted, ops.constant(self.spec.window - 1, "int64"))
            near = ops.op("Less", self.unsqueeze(ops, positions, 2), self.unsqueeze(ops, ends_at, 1))
            seen = ops.op("And", seen, near)
        held = self.unsqueeze(ops, ops.op("Cast", mask, to=ir.DataType.BOOL), 1)
        seen = ops.op("And", held, seen)  # [batch, sequence, total]
        bias = ops.op("Where", seen, self.number(ops, 0.0), self.number(ops, _NEVER))
        bias = ops.op("Unsqueeze", bias, ops.constant([1, 2], "int64"))

        places = ops.op("Range", ops.constant(0, "int64"), fed, one)
        marked = ops.op("Mul", places, ops.op("Cast", real, to=ir.DataType.INT64))
        last = ops.op("ReduceMax", marked, axis, keepdims=0)
        return Shared(last=last, real=real, parts=(positions, bias))

    def weight(self, ops: Ops, name: str, rows: Rows | None = None) -> ir.Value:
        """As everywhere. A quantized matrix is told as such, for a runtime that multiplies by it as it stands."""
        if f"{name}.values" in self.spec.tensors:
            return self._dequantized(ops, name, rows)
        return self._rows(ops, name, rows)

    def _rows(self, ops: Ops, name: str, rows: Rows | None) -> ir.Value:
        """Some rows; sliced from all of them in a branch of one width among several.

        TensorRT takes no two tensors of different lengths that begin at one place.
        """
        whole = (0, self.spec.tensors[name].shape[0])
        if rows is None or rows == whole or ops.outer is None or len(self.spec.widths) == 1:
            return super().weight(ops, name, rows)
        return self.part(ops, super().weight(ops, name), rows[0], sum(rows), 0)

    def _dequantized(self, ops: Ops, name: str, rows: Rows | None) -> ir.Value:
        block = self.spec.block
        by_input = name.rpartition(".")[2] in BY_INPUT
        values = self._rows(ops, f"{name}.values", rows)
        if not block:
            scales = self._rows(ops, f"{name}.scales", None if by_input else rows)
            return ops.op("DequantizeLinear", values, scales, axis=1 if by_input else 0)
        if by_input and rows is not None:
            rows = (rows[0] // block, rows[1] // block)
        scales = self._rows(ops, f"{name}.scales", rows)
        return ops.op("DequantizeLinear", values, scales, axis=0 if by_input else 1, block_size=block)

    def project(self, ops: Ops, index: int, attended: ir.Value, width: int) -> ir.Value:
        """As everywhere. Where groups are not whole blocks of a quantized matrix, it is read whole, against zeros."""
        shape = self.spec.shape
        size = shape.heads_per_group * shape.head_dim
        if f"layers.{index}.o.values" in self.spec.tensors and self.spec.block and width * size % self.spec.block:
            missing = (shape.num_groups - width) * size
            attended = ops.op("Pad", attended, ops.constant([0, 0, 0, 0, 0, missing], "int64"))
            width = shape.num_groups
        return super().project(ops, index, attended, width)

    def matmul_t(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """By Gemm, which takes a transposed matrix as it stands."""
        stored = self.spec.tensors.get(name) or self.spec.tensors[f"{name}.values"]
        outputs, inputs = stored.shape
        flat = ops.op("Reshape", value, ops.constant([-1, inputs], "int64"))
        found = ops.op("Gemm", flat, self.weight(ops, name, rows), transB=1)
        shape = ops.op(
            "Concat", ops.op("Shape", value, end=2), ops.constant([rows[1] if rows else outputs], "int64"), axis=0
        )
        return ops.op("Reshape", found, shape)

    def silu(self, ops: Ops, value: ir.Value) -> ir.Value:
        """SiLU: x * sigmoid(x)."""
        return ops.op("Mul", value, ops.op("Sigmoid", value))

    def add_norm(self, ops: Ops, update: ir.Value, hidden: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        summed = ops.op("Add", update, hidden)
        return self.norm(ops, summed, name), summed

    def layer(
        self, ops: Ops, index: int, hidden: ir.Value, cache: Cache, shared: Shared, width: int
    ) -> tuple[ir.Value, Present]:
        """A layer over a cache of ``width`` groups."""
        normed = self.norm(ops, hidden, f"layers.{index}.input_norm")
        present = self._present(ops, index, normed, cache, shared, width)
        attended = self._attention(ops, index, normed, present, shared, width, width)
        return self.mlp(ops, index, self.project(ops, index, attended, width), hidden, None), present

    def gated_layer(
        self, index: int, hidden: ir.Value, cache: Cache, shared: Shared, widest: ir.Value, heads: ir.Value
    ) -> tuple[ir.Value, Present]:
        """As :meth:`told_layer`, with predicates computed in the graph."""
        ops = self.ops
        width = ops.op("Gather", widest, ops.constant(index, "int64"))
        runs, below = [], 0
        for size in self.spec.widths:
            flag = ops.op("Greater", width, ops.constant(below, "int64"))
            if size < self.spec.shape.num_groups:
                flag = ops.op("And", flag, ops.op("LessOrEqual", width, ops.constant(size, "int64")))
            runs.append(flag)
            below = size
        return self.told_layer(index, hidden, cache, shared, runs, heads)

    def told_layer(
        self, index: int, hidden: ir.Value, cache: Cache, shared: Shared, runs: Sequence[ir.Value], heads: ir.Value
    ) -> tuple[ir.Value, Present]:
        """One ``If``; where heads have widths of their own, one for each and one for the MLP.

        Args:
            index: of the layer.
            hidden: [batch, sequence, width].
            cache: past keys and values of all groups.
            shared: what all layers read.
            runs: for each width a scalar, bool: whether the layer runs at it. At most one is true.
            heads: as of :meth:`gated_layer`.
        """
        ops, groups = self.ops, self.spec.shape.num_groups
        normed = self.norm(ops, hidden, f"layers.{index}.input_norm")
        present = self._present(ops, index, normed, cache, shared, groups)
        mask = ops.op("Gather", heads, ops.constant([index], "int64"), axis=1)  # [batch, 1, channels]
        row = self.part(ops, mask, 0, 1, 2)

        def attend(inner: Ops, size: int) -> ir.Value:
            attended = self._attention(inner, index, normed, present, shared, size, groups)
            return self.project(inner, index, self.masked(inner, attended, mask, size), size)

        def either(
            name: str, runs: ir.Value, then: Callable[[Ops], ir.Value], other: Callable[[Ops], ir.Value]
        ) -> ir.Value:
            (found,) = ops.choose(name, runs, lambda inner: [then(inner)], lambda inner: [other(inner)], 1)
            return found

        def same(inner: Ops) -> ir.Value:
            return inner.op("Identity", hidden)

        def whole(inner: Ops) -> ir.Value:
            return self.mlp(inner, index, attend(inner, groups), hidden, row)

        if len(runs) == 1:
            return either(f"layer_{index}", runs[0], whole, same), present
        update, runs_at_all = None, None
        for size, flag in zip(self.spec.widths, runs, strict=True):
            found = either(
                f"layer_{index}_width_{size}", flag, partial(attend, size=size), partial(self._nothing, like=hidden)
            )
            update = found if update is None else ops.op("Add", update, found)
            runs_at_all = flag if runs_at_all is None else ops.op("Or", runs_at_all, flag)
        assert update is not None
        assert runs_at_all is not None
        result = either(
            f"layer_{index}_mlp", runs_at_all, lambda inner: self.mlp(inner, index, update, hidden, row), same
        )
        return result, present

    def _nothing(self, ops: Ops, like: ir.Value) -> ir.Value:
        return ops.op("Mul", like, self.number(ops, 0.0))

    def _split(self, ops: Ops, value: ir.Value, heads: int) -> ir.Value:
        """[batch, sequence, heads * size] -> [batch, heads, sequence, size]."""
        split = ops.op("Reshape", value, ops.constant([0, 0, heads, self.spec.shape.head_dim], "int64"))
        return ops.op("Transpose", split, perm=[0, 2, 1, 3])

    def _rotated(self, ops: Ops, value: ir.Value, shared: Shared) -> ir.Value:
        return ops.op("RotaryEmbedding", value, *self.rotary(), shared.parts[0])

    def _present(self, ops: Ops, index: int, normed: ir.Value, cache: Cache, shared: Shared, groups: int) -> Present:
        """Past keys and values with the new ones behind them."""
        key = self._rotated(ops, self._split(ops, self.heads(ops, index, "k", normed, groups), groups), shared)
        value = self._split(ops, self.heads(ops, index, "v", normed, groups), groups)
        past_key, past_value = cache
        return (
            key if past_key is None else ops.op("Concat", past_key, key, axis=2),
            value if past_value is None else ops.op("Concat", past_value, value, axis=2),
        )

    def _attention(
        self, ops: Ops, index: int, normed: ir.Value, present: Present, shared: Shared, width: int, cached: int
    ) -> ir.Value:
        """Heads of the first ``width`` groups, side by side, over keys and values of ``cached`` groups."""
        shape = self.spec.shape
        count = width * shape.heads_per_group
        query = self._rotated(ops, self._split(ops, self.heads(ops, index, "q", normed, width), count), shared)
        query = ops.op("Mul", query, self.number(ops, shape.head_dim**-0.5))
        # [batch, groups, heads of a group, sequence, size] against keys of [batch, groups, 1, size, total].
        sizes = ops.constant([width, shape.heads_per_group], "int64")
        dims = ops.op("Shape", query)
        query = ops.op(
            "Reshape",
            query,
            ops.op("Concat", self.part(ops, dims, 0, 1, 0), sizes, self.part(ops, dims, 2, 4, 0), axis=0),
        )
        key, value = (part if width == cached else self.part(ops, part, 0, width, 1) for part in present)
        key = self.unsqueeze(ops, ops.op("Transpose", key, perm=[0, 1, 3, 2]), 2)
        scores = ops.op("Add", ops.op("MatMul", query, key), shared.parts[1])
        found = ops.op("MatMul", ops.op("Softmax", scores, axis=-1), self.unsqueeze(ops, value, 2))
        found = ops.op("Transpose", found, perm=[0, 3, 1, 2, 4])
        return ops.op("Reshape", found, ops.constant([0, 0, count * shape.head_dim], "int64"))
