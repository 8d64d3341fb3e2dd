"""Graphs of fixed shapes, for runtimes that plan ahead: a prefill and a decode step for each batch and length."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import onnx_ir as ir

from l2a_compress.errors import ConfigError
from l2a_compress.exporters.blocks import BATCH, PAST, PRESENT, SEQUENCE, TOTAL

PHASES = ("prefill", "decode")
_FORM = re.compile(r"batch=(\d+(?:,\d+)*)\s+seq=(\d+(?:,\d+)*)")


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``batch=1,4 seq=512`` -> all (batch, sequence) pairs, falling.

    Raises:
        ConfigError: another form, or a size of 0.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"static shapes {text!r}: write them as 'batch=1,4 seq=512,1024'")
    batches, lengths = ([int(size) for size in part.split(",")] for part in found.groups())
    if 0 in (*batches, *lengths):
        raise ConfigError(f"static shapes {text!r}: sizes are at least 1")
    return tuple(sorted(set(itertools.product(batches, lengths)), reverse=True))


def sizes_of(phase: str, batch: int, sequence: int, *, in_place: bool) -> dict[str, int]:
    """The sizes that stand for a graph's free dimensions.

    A cache has ``sequence`` slots. Written in place, it is the same buffer in both phases; else a prefill has no past,
    and a decode step gives its new slot behind the past ones, for the host to put into a slot that is free.
    """
    new = sequence if phase == "prefill" else 1
    if in_place:
        return {BATCH: batch, SEQUENCE: new, TOTAL: sequence, PAST: sequence, PRESENT: sequence}
    past = 0 if phase == "prefill" else sequence
    return {BATCH: batch, SEQUENCE: new, TOTAL: past + new, PAST: past, PRESENT: past + new}


def fix(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Writes ``sizes`` in the place of the free dimensions of all inputs and outputs, in the model itself."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            [sizes[str(dim.value)] if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
        )
    return model
