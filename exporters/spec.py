"""What a graph is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l2a_compress.cost import ModelShape
from l2a_compress.exporters.weights import Stored, reads_input
from l2a_compress.limits import Contract
from l2a_compress.modeling.gates import GateConfig


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """What a graph is built from.

    Attributes:
        shape: sizes of the decoder.
        gates: of the artifact.
        epsilon: of the norms.
        window: sliding window of the attention, None for none.
        think_id: id of ``<think>``.
        tensors: the weight file's content.
        widths: KV groups that a layer of the ``If`` graph can be run with, ascending; the last is all of them.
        positions: most tokens of a sequence.
        rotary_scale: of the cosines and sines.
        dialect: ``ort`` or ``standard``.
        bits: of the quantized matrices, 0 where they are not.
        block: numbers of a quantized matrix that share a scale.
        dtype: of the decoder's weights, activations and caches, by NumPy's name; gates and logits are float32.
        whole_cache: whether a skipped layer of the ``If`` graph still writes keys and values, so that it may run again
            at any later step.
    """

    shape: ModelShape
    gates: GateConfig
    epsilon: float
    window: int | None
    think_id: int
    tensors: Mapping[str, Stored]
    widths: tuple[int, ...]
    positions: int
    rotary_scale: float = 1.0
    dialect: str = "ort"
    bits: int = 0
    block: int = 32
    dtype: str = "float32"
    whole_cache: bool = True

    @property
    def reading(self) -> bool:
        """Whether the gates compute something."""
        return reads_input(self.tensors)

    @property
    def input_blind(self) -> list[Contract]:
        """The contracts under which all prompts get the same allocation at a budget."""
        if self.gates.summary == "none" or not (self.reading or self.gates.has_demand):
            return ["cap", "mean"]
        return [] if self.reading else ["cap"]


def widths_of(shape: ModelShape) -> tuple[int, ...]:
    """The widths of an ``If`` graph's layers: all up to four groups, else all and half of them."""
    groups = shape.num_groups
    return tuple(range(1, groups + 1)) if groups <= 4 else (-(-groups // 2), groups)
