"""The ``ort`` dialect: onnxruntime's own operators, keys and values in place.

A row's real tokens stand first and padding behind them: positions and lengths come from the sums of the mask. Present
keys and values are outputs of the ``If`` itself, which is what lets onnxruntime write them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from l2a_compress.exporters.blocks import Blocks, Cache, Present, Rows, Shared
from l2a_compress.exporters.ops import CONTRIB, Ops
from l2a_compress.exporters.weights import Stored


class OrtBlocks(Blocks):
    """GroupQueryAttention, fused norms, and MatMulNBits where the matrices are quantized."""

    _decisions: tuple[Sequence[Any], ...] | None = None
    _slots: ir.Value | None = None

    def shared(self, ids: ir.Value, mask: ir.Value) -> Shared:
        """Parts: lengths [batch] (real tokens - 1) and total (a scalar), int32, and positions [batch, sequence]."""
        ops = self.ops
        count = ops.op("ReduceSum", mask, ops.constant([1], "int64"), keepdims=0)
        lengths = ops.op("Sub", count, ops.constant(1, "int64"))
        total = ops.op("Gather", ops.op("Shape", mask), ops.constant(1, "int64"))
        fed = ops.op("Gather", ops.op("Shape", ids), ops.constant(1, "int64"))
        last = ops.op("Min", lengths, ops.op("Sub", fed, ops.constant(1, "int64")))
        places = ops.op("Range", ops.constant(0, "int64"), fed, ops.constant(1, "int64"))
        real = ops.op("LessOrEqual", places, self.unsqueeze(ops, last, 1))
        parts = tuple(ops.op("Cast", value, to=ir.DataType.INT32) for value in (lengths, total))
        starts = ops.op("Max", ops.op("Sub", count, fed), ops.constant(0, "int64"))  # of a padded prompt it is 0
        positions = ops.op("Add", self.unsqueeze(ops, starts, 1), places)
        return Shared(last=last, real=real, parts=(*parts, positions))

    def matmul(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """As everywhere; a quantized matrix is read whole."""
        if f"{name}.values" in self.spec.tensors:
            return self._quantized(ops, value, name, None)
        return super().matmul(ops, value, name, rows)

    def matmul_t(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        """``value`` @ a matrix stored [out, in], or some of its rows, transposed."""
        if f"{name}.values" in self.spec.tensors:
            return self._quantized(ops, value, name, rows)
        return ops.op("FusedMatMul", value, self.weight(ops, name, rows), domain=CONTRIB, transB=1)

    def _quantized(self, ops: Ops, value: ir.Value, name: str, rows: Rows | None) -> ir.Value:
        shape, outputs = self.spec.shape, self.spec.tensors[f"{name}.values"].shape[0]
        inputs = {"o": shape.num_heads * shape.head_dim, "down": shape.intermediate_size}
        return ops.op(
            "MatMulNBits",
            *(value, self.weight(ops, f"{name}.values", rows), self.weight(ops, f"{name}.scales", rows)),
            domain=CONTRIB,
            K=inputs.get(name.rpartition(".")[2], shape.hidden_size),
            N=rows[1] if rows else outputs,
            bits=self.spec.bits,
            block_size=self.spec.block,
            accuracy_level=4,
        )

    def silu(self, ops: Ops, value: ir.Value) -> ir.Value:
        """SiLU: x * sigmoid(x)."""
        return ops.op("QuickGelu", value, domain=CONTRIB, alpha=1.0)

    def embed(self, ids: ir.Value) -> ir.Value:
        """As everywhere; a quantized table is read where it stands."""
        ops, tensors = self.ops, self.spec.tensors
        if "embed.values" not in tensors:
            return super().embed(ids)
        stored = tensors["embed.values"]
        table = ops.weight(
            "embed.table", Stored(stored.offset, (stored.shape[0], stored.length // stored.shape[0]), stored.dtype)
        )
        found = ops.op(
            "GatherBlockQuantized",
            *(table, ids, self.weight(ops, "embed.scales")),
            domain=CONTRIB,
            bits=self.spec.bits,
            block_size=self.spec.block,
            gather_axis=0,
            quantize_axis=1,
        )
        width = self.spec.shape.hidden_size
        return found if width % self.spec.block == 0 else self.part(ops, found, 0, width, 2)

    def add_norm(self, ops: Ops, update: ir.Value, hidden: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        found = ops.many(
            "SkipSimplifiedLayerNormalization",
            *(update, hidden, self.weight(ops, name)),
            outputs=4,
            domain=CONTRIB,
            epsilon=self.spec.epsilon,
        )
        return found[0], found[3]

    def project(self, ops: Ops, index: int, attended: ir.Value, width: int) -> ir.Value:
        """As everywhere. Columns of a quantized matrix are no prefix of its bytes: it is read against zeros."""
        shape = self.spec.shape
        if self.spec.bits and width < shape.num_groups:
            attended = self._widen(ops, attended, width)
        return super().project(ops, index, attended, width)

    def layer(
        self, ops: Ops, index: int, hidden: ir.Value, cache: Cache, shared: Shared, width: int
    ) -> tuple[ir.Value, Present]:
        """A layer over a cache of ``width`` groups."""
        normed = self.norm(ops, hidden, f"layers.{index}.input_norm")
        attended, key, value = self.attention(ops, index, normed, cache, shared, width, width)
        return self.mlp(ops, index, self.project(ops, index, attended, width), hidden, None), (key, value)

    def gated_layer(
        self, index: int, hidden: ir.Value, cache: Cache, shared: Shared, widest: ir.Value, heads: ir.Value
    ) -> tuple[ir.Value, Present]:
        """The whole layer in one ``If``, and its widths in ``If`` nodes within."""
        spec, groups = self.spec, self.spec.shape.num_groups
        if self._decisions is None:
            self._decisions, self._slots = self._decided(widest, heads), self._written(shared)
        wider, mask, row = (values[index] for values in self._decisions)

        def then(ops: Ops) -> list[ir.Value]:
            normed = self.norm(ops, hidden, f"layers.{index}.input_norm")
            found, key, value = self._widths(ops, index, normed, cache, shared, wider, mask, spec.widths)
            if spec.bits:
                found = self.project(ops, index, self.masked(ops, found, mask, groups), groups)
            return [self.mlp(ops, index, found, hidden, row), key, value]

        def otherwise(ops: Ops) -> list[ir.Value]:
            if not spec.whole_cache:
                return [ops.op("Identity", value) for value in (hidden, *cache)]
            normed = self.norm(ops, hidden, f"layers.{index}.input_norm")
            return [ops.op("Identity", hidden), *self._write_cache(ops, index, normed, cache, shared)]

        found, key, value = self.ops.choose(f"layer_{index}", wider[0], then, otherwise, 3)
        return found, (key, value)

    def _decided(self, widest: ir.Value, heads: ir.Value) -> tuple[Sequence[Any], ...]:
        """By layer: whether it runs wider than 0 and than each width but the last; its masks of channels and of rows.

        Taken apart in a few nodes at the start, not in each layer.
        """
        ops = self.ops

        def apart(value: ir.Value, axis: int) -> list[ir.Value]:
            layers = self.spec.shape.num_layers
            return ops.many("Split", value, outputs=layers, axis=axis, num_outputs=layers)

        bounds = (0, *self.spec.widths[:-1])
        wider = [apart(ops.op("Greater", widest, ops.constant(bound, "int64")), 0) for bound in bounds]
        first = self.part(ops, heads, 0, 1, 2)  # whoever keeps the layer keeps its first group
        return list(zip(*wider, strict=True)), apart(heads, 1), apart(first, 1)

    def _written(self, shared: Shared) -> ir.Value:
        """Where a layer writes new keys and values: (row, group, position). [batch, sequence, groups, 3]."""
        ops, positions = self.ops, shared.parts[2]
        rows = ops.op("Gather", ops.op("Shape", positions), ops.constant(0, "int64"))
        rows = ops.op("Range", ops.constant(0, "int64"), rows, ops.constant(1, "int64"))
        rows = ops.op("Unsqueeze", rows, ops.constant([1, 2, 3], "int64"))
        positions = ops.op("Unsqueeze", positions, ops.constant([2, 3], "int64"))
        rows = ops.op("Mul", rows, ops.constant([1, 0, 0], "int64"))
        positions = ops.op("Mul", positions, ops.constant([0, 0, 1], "int64"))
        groups = [[0, group, 0] for group in range(self.spec.shape.num_groups)]
        return ops.op("Add", ops.op("Add", rows, positions), ops.constant(groups, "int64"))

    def _widths(
        self,
        ops: Ops,
        index: int,
        normed: ir.Value,
        cache: Cache,
        shared: Shared,
        wider: Sequence[ir.Value],
        mask: ir.Value,
        widths: Sequence[int],
        pair: Present | None = None,
    ) -> list[ir.Value]:
        """The attention at the smallest of ``widths`` that is enough: (update, key, value).

        Quantized, what is projected is read whole at every width: then all heads, neither masked nor projected, are
        given instead of the update. ``pair`` are new keys and values, which all narrower widths share.
        """
        width, groups = widths[-1], self.spec.shape.num_groups

        def run(inner: Ops) -> list[ir.Value]:
            attended, key, value = self.attention(inner, index, normed, cache, shared, width, groups, pair)
            if self.spec.bits:
                return [attended, key, value]
            if width < groups:
                shape = self.spec.shape
                attended = self.part(inner, attended, 0, width * shape.heads_per_group * shape.head_dim, 2)
            return [self.project(inner, index, self.masked(inner, attended, mask, width), width), key, value]

        def narrower(inner: Ops) -> list[ir.Value]:
            shared_pair = pair or self._pair(inner, index, normed, groups)
            return self._widths(inner, index, normed, cache, shared, wider, mask, widths[:-1], shared_pair)

        if len(widths) == 1:
            return run(ops)
        return ops.choose(f"layer_{index}_width_{width}", wider[len(widths) - 1], run, narrower, 3)

    def attention(
        self,
        ops: Ops,
        index: int,
        normed: ir.Value,
        cache: Cache,
        shared: Shared,
        width: int,
        cached: int,
        pair: Present | None = None,
    ) -> list[ir.Value]:
        """Heads of the first ``width`` groups over a cache of ``cached`` groups: (heads, key, value).

        Where the cache is wider, keys and values of all its groups are computed, so that it stays whole, the queries
        of the others are zero, and what is found for them stands behind the rest and means nothing. A whole layer's
        come out of one matrix. ``pair`` are new keys and values, where they are computed already.
        """
        shape = self.spec.shape
        if width == cached == shape.num_groups and f"layers.{index}.q_norm" not in self.spec.tensors:
            packed = self.projected(ops, index, normed, None)
            return self._group_query(ops, packed, None, None, cache, shared, cached)
        query = self.heads(ops, index, "q", normed, width)
        key, value = pair or self._pair(ops, index, normed, cached)
        if width < cached:
            query = self._widen(ops, query, width)
        return self._group_query(ops, query, key, value, cache, shared, cached)

    def _pair(self, ops: Ops, index: int, normed: ir.Value, groups: int) -> Present:
        """New keys and values of the first ``groups``."""
        return self.heads(ops, index, "k", normed, groups), self.heads(ops, index, "v", normed, groups)

    def _widen(self, ops: Ops, value: ir.Value, width: int) -> ir.Value:
        """Zeros for the groups behind the first ``width``."""
        shape = self.spec.shape
        missing = (shape.num_groups - width) * shape.heads_per_group * shape.head_dim
        return ops.op("Pad", value, ops.constant([0, 0, 0, 0, 0, missing], "int64"))

    def _write_cache(self, ops: Ops, index: int, normed: ir.Value, cache: Cache, shared: Shared) -> list[ir.Value]:
        """Keys and values of a layer that does not run, behind those of before: (key, value).

        By ``ScatterND``, since GroupQueryAttention would attend to all of them.
        """
        shape = self.spec.shape
        key, value = self._pair(ops, index, normed, shape.num_groups)
        turned = ops.op(
            "RotaryEmbedding", key, shared.parts[2], *self.rotary(), domain=CONTRIB, num_heads=shape.num_groups
        )
        split = ops.constant([0, 0, shape.num_groups, shape.head_dim], "int64")
        return [
            ops.op("ScatterND", past, self._slots, ops.op("Reshape", new, split))
            for past, new in zip(cache, (turned, value), strict=True)
        ]

    def _group_query(
        self,
        ops: Ops,
        query: ir.Value,
        key: ir.Value | None,
        value: ir.Value | None,
        cache: Cache,
        shared: Shared,
        groups: int,
    ) -> list[ir.Value]:
        window = {} if self.spec.window is None else {"local_window_size": self.spec.window}
        return ops.many(
            "GroupQueryAttention",
            *(query, key, value, *cache, *shared.parts[:2]),
            *self.rotary(),
            outputs=3,
            domain=CONTRIB,
            num_heads=groups * self.spec.shape.heads_per_group,
            kv_num_heads=groups,
            do_rotary=1,
            rotary_interleaved=0,
            scale=float(self.spec.shape.head_dim**-0.5),
            **window,
        )
