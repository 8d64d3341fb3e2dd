"""The one weight file of a bundle: every tensor once, aligned, in a layout whose prefixes are narrower layers.

Tensors are made and written one after another, so that the file costs about one layer of memory. A layer's KV groups
stand in the order of importance that its gates keep them in:

    qkv       [out, in]   q, k and v behind one another; of each the rows of group 0, of group 1, ...  (biases likewise)
    o         [in, out]   the rows that take group 0's heads, ...
    gate, up, down   [in, out]
    embed     [vocabulary, width], also the output head where the model ties them

A variant that keeps n groups of a layer therefore reads a byte prefix of each of q, k, v and o. Quantized, all matrices
stand as [out, in] (see ``quantize``), and o, of which a narrower layer needs columns, is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from l2a_compress.bundle import WEIGHT_FILE
from l2a_compress.errors import ConfigError
from l2a_compress.modeling.families import attention_of, decoder_layers
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import BudgetedLogit
from l2a_compress.modeling.layers import GatedLayer
from l2a_compress.modeling.physical import sliced_linear

_PAGE, _LARGE = 4096, 1 << 20
BY_INPUT = ("o", "gate", "up", "down")  # matrices that are stored [in, out]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands in the weight file; ``dtype`` is NumPy's name of it."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def length(self) -> int:
        """Bytes."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return count // 2 if self.dtype == "int4" else count * np.dtype(self.dtype).itemsize

    def rows(self, start: int, count: int) -> Stored:
        """``count`` rows of the first axis."""
        if start < 0 or count < 1 or start + count > self.shape[0]:
            raise ConfigError(f"rows {start} to {start + count} of a tensor of shape {self.shape}")
        return Stored(self.offset + start * self.length // self.shape[0], (count, *self.shape[1:]), self.dtype)


def alignment(size: int) -> int:
    """Of a tensor of ``size`` bytes: a page from 1 MB on, for those who map it alone, else a cache line."""
    return _PAGE if size >= _LARGE else 64


class WeightFile:
    """Writes the file; a context manager. ``tensors`` tells where each one is."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHT_FILE
        self.tensors: dict[str, Stored] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, name: str, value: Array) -> None:
        """Appends one tensor; two numbers of 4 bits share a byte, the first in its lower half."""
        assert self._file is not None
        stored = np.ascontiguousarray(value).reshape(-1)
        if value.dtype.name == "int4":
            pairs = stored.astype(np.int8).view(np.uint8) & 15
            stored = pairs[0::2] | (pairs[1::2] << 4)
        end, step = self._file.tell(), alignment(stored.nbytes)
        offset = -(-end // step) * step
        self._file.write(b"\0" * (offset - end))
        self._file.write(stored.view(np.uint8).data)
        self.tensors[name] = Stored(offset, value.shape, value.dtype.name)


def model_tensors(gated: GatedModel) -> Iterator[tuple[str, Array]]:
    """All tensors of the decoder with the adapters merged in, in 32 bits, by the names that the graphs use."""
    shape = gated.shape
    inner = cast(Any, gated.model.base_model)
    yield "embed", _array(inner.embed_tokens.weight)
    if not shape.tied:
        yield "head", _array(cast(nn.Linear, gated.model.get_output_embeddings()).weight)
    stem = gated.gate_config.stem_layers
    for index, wrapper in enumerate(decoder_layers(gated.model)):
        layer = cast(GatedLayer, wrapper).layer
        order = torch.arange(shape.num_groups)
        if index >= stem:
            order = gated.allocator.group_order[index - stem].cpu()
        for name, value in _layer_tensors(layer, order, gated):
            yield f"layers.{index}.{name}", value
    yield "norm", _array(inner.norm.weight)


def _layer_tensors(layer: nn.Module, order: Tensor, gated: GatedModel) -> Iterator[tuple[str, Array]]:
    shape = gated.shape
    attention, mlp = attention_of(layer), cast(Any, layer.mlp)
    keys = (order[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()
    width = shape.heads_per_group * shape.head_dim
    queries = (order[:, None] * width + torch.arange(width)).flatten()
    yield "input_norm", _array(cast(Any, layer.input_layernorm).weight)
    inputs = [
        (_merged(getattr(attention, f"{name}_proj")), rows) for name, rows in (("q", queries), ("k", keys), ("v", keys))
    ]
    yield "qkv", _array(torch.cat([linear.weight[rows] for linear, rows in inputs]))
    if any(_has_bias(linear) for linear, _ in inputs):
        biases = (
            linear.bias[rows] if _has_bias(linear) else linear.weight.new_zeros(len(rows)) for linear, rows in inputs
        )
        yield "qkv_bias", _array(torch.cat(list(biases)))
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            yield name, _array(getattr(attention, name).weight)
    output = _merged(attention.o_proj)
    yield "o", _array(output.weight[:, queries].t())
    if _has_bias(output):
        yield "o_bias", _array(output.bias)
    yield "post_norm", _array(cast(Any, layer.post_attention_layernorm).weight)
    for name in ("gate", "up", "down"):
        linear = _merged(getattr(mlp, f"{name}_proj"))
        if _has_bias(linear):
            raise ConfigError(f"{name}_proj has a bias, which the exporter does not know; export without it")
        yield name, _array(linear.weight.t())


def _merged(module: Any) -> nn.Linear:
    """A projection with its adapter, not rounded to the base's type."""
    return sliced_linear(module, None, None, torch.float32)


def _has_bias(linear: nn.Linear) -> bool:
    return cast(Tensor | None, linear.bias) is not None


def narrowed(name: str, value: Array, dtype: str) -> Array:
    """``value`` in ``dtype`` (NumPy's name, or ``bfloat16``).

    Raises:
        ConfigError: a number is beyond the range of ``dtype``.
    """
    if value.dtype.name == dtype:
        return value
    with np.errstate(over="ignore"):
        found: Array = value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if not np.isfinite(found.astype(np.float32)).all():
        raise ConfigError(f"{name} has numbers that {dtype} cannot hold; export as bf16 or fp32")
    return found


def rotary_of(gated: GatedModel) -> tuple[Array, float]:
    """Inverse frequencies [head_dim / 2] and the scale of the model's own rotary embedding.

    They are those that it begins with: where they change with the length (longrope), ``inv_freq`` is what ran last.
    """
    rotary = cast(Any, gated.model.base_model).rotary_emb
    return _array(rotary.original_inv_freq), float(rotary.attention_scaling)


def gate_tensors(gated: GatedModel) -> Iterator[tuple[str, Array]]:
    """The allocator and the transition gate, stacked gates side by side; of gates that no input moves what they say."""
    allocator, transition = gated.allocator, gated.transition
    stacks = {"layers": allocator.layer_gates} | ({"heads": allocator.head_gates} if allocator.config.heads else {})
    reading = {name for name, mlp in stacks.items() if mlp.outer.any()}
    if reading or allocator.demand is not None:
        yield "gates.norm", _array(allocator.norm.weight)
        yield "gates.norm_bias", _array(allocator.norm.bias)
    if reading:
        yield from _embedding("gates.embedding", allocator.embedding)
    for name, mlp in stacks.items():
        yield f"gates.{name}.outer_bias", _array(mlp.outer_bias[:, None])
        if name in reading:
            yield f"gates.{name}.inner", _array(mlp.inner.permute(1, 0, 2).flatten(1))  # [inputs, gates * hidden]
            yield f"gates.{name}.inner_bias", _array(mlp.inner_bias.flatten())
            yield f"gates.{name}.outer", _array(mlp.outer)  # [gates, hidden, outputs]
    perceptrons: list[tuple[str, BudgetedLogit]] = [("transition", transition)]
    if allocator.demand is not None:
        perceptrons.insert(0, ("gates.demand", allocator.demand))
    for name, perceptron in perceptrons:
        yield from _embedding(f"{name}.embedding", perceptron.embedding)
        yield f"{name}.inner", _array(perceptron.inner.weight.t())
        yield f"{name}.inner_bias", _array(perceptron.inner.bias)
        yield f"{name}.outer", _array(perceptron.outer.weight.t())
        yield f"{name}.outer_bias", _array(perceptron.outer.bias)
    yield "transition.at_think", _array(transition.at_think.weight.t())


def reads_input(tensors: Collection[str]) -> bool:
    """Whether the gates compute something, by their tensors: what no input moves is stored as what it says."""
    return any(f"gates.{kind}.inner" in tensors for kind in ("layers", "heads"))


@torch.no_grad()
def round_gates(gated: GatedModel, change: Callable[[Array], Array]) -> None:
    """Rounds the matrices of the gates in place, each as [inputs, outputs], as they will be stored."""
    allocator, transition = gated.allocator, gated.transition
    linears = [allocator.embedding.linear, transition.at_think]
    for perceptron in (transition, allocator.demand):
        if perceptron is not None:
            linears += [perceptron.embedding.linear, perceptron.inner, perceptron.outer]
    matrices = [linear.weight.t() for linear in linears]
    for mlp in (allocator.layer_gates, allocator.head_gates):
        matrices += list(mlp.inner)
    for matrix in matrices:
        matrix.copy_(torch.from_numpy(change(_array(matrix))))


def _embedding(prefix: str, module: nn.Module) -> Iterator[tuple[str, Array]]:
    found = cast(Any, module)
    yield f"{prefix}.frequencies", _array(found.frequencies)
    yield f"{prefix}.weight", _array(found.linear.weight.t())
    yield f"{prefix}.bias", _array(found.linear.bias)


def _array(value: Tensor) -> Array:
    return cast(Array, value.detach().float().cpu().contiguous().numpy())
