"""Bundles: every graph says what PyTorch says, and a broken bundle does not open."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import weakref
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import DynamicCache

from l2a_compress._cli import main
from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.budget import Budget, budgets_of
from l2a_compress.bundle import Bundle, GraphEntry, describe_bundle
from l2a_compress.errors import BudgetError, BundleError, ConfigError, StorageError
from l2a_compress.exporters import calibrate as calibration
from l2a_compress.exporters.calibrate import not_faster
from l2a_compress.exporters.facts import branches, initializers, nodes
from l2a_compress.exporters.ladder import Prompts, mine
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.exporters.quantize import BITS, BLOCKS, quantize
from l2a_compress.exporters.refusals import window_of
from l2a_compress.exporters.shapes import parse_shapes
from l2a_compress.exporters.verify import (
    graph_inputs,
    graph_logits,
    lint,
    one_more,
    parity,
    right_padded,
    torch_logits,
)
from l2a_compress.exporters.weights import Stored, narrowed, rotary_of
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.families import decoder_layers
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.loading import load_base
from l2a_compress.modeling.physical import sliced_linear
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.training.store import load_artifact, save_artifact
from test_artifact import schema
from test_training_trainer import largest_file
from toy_models import FAMILIES, GROUPS, LAYERS, kept_groups, new_artifact, new_model, prompts

BUDGETS = (1.0, 0.8, 0.6, 0.45)
OPTIONS = ExportOptions(budgets=BUDGETS, calibration=16, head_widths=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, bundle) that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    artifact = new_artifact(folder)
    export(artifact, folder / "bundle", OPTIONS)
    return artifact, folder / "bundle"


@pytest.fixture(scope="module")
def gated(made: tuple[Path, Path]) -> GatedModel:
    """The artifact in PyTorch."""
    return load_artifact(made[0]).gated


@pytest.fixture(scope="module")
def decoder(made: tuple[Path, Path]) -> GraphDecoder:
    """The ``If`` graph."""
    return GraphDecoder(made[1] / "if.onnx", threads=1)


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    shutil.copytree(made[1], tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_says_what_pytorch_says(family: str, dialect: str, tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, family)
    bundle = export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, dialect=dialect))
    assert Bundle.load(tmp_path / "bundle") == bundle
    assert lint(tmp_path / "bundle", bundle) == []
    rows = list(parity(tmp_path / "bundle", artifact, prompts=12, tokens=6, budgets=BUDGETS))
    assert len(rows) == len(BUDGETS) + 1 + len(
        BUDGETS
    )  # the If graph at each budget and at all mixed, and the variants
    for row in rows:
        assert row.tokens == 72
        assert row.equal == row.tokens
        assert row.difference < 1e-3
        assert row.allocations


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_narrowed_layers_are_masked_where_the_graph_computes_them_whole(dialect: str, tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path)
    options = dataclasses.replace(OPTIONS, dialect=dialect, head_widths=False)
    bundle = export(artifact, tmp_path / "bundle", options)
    assert bundle.widths == (GROUPS,)
    rows = list(parity(tmp_path / "bundle", artifact, prompts=12, tokens=6, budgets=BUDGETS))
    assert any(0 < len(kept) < GROUPS for one in bundle.variants if one.allocation for kept in one.allocation.groups)
    for row in rows:
        assert (row.equal, row.allocations) == (row.tokens, True)


@pytest.mark.parametrize(
    ("narrowed", "precision", "widths"),
    [
        (0, "fp32", (GROUPS,)),
        (1, "fp32", (GROUPS,)),
        (LAYERS, "fp32", tuple(range(1, GROUPS + 1))),
        (LAYERS, "int8", (GROUPS,)),
    ],
)
def test_layers_have_widths_where_narrowing_them_pays(
    narrowed: int, precision: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    artifact = new_artifact(tmp_path)
    kept = [1 if LAYERS - narrowed <= at else GROUPS for at in range(LAYERS)]
    kept[0] = GROUPS  # the stem is never narrowed
    allocation = kept_groups(load_artifact(artifact).gated, kept)
    options = ExportOptions(allocations=((0.9, allocation),), precision=precision)
    assert export(artifact, tmp_path / "bundle", options).widths == widths


@pytest.mark.parametrize("gates", [{"summary": "none"}, {"summary": "mean"}, {"heads": False}, {"tokens": False}])
def test_every_form_of_gates_is_exported(gates: dict[str, object], tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, **gates)
    export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, head_widths=gates.get("heads")))
    for row in parity(tmp_path / "bundle", artifact, prompts=4, tokens=4, budgets=BUDGETS):
        assert (row.equal, row.allocations) == (row.tokens, True)


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("demand", [True, False])
def test_gates_that_no_input_moves_are_constants(
    dialect: str, demand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_artifact(new_artifact(tmp_path, demand=demand))
    for mlp in (loaded.gated.allocator.layer_gates, loaded.gated.allocator.head_gates):
        torch.nn.init.zeros_(mlp.outer)
    digest = str(loaded.config.base["digest"])
    same = tmp_path / "same"
    save_artifact(loaded.gated, loaded.tokenizer, loaded.recipe, same, base_digest=digest, metrics={})
    asked = list[int]()

    def counted(gated: GatedModel, prompts: Prompts, *args: Any, **settings: Any) -> object:
        asked.append(sum(len(ids) for ids, _ in prompts))
        return mine(gated, prompts, *args, **settings)

    monkeypatch.setattr("l2a_compress.exporters.ladder.mine", counted)
    export(same, tmp_path / "bundle", dataclasses.replace(OPTIONS, dialect=dialect))
    assert asked == [1]  # all other prompts would get the same ladder
    graph = onnx.load(tmp_path / "bundle" / "if.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in initializers(graph)}
    assert {"gates.layers.outer_bias", "gates.heads.outer_bias"} <= names
    assert not {name for name in names if name.startswith(("gates.layers.inner", "gates.heads.inner"))}
    assert ("gates.norm" in names) == demand  # nothing else asks for the prompt
    told_alone = Bundle.load(tmp_path / "bundle").gates["input_blind"]
    assert told_alone == (["cap"] if demand else ["cap", "mean"])
    for row in parity(tmp_path / "bundle", same, prompts=6, tokens=4, budgets=BUDGETS):
        assert (row.equal, row.allocations) == (row.tokens, True)


def dequantize(values: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of ``quantize``, up to rounding: [out, columns], float32."""
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    numbers = (values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return numbers.reshape(len(values), -1)[:, :columns]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 72])  # whole blocks, and a last one that is filled up
def test_quantization_keeps_to_half_a_step(bits: int, columns: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(24, columns)).astype(np.float32)
    matrix[0, :32] = 0
    values, scales = quantize(matrix, bits, 32)
    assert values.shape == (24, -(-columns // 32), 32 * bits // 8)
    error = np.abs(dequantize(values, scales, bits, columns) - matrix)
    steps = np.abs(scales).repeat(32, axis=1)[:, :columns]
    # The end of the range that has one number less may be cut by a whole step.
    assert (error <= steps * 1.0001).all()
    assert (error <= steps * 0.5001).mean() > 0.95


@pytest.mark.parametrize(
    ("precision", "block", "head_widths"),
    [("int8", 32, True), ("int4", 32, True), ("int8", None, True), ("int4", 64, True), ("int8", 32, False)],
)
def test_quantized_graphs_say_what_pytorch_says_with_the_same_rounded_weights(
    precision: str, block: int | None, head_widths: bool, tmp_path: Path
) -> None:
    """The embedded width, 32, is less than a block of 64 or 128, which is then filled up."""
    artifact = new_artifact(tmp_path)
    options = dataclasses.replace(OPTIONS, precision=precision, block=block, head_widths=head_widths)
    bundle = export(artifact, tmp_path / "bundle", options)
    assert lint(tmp_path / "bundle", bundle) == []
    loaded = load_artifact(artifact)
    rounded = with_weights(
        loaded.gated, lambda weight: rounded_matrix(weight, BITS[precision], block or BLOCKS[precision])
    )
    rounded_gates(rounded, bits=8)
    ids, mask = prompts(6, 12)
    for entry in bundle.decoders:
        asked = [Budget(compute=entry.budget or BUDGETS[row % 4]) for row in range(6)]
        told = batch_budgets(asked, rounded.cost, rounded.gate_config)
        given = [entry.allocation] * 6 if entry.allocation else rounded.allocate(ids, mask, asked)
        expected = torch_logits(rounded, ids, mask, given, told, 4)
        inputs = {} if entry.allocation else graph_inputs(told, LAYERS)
        decoder = GraphDecoder(with_exact_activations(tmp_path / "bundle" / entry.file), threads=1)
        found, kept = graph_logits(decoder, ids, mask, expected.argmax(-1), inputs)
        if kept is not None:
            assert kept.tolist() == [[len(groups) for groups in allocation.groups] for allocation in given]
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_graphs_of_16_bits_say_what_pytorch_says_with_the_same_rounded_weights(
    precision: str, dialect: str, tmp_path: Path
) -> None:
    """Computed in 32 bits for an exact comparison, and fp16, which onnxruntime has on a CPU, also as it is."""
    artifact = new_artifact(tmp_path)
    bundle = export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, precision=precision, dialect=dialect))
    assert lint(tmp_path / "bundle", bundle) == []
    # Norms, rotary tables and e(b) are rounded as well in the graph, which is what the tolerance is for.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    rounded = with_weights(load_artifact(artifact).gated, lambda weight: weight.to(dtype).float())
    rounded_gates(rounded, bits=16)
    ids, mask = prompts(6, 12)
    for entry in bundle.decoders:
        asked = [Budget(compute=entry.budget or BUDGETS[row % 4]) for row in range(6)]
        told = batch_budgets(asked, rounded.cost, rounded.gate_config)
        given = [entry.allocation] * 6 if entry.allocation else rounded.allocate(ids, mask, asked)
        expected = torch_logits(rounded, ids, mask, given, told, 4)
        inputs = {} if entry.allocation else graph_inputs(told, LAYERS)
        file = tmp_path / "bundle" / entry.file
        exact = GraphDecoder(in_32_bits(file), in_place=dialect == "ort", threads=1)
        found, _ = graph_logits(exact, ids, mask, expected.argmax(-1), inputs)
        np.testing.assert_allclose(found, expected, atol={"fp16": 1e-2, "bf16": 5e-2}[precision])
        if precision == "fp16":
            widths = {"allocation": np.array([[len(kept) for kept in one.groups] for one in given])} if inputs else {}
            real = GraphDecoder(file, in_place=dialect == "ort", threads=1)
            found, _ = graph_logits(real, ids, mask, expected.argmax(-1), inputs | widths)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=0.1)


def in_32_bits(path: Path) -> Path:
    """The same graph and the same weights, with every 16-bit type made float32."""
    model = onnx.load(str(path))
    narrow, wide = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16), onnx.TensorProto.FLOAT

    def change(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_type in narrow:
                value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in narrow:
                value.type.tensor_type.elem_type = wide
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                    attribute.i = wide
                if attribute.type == onnx.AttributeProto.GRAPH:
                    change(attribute.g)

    change(model.graph)
    changed = path.with_name(f"wide-{path.name}")
    onnx.save(model, str(changed))
    return changed


def test_numbers_beyond_16_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.q .* float16 cannot hold"):
        narrowed("layers.0.q", np.array([1e6], dtype=np.float32), "float16")
    assert narrowed("layers.0.q", np.array([1e6], dtype=np.float32), "bfloat16").itemsize == 2


def with_exact_activations(path: Path) -> Path:
    """The same graph with products in 32 bits: as shipped, activations are rounded to 8 bits as well."""
    model = onnx.load(str(path), load_external_data=False)

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    assert attribute.i == 4
                    attribute.i = 1
                if attribute.type == onnx.AttributeProto.GRAPH:
                    change(attribute.g)

    change(model.graph)
    changed = path.with_name(f"exact-{path.name}")
    changed.write_bytes(model.SerializeToString())
    return changed


@torch.no_grad()
def with_weights(gated: GatedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> GatedModel:
    """Adapters merged, every matrix changed, in the order of groups that export uses."""
    embed = gated.model.get_input_embeddings()
    embed.weight.copy_(change(embed.weight))
    for wrapper in decoder_layers(gated.model):
        layer = wrapper.layer
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if name.endswith("_proj"):
                    linear = sliced_linear(module, None, None)
                    linear.weight.copy_(change(linear.weight))
                    inner = module.projection if name == "o_proj" else module
                    inner.get_base_layer().weight.copy_(linear.weight)
    for name, value in gated.adapter_parameters.items():
        if "lora_B" in name:
            value.zero_()
    return gated


@torch.no_grad()
def rounded_gates(gated: GatedModel, bits: int) -> None:
    """To 16 bits, or to 8 by column: what graphs other than of fp32 decide with."""
    allocator, transition = gated.allocator, gated.transition
    linears = (allocator.embedding.linear, transition.embedding.linear, transition.inner, transition.outer)
    matrices = [linear.weight.t() for linear in (*linears, transition.at_think)]
    for matrix in (allocator.layer_gates.inner, allocator.head_gates.inner, *matrices):
        step = matrix.abs().amax(-2, keepdim=True) / 127
        assert (step > 0).all()
        matrix.copy_(torch.round(matrix / step) * step if bits == 8 else matrix.half().float())


def rounded_matrix(weight: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    return torch.from_numpy(dequantize(*quantize(weight.numpy(), bits, block), bits, weight.shape[1]))


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("mistral", {"sliding_window": 5}),
        ("llama", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    ],
)
def test_other_forms_of_models_are_exported(
    family: str, model: dict[str, object], dialect: str, tmp_path: Path
) -> None:
    artifact = new_artifact(tmp_path, family, model=model)
    export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, dialect=dialect))
    for row in parity(tmp_path / "bundle", artifact, prompts=4, tokens=8, budgets=BUDGETS):
        assert row.equal == row.tokens
        assert row.difference < 1e-3


def test_the_allocator_in_the_graph_is_the_one_of_pytorch(gated: GatedModel, decoder: GraphDecoder) -> None:
    """Random budgets, caps and prices; a price stands for the mean contract."""
    draw = np.random.default_rng(0)
    ids, mask = prompts(200, 12)
    tokens, held = right_padded(ids, mask)
    seen = set()
    for contract in ("cap", "mean"):
        asked = [
            Budget(
                compute=float(draw.uniform(0.3, 1.0)),
                layers=None if draw.random() < 0.5 else int(draw.integers(1, LAYERS + 1)),
                heads=None if draw.random() < 0.5 else int(draw.integers(GROUPS, LAYERS * GROUPS + 1)),
            )
            for _ in range(200)
        ]
        expected = gated.allocate(ids, mask, asked, contract=contract)  # type: ignore[arg-type]
        told = batch_budgets(asked, gated.cost, gated.gate_config, contract=contract, prices=gated.prices)  # type: ignore[arg-type]
        decoder.start(200, tokens.shape[1])
        found = decoder.step(tokens, held, **graph_inputs(told, LAYERS))["kept_groups"]
        assert found.tolist() == [[len(kept) for kept in allocation.groups] for allocation in expected]
        seen.update(expected)
    assert len(seen) > 30


def test_a_graph_at_an_allocation_is_the_variant_of_that_allocation(
    made: tuple[Path, Path], gated: GatedModel, decoder: GraphDecoder
) -> None:
    ids, mask = prompts(4, 12)
    follow = np.random.default_rng(0).integers(0, 40, (4, 5))
    for entry in Bundle.load(made[1]).variants:
        assert entry.allocation is not None
        told = batch_budgets([Budget(compute=entry.budget or 1.0)] * 4, gated.cost, gated.gate_config)
        widths = [len(kept) for kept in entry.allocation.groups]
        inputs = graph_inputs(told, LAYERS) | {"allocation": np.array([widths] * 4)}
        found, _ = graph_logits(decoder, ids, mask, follow, inputs)
        alone, _ = graph_logits(GraphDecoder(made[1] / entry.file, threads=1), ids, mask, follow, {})
        np.testing.assert_allclose(found, alone, atol=1e-4)


def test_rows_of_a_mixed_batch_are_as_if_alone(gated: GatedModel, decoder: GraphDecoder) -> None:
    ids, mask = prompts(4, 12)
    asked = [Budget(compute=value) for value in BUDGETS]
    told = batch_budgets(asked, gated.cost, gated.gate_config)
    follow = np.random.default_rng(1).integers(0, 40, (4, 5))
    together, kept = graph_logits(decoder, ids, mask, follow, graph_inputs(told, LAYERS))
    assert kept is not None
    assert len({tuple(row) for row in kept.tolist()}) == 4
    for row in range(4):
        one = batch_budgets(asked[row : row + 1], gated.cost, gated.gate_config)
        rows = slice(row, row + 1)
        alone, _ = graph_logits(decoder, ids[rows], mask[rows], follow[rows], graph_inputs(one, LAYERS))
        np.testing.assert_allclose(together[rows], alone, atol=1e-4)


WIDTHS = {
    "full": [2, 2, 2, 2, 2, 2],
    "less": [2, 2, 1, 0, 2, 1],
    "least": [2, 2, 1, 0, 0, 1],
    "other": [2, 0, 2, 1, 2, 0],
}


@pytest.mark.parametrize(
    ("dialect", "whole", "stages"),
    [
        ("ort", True, ("full", "least", "other", "full")),
        ("ort", False, ("full", "less", "least", "least")),
        ("standard", True, ("full", "least", "other", "full")),
    ],
)
@torch.no_grad()
def test_a_budget_changed_in_mid_sequence_is_what_pytorch_does(
    dialect: str, whole: bool, stages: tuple[str, ...], made: tuple[Path, Path], gated: GatedModel, tmp_path: Path
) -> None:
    """With a whole cache layers come and go, as masked in training; else they only go, as skipped in evaluation."""
    options = dataclasses.replace(OPTIONS, budgets=(), dialect=dialect, whole_cache=whole)
    export(made[0], tmp_path / "bundle", options)
    in_place = dialect == "ort"
    decoder = GraphDecoder(tmp_path / "bundle" / "if.onnx", in_place=in_place, threads=1)
    ids, mask = prompts(2, 12)
    told = batch_budgets([Budget()] * 2, gated.cost, gated.gate_config)
    order = gated.allocator.group_order.tolist()
    follow = np.random.default_rng(2).integers(0, 40, (2, 12))
    cache, tokens, seen = DynamicCache(), ids, mask
    rows, held = right_padded(ids, mask) if in_place else (ids.numpy(), mask.numpy())
    decoder.start(2, rows.shape[1] + 12)
    for step in range(12):
        widths = WIDTHS[stages[step // 3]]
        groups = [(0, 1), *(tuple(sorted(order[at][:width])) for at, width in enumerate(widths[1:]))]
        allocation = Allocation(num_groups=GROUPS, groups=tuple(groups))
        with gated.forced([allocation], skip=not whole):
            offset = gated.transition.think_offset(told.features)[:, None]
            gated.state.offset = (tokens == gated.think_id)[..., None] * offset
            places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            expected = gated.logits(gated(tokens, seen, cache=cache, position_ids=places).hidden[:, -1])
        inputs = graph_inputs(told, LAYERS) | {"allocation": np.array([widths] * 2)}
        found = decoder.step(rows, held, **inputs)
        np.testing.assert_allclose(found["logits"][:, 0], expected.numpy(), atol=1e-2)
        rows, held = follow[:, step : step + 1], one_more(held, in_place=in_place)
        tokens, seen = torch.from_numpy(rows), torch.cat([seen, seen.new_ones(2, 1)], dim=1)


def test_tau_is_that_of_pytorch(gated: GatedModel, decoder: GraphDecoder) -> None:
    ids, mask = prompts(3, 9)
    told = batch_budgets([Budget(compute=1.0)] * 3, gated.cost, gated.gate_config)
    rows, held = right_padded(ids, mask)
    decoder.start(3, rows.shape[1])
    found = decoder.step(rows, held, **graph_inputs(told, LAYERS))["tau"]
    with torch.no_grad(), gated.forced(None):
        gated.state.offset = (ids == gated.think_id)[..., None] * gated.transition.think_offset(told.features)[:, None]
        hidden = gated(ids, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).hidden[:, -1:]
        expected = torch.sigmoid(gated.transition(hidden, told.features))[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_all_graphs_share_one_weight_file(made: tuple[Path, Path]) -> None:
    """Nothing but small constants is in a graph, and narrower layers are prefixes of the same bytes."""
    bundle = Bundle.load(made[1])
    prefixes = 0
    for entry in bundle.graphs:
        graph = onnx.load(str(made[1] / entry.file), load_external_data=False).graph
        places = {}
        for tensor in initializers(graph):
            place = {item.key: item.value for item in tensor.external_data}
            if not place:
                assert int(np.prod(tensor.dims)) <= max(bundle.shape.hidden_size, 64)
                continue
            places.setdefault(int(place["offset"]), set()).add(int(place["length"]))
            assert int(place["offset"]) + int(place["length"]) <= bundle.files["weights.bin"]["size"]
        prefixes += sum(len(lengths) > 1 for lengths in places.values())
    assert prefixes > 0
    dense = 4 * sum(parameter.numel() for parameter in load_base(str(made[0].parent / "base"))[0].parameters())
    assert bundle.files["weights.bin"]["size"] > dense  # the gates are in it too


def test_every_node_leads_to_an_output(made: tuple[Path, Path]) -> None:
    for path in made[1].glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        read = {output.name for output in graph.output}
        branches = [graph]
        for branch in branches:
            read.update(name for node in branch.node for name in node.input)
            inner = [each.g for node in branch.node for each in node.attribute if each.HasField("g")]
            read.update(output.name for each in inner for output in each.output)
            branches += inner
        assert not [node.name for branch in branches for node in branch.node if read.isdisjoint(node.output)]


def test_a_layer_that_is_skipped_attends_to_nothing(made: tuple[Path, Path]) -> None:
    """It writes keys and values, and reads none of those of before, which would take as long as they are many."""
    bundle = Bundle.load(made[1])
    entry = next(entry for entry in bundle.graphs if entry.kind == "if")
    graph = onnx.load(str(made[1] / entry.file), load_external_data=False).graph
    skipped = 0
    for node, inside in nodes(graph):
        for branch in branches(node):
            if not inside and re.fullmatch(r"layer_\d+_else", branch.name):
                kinds = [one.op_type for one, _ in nodes(branch)]
                assert "GroupQueryAttention" not in kinds
                assert kinds.count("ScatterND") == 2
                skipped += 1
    assert skipped == LAYERS - bundle.gates["stem_layers"]


def test_the_manifest_keeps_its_schema(made: tuple[Path, Path]) -> None:
    data = json.loads((made[1] / "manifest.json").read_text())
    jsonschema.Draft202012Validator(schema("manifest")).validate(data)
    assert Bundle.from_json(data).to_json() == data


def test_a_ladder_is_nested_and_keeps_its_budgets(gated: GatedModel) -> None:
    ladder = mine(gated, [prompts(32, 12)], (1.0, 0.9, 0.7, 0.5, 0.4))
    assert ladder[0][1] == Allocation.dense(LAYERS, GROUPS)
    for (_, wide), (budget, narrow) in pairwise(ladder):
        assert narrow.is_subset(wide)
        assert gated.cost.fits(narrow, Budget(compute=budget))


def test_a_ladder_of_several_a_budget_is_a_tree(gated: GatedModel) -> None:
    budgets = (0.9, 0.7, 0.5)
    ladder = mine(gated, [prompts(32, 12)], budgets, per_budget=3)
    levels = [[allocation for at, allocation in ladder if at == budget] for budget in budgets]
    assert max(map(len, levels)) > 1  # the toy's gates do choose by the prompt
    for above, below in pairwise(levels):
        assert all(any(map(allocation.is_subset, above)) for allocation in below)
        assert len(set(below)) == len(below) <= 3


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_the_router_picks_what_is_nearest_to_what_the_gates_choose(
    dialect: str, made: tuple[Path, Path], gated: GatedModel, tmp_path: Path
) -> None:
    options = dataclasses.replace(OPTIONS, budgets=(0.9, 0.7, 0.5), per_budget=3, dialect=dialect)
    bundle = export(made[0], tmp_path / "bundle", options)
    assert lint(tmp_path / "bundle", bundle) == []
    variants, session = bundle.variants, onnxruntime.InferenceSession(tmp_path / "bundle" / "router.onnx")
    assert len(variants) > 3
    ids, mask = prompts(24, 12)
    asked = [Budget(compute=(1.0, 0.8, 0.7, 0.5, 0.45)[row % 5]) for row in range(24)]
    told = batch_budgets(asked, gated.cost, gated.gate_config)
    wanted = gated.allocate(ids, mask, asked)
    rows, held = right_padded(ids, mask) if dialect == "ort" else (ids.numpy(), mask.numpy())
    feeds = graph_inputs(told, LAYERS) | {"input_ids": rows, "attention_mask": held}
    found, kept = session.run(
        ["variant", "kept_groups"], {item.name: feeds[item.name] for item in session.get_inputs()}
    )
    assert kept.tolist() == [[len(groups) for groups in allocation.groups] for allocation in wanted]
    for row, at in enumerate(found.tolist()):
        allowed = [variant.budget for variant in variants if variant.budget <= asked[row].compute]
        if not allowed:
            assert at == -1
            continue
        assert variants[at].budget == max(allowed)
        apart = [
            sum(abs(len(a) - b) for a, b in zip(variant.allocation.groups, kept[row].tolist(), strict=True))
            for variant in variants
        ]
        assert apart[at] == min(d for d, variant in zip(apart, variants, strict=True) if variant.budget == max(allowed))
    assert len(set(found.tolist())) > 3


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_graphs_of_fixed_shapes_say_what_pytorch_says(
    dialect: str, made: tuple[Path, Path], gated: GatedModel, tmp_path: Path
) -> None:
    options = dataclasses.replace(
        OPTIONS, budgets=(1.0, 0.6), dialect=dialect, static_shapes=parse_shapes("batch=2 seq=16,24")
    )
    bundle = export(made[0], tmp_path / "bundle", options)
    assert lint(tmp_path / "bundle", bundle) == []
    static = {entry.name: entry for entry in bundle.graphs if entry.kind == "static"}
    assert len(static) == 8
    ids, mask = prompts(2, 10, seed=3)
    for variant, slots in itertools.product(bundle.variants, (16, 24)):
        told = batch_budgets([Budget(compute=variant.budget)] * 2, gated.cost, gated.gate_config)
        expected = torch_logits(gated, ids, mask, [variant.allocation] * 2, told, 5)
        prefill, decode = (static[f"{variant.name}.{phase}.batch2.seq{slots}"] for phase in ("prefill", "decode"))
        found = run_fixed(tmp_path / "bundle", prefill, decode, ids, mask, expected.argmax(-1), dialect)
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_a_window_counts_tokens_and_no_free_slots(dialect: str, tmp_path: Path) -> None:
    """Between the tokens of a prompt, with padding behind it, and those that follow there are slots without any."""
    artifact = new_artifact(tmp_path, "mistral", model={"sliding_window": 5})
    options = dataclasses.replace(OPTIONS, budgets=(1.0,), dialect=dialect, static_shapes=((2, 24),))
    static = {entry.name: entry for entry in export(artifact, tmp_path / "bundle", options).graphs}
    ids, mask = prompts(2, 10, seed=3)
    gated = load_artifact(artifact).gated
    told = batch_budgets([Budget()] * 2, gated.cost, gated.gate_config)
    expected = torch_logits(gated, ids, mask, [Allocation.dense(LAYERS, GROUPS)] * 2, told, 5)
    prefill, decode = (static[f"b1.{phase}.batch2.seq24"] for phase in ("prefill", "decode"))
    found = run_fixed(tmp_path / "bundle", prefill, decode, ids, mask, expected.argmax(-1), dialect)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def run_fixed(
    folder: Path,
    prefill: GraphEntry,
    decode: GraphEntry,
    ids: torch.Tensor,
    mask: torch.Tensor,
    follow: np.ndarray,
    dialect: str,
) -> np.ndarray:
    """Logits of a prefill and of decode steps, as a host with buffers of fixed sizes runs them."""
    first, step = (onnxruntime.InferenceSession(folder / entry.file) for entry in (prefill, decode))
    for session in (first, step):
        assert all(isinstance(size, int) for item in session.get_inputs() for size in item.shape)
    slots, (rows, held) = prefill.sizes["sequence"], right_padded(ids, mask)
    room = slots - rows.shape[1]
    tokens, seen = np.pad(rows, ((0, 0), (0, room))), np.pad(held, ((0, 0), (0, room)))
    feeds = {
        item.name: np.zeros(item.shape, dtype=np.float32)
        for item in first.get_inputs()
        if item.name.startswith("past_key_values")
    }
    logits = []
    for number in range(follow.shape[1]):
        session = first if number == 0 else step
        outputs = [item.name for item in session.get_outputs()]
        values = dict(
            zip(outputs, session.run(None, feeds | {"input_ids": tokens, "attention_mask": seen}), strict=True)
        )
        logits.append(values["logits"][:, 0])
        tokens = follow[:, number : number + 1]
        lengths = held.sum(1) + number
        for name in feeds:
            value = values[name.replace("past_key_values", "present")]
            if dialect == "standard" and number:  # the new slot stands behind the others: put it into a free one
                for row, length in enumerate(lengths):
                    value[row, :, length - 1] = value[row, :, -1]
                value = value[:, :, :-1]
            feeds[name] = value
        if dialect == "ort":
            seen = (np.arange(slots)[None] < lengths[:, None] + 1).astype(np.int64)
        else:
            seen = np.pad(
                (np.arange(slots)[None] < lengths[:, None]).astype(np.int64), ((0, 0), (0, 1)), constant_values=1
            )
    return np.stack(logits, axis=1)


def test_prompts_are_compared_within_the_positions(
    made: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = dataclasses.replace(OPTIONS, budgets=(1.0,), if_graph=False, head_widths=None, positions=36)
    export(made[0], tmp_path / "bundle", options)
    (row,) = parity(tmp_path / "bundle", made[0], prompts=16, tokens=6)
    assert row.equal == row.tokens
    assert f"{16 - row.tokens // 6} prompts of more than 30 tokens have no room" in caplog.text


def test_bf16_is_compared_where_it_runs(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(OPTIONS, budgets=(1.0,), precision="bf16")
    export(made[0], tmp_path / "bundle", options)
    verify = ["compress", "verify", str(tmp_path / "bundle"), "--artifact", str(made[0])]
    assert main([*verify, "--provider", "nonsense", "--prompts", "2"]) == 2  # which opens sessions with it
    assert "provider 'nonsense': choose one of" in capsys.readouterr().err
    monkeypatch.setattr("l2a_compress.exporters.verify.load_artifact", None)  # it is said before
    assert main(verify) == 2
    assert "onnxruntime cannot run bf16 on a CPU; give --provider, or --engines" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "batch=1", "seq=8", "batch=0 seq=8", "batch=1,x seq=8", "batch=1 seq=8 more=1"])
def test_shapes_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="static shapes"):
        parse_shapes(text)


@pytest.mark.parametrize(
    "table",
    [{}, {"budgets": []}, {"budgets": [0.5, 0.7]}, {"budgets": [0.5, 0.5]}, {"budgets": [0.5], "more": 1}],
)
def test_a_ladder_that_is_none_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="ladder"):
        budgets_of(table)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": (0.8000001, 0.8)}, "budgets 0.8 and 0.8000001: both are named b0.8; leave one out"),
        ({"budgets": (0.5, 0.7)}, "must fall"),
        ({"budgets": (1.0, 0.7), "per_budget": 129}, "258 variants: a bundle has at most 256"),
        ({"allocations": ((0.8, Allocation.dense(LAYERS, GROUPS)),) * 257}, "257 variants"),
        ({"if_graph": False}, "--head-widths and --no-whole-cache are of the If graph"),
        ({"if_graph": False, "head_widths": None, "whole_cache": False}, "are of the If graph"),
    ],
)
def test_ladders_and_options_that_come_to_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(OPTIONS, **changes)


def test_what_is_refused_is_refused_before_the_work(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As the names of the parts say, which are told before each is begun."""
    report = tmp_path / "evaluation" / "report.json"
    report.parent.mkdir()
    report.write_text("{}")
    shutil.copytree(made[0], tmp_path / "artifact")
    bias, layers = (tmp_path / name for name in ("bias", "layers"))
    whole, less = Allocation.dense(LAYERS, GROUPS), Allocation.of_layers(range(LAYERS - 1), LAYERS, GROUPS)
    flat = dataclasses.replace(OPTIONS, head_widths=None)
    for artifact, options, words in (
        (tmp_path / "artifact", OPTIONS, "not a report"),
        (made[0], dataclasses.replace(OPTIONS, budgets=(1.0, 0.05)), "always-on"),
        (made[0], dataclasses.replace(OPTIONS, allocations=((0.8, whole), (0.9, less))), "fall and are nested"),
        (made[0], dataclasses.replace(OPTIONS, allocations=((0.9, less), (0.8, whole))), "fall and are nested"),
        (new_artifact(bias, "llama", model={"mlp_bias": True}), flat, "no bias in the MLP"),
        (new_artifact(layers, heads=False), OPTIONS, "leave out --head-widths"),
    ):
        told = list[str]()
        with pytest.raises((BudgetError, ConfigError), match=words):
            export(artifact, tmp_path / "bundle", options, progress=told.append)
        assert told == ["artifact"]


def test_a_budget_below_the_stem_is_refused_and_leaves_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="always-on"):
        export(made[0], tmp_path / "bundle", ExportOptions(budgets=(1.0, 0.05), calibration=4))
    assert list(tmp_path.iterdir()) == []


def test_inline_gates_have_no_graph(tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, mode="inline")
    with pytest.raises(ConfigError, match="inline"):
        export(artifact, tmp_path / "bundle", OPTIONS)


@pytest.mark.parametrize(
    ("family", "model", "window"),
    [
        ("mistral", {"sliding_window": 7}, 7),
        ("mistral", {"sliding_window": None}, None),
        ("llama", {"sliding_window": 7}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": LAYERS}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, None),
    ],
)
def test_the_window_is_where_transformers_has_it(family: str, model: dict[str, object], window: int | None) -> None:
    assert window_of(new_model(family, **model).config) == window


def test_mixed_windows_are_refused() -> None:
    model = new_model("qwen3", use_sliding_window=True, sliding_window=7, max_window_layers=2)
    with pytest.raises(ConfigError, match="mixed"):
        window_of(model.config)


def longrope(original: int) -> dict[str, object]:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, **factors}}


@pytest.mark.parametrize(
    ("model", "words"),
    [({"hidden_act": "gelu"}, "hidden_act 'gelu'"), (longrope(128), "positions = 512: longrope .* beyond 128")],
)
def test_models_that_the_graphs_do_not_compute_are_refused(
    model: dict[str, object], words: str, tmp_path: Path
) -> None:
    artifact = new_artifact(tmp_path, "llama", model=model)
    with pytest.raises(ConfigError, match=words):
        export(artifact, tmp_path / "bundle", OPTIONS)


def test_longrope_has_its_short_frequencies_whatever_ran_last(tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, "llama", model=longrope(64))
    gated = load_artifact(artifact).gated
    with torch.no_grad():
        gated.model(torch.ones(1, 80, dtype=torch.int64))  # beyond the original length
    expected = 1 / 10_000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(rotary_of(gated)[0], expected, rtol=1e-5)
    export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, budgets=(1.0,), positions=64))
    for row in parity(tmp_path / "bundle", artifact, prompts=4, tokens=4, budgets=(1.0,)):
        assert row.equal == row.tokens
        assert row.difference < 1e-3


@pytest.mark.parametrize("place", [".", "base", "artifact"])
def test_what_is_exported_is_not_replaced_by_the_bundle(place: str, tmp_path: Path) -> None:
    """Not by force either, and not where a bundle was put around or into it."""
    artifact = new_artifact(tmp_path / "run")
    out, before = tmp_path / "run" / place, sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(StorageError, match=r"holds no manifest\.json"):
        export(artifact, out, OPTIONS, force=True)
    assert sorted((tmp_path / "run").rglob("*")) == before
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="which is exported; choose another folder"):
        export(artifact, out, OPTIONS, force=True)
    assert (out / "manifest.json").is_file()


def test_a_bundle_that_is_there_is_not_replaced(made: tuple[Path, Path], copy: Path) -> None:
    before = describe_bundle(copy)
    with pytest.raises(StorageError, match="exists"):
        export(made[0], copy, OPTIONS)
    assert describe_bundle(copy) == before


@pytest.mark.parametrize("size", [1_000, 50_000])
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(size: int, made: tuple[Path, Path], tmp_path: Path) -> None:
    with largest_file(size), pytest.raises(StorageError, match=r"free some space|does not hold files"):
        export(made[0], tmp_path / "bundle", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weights.bin", "if.onnx", "b0.8.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_bundle_does_not_open(copy: Path, name: str, damage: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(BundleError, match=path.name):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "newer"),
        ({"dialect": "x"}, "dialect"),
        ({"precision": "fp2"}, "precision"),
        ({"graphs": []}, "at least one"),
        ({"shape": {}}, "shape: "),
        ({"files": {"../x": {"sha256": "0" * 64, "size": 1}}}, "inside"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "static"}, "sizes"),
        ({"sizes": {"batch": 1}}, "other graphs none"),
        ({"kind": "static", "sizes": {"batch": 1}}, "sizes must be"),
        ({"kind": "static", "sizes": dict.fromkeys(("batch", "sequence", "total", "past", "present"), -1)}, "batch"),
        ({"kind": "router"}, "neither"),
        ({"budget": None}, "neither"),
    ],
)
def test_an_entry_whose_fields_do_not_fit_together_is_refused(
    change: dict[str, object], message: str, made: tuple[Path, Path]
) -> None:
    entry = Bundle.load(made[1]).variants[-1].to_json()
    with pytest.raises(BundleError, match=message):
        GraphEntry.from_json(entry | change)


def test_variants_that_are_not_nested_are_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    data["graphs"][1:] = reversed(data["graphs"][1:])
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="nested"):
        Bundle.load(copy)


def test_variants_of_given_allocations_are_exported(made: tuple[Path, Path], gated: GatedModel, tmp_path: Path) -> None:
    half = kept_groups(gated, [2 - layer % 2 for layer in range(LAYERS)])
    options = dataclasses.replace(
        OPTIONS, allocations=((1.0, Allocation.dense(LAYERS, 2)), (0.8, half)), if_graph=False, head_widths=None
    )
    bundle = export(made[0], tmp_path / "bundle", options)
    assert [(entry.name, entry.allocation) for entry in bundle.graphs] == [
        ("b1", Allocation.dense(LAYERS, 2)),
        ("b0.8", half),
    ]
    with pytest.raises(ConfigError, match="nested"):
        export(made[0], tmp_path / "other", dataclasses.replace(options, allocations=options.allocations[::-1]))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("wrong", ["order", "stem", "shape"])
def test_allocations_that_the_graphs_cannot_hold_are_refused(
    wrong: str, made: tuple[Path, Path], gated: GatedModel, tmp_path: Path
) -> None:
    last = gated.allocator.group_order[-1].tolist()
    groups = [[0, 1]] * (LAYERS - 1) + [[last[1]]]
    if wrong != "order":
        groups = [[0], *groups[1:-1], [0, 1]] if wrong == "stem" else groups[1:]
    allocation = Allocation(num_groups=2, groups=tuple(map(tuple, groups)))
    options = dataclasses.replace(OPTIONS, allocations=((0.8, allocation),))
    words = {"order": rf"layer 5 .* the first of \[{last[0]}, {last[1]}\]", "stem": "layer 0 .* all of them"}
    with pytest.raises(ConfigError, match=words.get(wrong, "another model shape")):
        export(made[0], tmp_path / "bundle", options)


def test_the_dense_variant_is_open_to_others_at_any_budget(made: tuple[Path, Path], tmp_path: Path) -> None:
    """It is the one whose allocation is whole; in the dialect standard others cannot share a buffer with it."""
    whole, less = Allocation.dense(LAYERS, GROUPS), Allocation.of_layers(range(LAYERS - 1), LAYERS, GROUPS)
    options = dataclasses.replace(OPTIONS, if_graph=False, head_widths=None)
    for budget, allocation, dialect in ((0.9, whole, "ort"), (1.0, less, "ort"), (1.0, whole, "standard")):
        out = tmp_path / f"{budget}-{dialect}"
        export(made[0], out, dataclasses.replace(options, allocations=((budget, allocation),), dialect=dialect))
        opened = allocation == whole and dialect == "ort"
        assert [(out / name).is_file() for name in ("config.json", "genai_config.json")] == [opened, opened]


def test_the_package_of_onnxruntime_may_be_another(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu brings the same module."""
    found = metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    options = dataclasses.replace(
        OPTIONS, allocations=((1.0, Allocation.dense(LAYERS, GROUPS)),), if_graph=False, head_widths=None
    )
    assert export(made[0], tmp_path / "bundle", options).versions["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize(("precision", "block"), [("fp32", 32), ("int4", 48)])
def test_a_block_that_there_is_not_is_refused(precision: str, block: int) -> None:
    with pytest.raises(ConfigError, match="32, 64, 128"):
        dataclasses.replace(OPTIONS, precision=precision, block=block)


def test_adapters_of_a_base_in_16_bits_are_merged_in_32(tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, dtype="bfloat16")
    export(artifact, tmp_path / "bundle", dataclasses.replace(OPTIONS, budgets=(1.0, 0.6)))
    for row in parity(tmp_path / "bundle", artifact, prompts=6, tokens=4, budgets=(1.0, 0.6)):
        assert (row.equal, row.allocations) == (row.tokens, True)
        assert row.difference < 1e-3


def test_rows_are_within_their_tensor() -> None:
    stored = Stored(4096, (8, 3), "float32")
    assert (stored.length, stored.rows(0, 2)) == (96, Stored(4096, (2, 3), "float32"))
    assert stored.rows(2, 6) == Stored(4096 + 24, (6, 3), "float32")
    for start, count in ((0, 9), (7, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="rows"):
            stored.rows(start, count)


def test_calibration_measures_every_graph_and_leaves_no_file_of_a_dropped_one(
    made: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = dataclasses.replace(OPTIONS, budgets=(1.0, 0.999, 0.45), calibrate=True)
    bundle = export(made[0], tmp_path / "bundle", options)
    costs = json.loads((tmp_path / "bundle" / "costs.json").read_text())
    assert "costs.json" in Bundle.load(tmp_path / "bundle").files
    for graph in bundle.decoders:
        measured = costs["graphs"][graph.name]
        assert min(measured["decode_seconds"], measured["prefill_seconds"]) > 0
        assert measured["peak_bytes"] > bundle.files["weights.bin"]["size"]
    kept = [costs["graphs"][graph.name]["decode_seconds"] for graph in bundle.variants]
    assert kept == sorted(kept, reverse=True)
    dropped = set(costs["graphs"]) - {graph.name for graph in bundle.graphs}
    assert all(name in caplog.text and not (tmp_path / "bundle" / f"{name}.onnx").exists() for name in dropped)


def test_calibration_has_two_graphs_open_at_most_and_none_while_memory_is_measured(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, most = weakref.WeakSet[GraphDecoder](), list[int]()

    class Counted(GraphDecoder):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            opened.add(self)
            most.append(len(opened))

    def peak(*_: object, **__: object) -> int:
        assert not opened
        return 1

    clock, shares = itertools.count(2), {"b0.8": 0.5, "b0.6": 0.25}

    def seconds(decoder: GraphDecoder, *_: object) -> tuple[float, float]:
        slow = next(clock) // 2  # the machine slows down, by as much for both that take turns
        return 6.0 * slow, 2.0 * slow * shares.get(decoder._path.stem, 1.0)

    monkeypatch.setattr(calibration, "GraphDecoder", Counted)
    monkeypatch.setattr(calibration, "_peak", peak)
    monkeypatch.setattr(calibration, "_run", seconds)
    monkeypatch.setattr(calibration, "write_atomic", lambda *_: None)
    bundle = Bundle.load(made[1])
    found = calibration.calibrate(made[1], bundle.decoders, bundle.shape, in_place=True, positions=256)["graphs"]
    assert most == [1, 2, 2, 2, 2]
    for name, each in found.items():
        assert each["decode_seconds"] == pytest.approx(found["b1"]["decode_seconds"] * shares.get(name, 1.0))
    alone = calibration.calibrate(made[1], bundle.decoders[:1], bundle.shape, in_place=True, positions=256)["graphs"]
    assert alone["if"]["decode_seconds"] > 0


def test_figures_of_another_artifact_are_left_out(
    made: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, report = tmp_path / "artifact", tmp_path / "evaluation" / "report.json"
    shutil.copytree(made[0], artifact)
    report.parent.mkdir()
    settings = dataclasses.replace(OPTIONS, budgets=(1.0,), if_graph=False, head_widths=None)
    told = {"metric": "agreement", "points": [{"budget": 1.0, "accuracy": 0.5}]}
    for digest, count in ((ArtifactConfig.load(artifact).digest, 1), ("0" * 64, 0), (None, 0)):
        caplog.clear()
        report.write_text(json.dumps(told | {"model": {"artifact": digest} if digest else {}}))
        bundle = export(artifact, tmp_path / "bundle", settings, force=True)
        assert bundle.quality == ({"budget": 1.0, "accuracy": 0.5, "metric": "agreement"},) * count
        assert ("is of another artifact" in caplog.text) == (not count)
    report.write_text("{}")
    with pytest.raises(ConfigError, match="not a report"):
        export(artifact, tmp_path / "bundle", settings, force=True)


@pytest.mark.parametrize(
    ("changes", "words"), [({"precision": "bf16"}, "bf16"), ({"positions": 1}, "2 positions at least")]
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(OPTIONS, calibrate=True, **changes)


def test_calibration_keeps_to_the_positions(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, budgets=(1.0,), positions=20, calibrate=True)
    export(made[0], tmp_path / "bundle", options)
    costs = json.loads((tmp_path / "bundle" / "costs.json").read_text())
    assert costs["prompt"] == 4
    assert costs["graphs"]["b1"]["peak_bytes"]


def test_a_variant_that_is_not_faster_than_the_last_that_stays_is_dropped(made: tuple[Path, Path]) -> None:
    graphs = Bundle.load(made[1]).decoders
    seconds = dict(zip((graph.name for graph in graphs), (9.0, 4.0, 4.5, 4.0, 3.0), strict=True))
    costs = {"graphs": {name: {"decode_seconds": value} for name, value in seconds.items()}}
    assert [graph.name for graph in not_faster(graphs, costs)] == [graphs[2].name, graphs[3].name]


def test_a_variant_goes_with_the_last_that_it_was_a_part_of(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, small = Allocation.dense(LAYERS, GROUPS), Allocation.of_layers((0, 1, 2), LAYERS, GROUPS)
    one, other = (Allocation.of_layers((0, 1, 2, last, 4), LAYERS, GROUPS) for last in (3, 5))
    part = Allocation.of_layers((0, 1, 2, 5), LAYERS, GROUPS)  # of the other alone
    ladder = ((1.0, whole), (0.85, one), (0.85, other), (0.7, part), (0.5, small))
    seconds = {"if": 5.0, "b1": 5.0, "b0.85": 4.0, "b0.85-2": 6.0, "b0.7": 3.0, "b0.5": 2.0}
    costs = {"graphs": {name: {"decode_seconds": value} for name, value in seconds.items()}}
    monkeypatch.setattr("l2a_compress.exporters.onnx.calibrate", lambda *_, **__: costs)
    options = ExportOptions(budgets=(1.0,), allocations=ladder, calibrate=True)
    bundle = export(made[0], tmp_path / "bundle", options)
    assert [graph.name for graph in bundle.variants] == ["b1", "b0.85", "b0.5"]
    assert "b0.85-2 is not faster" in caplog.text
    assert "b0.7 is no part of the larger variants that stay" in caplog.text
    assert not (tmp_path / "bundle" / "b0.7.onnx").exists()


@pytest.mark.parametrize("name", ["calibration", "per_budget", "positions"])
def test_counts_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = 0: must be at least 1"):
        dataclasses.replace(OPTIONS, **{name: 0})


def test_shapes_beyond_the_positions_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, static_shapes=((1, 64), (2, 65)), positions=64)
    with pytest.raises(ConfigError, match="batch=2 seq=65: longer than the bundle's 64 positions"):
        export(made[0], tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_the_commands_export_verify_and_inspect(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["compress", "export", "--artifact", str(made[0]), "--out", str(out), "--quiet"]) == 0
    assert "b0.55" in capsys.readouterr().out
    command = ["compress", "verify", str(out), "--artifact", str(made[0]), "--prompts", "4", "--tokens", "4"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "onnx.checker" in shown
    assert "mixed" in shown
    assert main(["compress", "inspect", str(out)]) == 0
    assert "b0.55" in capsys.readouterr().out
    assert main(["compress", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "ort"
    for option, value in (("--base", "x"), ("--engines", "trt"), ("--provider", "cuda")):  # which say nothing alone
        assert main(["compress", "verify", str(out), option, value]) == 2
        assert f"{option} '{value}' says what is compared" in capsys.readouterr().err
    (out / "if.onnx").unlink()
    assert main(["compress", "verify", str(out)]) != 0


@pytest.mark.parametrize("more", [{"static_shapes": ((1, 8),)}, {"per_budget": 2}, {"per_budget": 0}])
def test_what_is_made_of_variants_needs_them(more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"variants|per_budget"):
        ExportOptions(budgets=(), **more)


def test_onnxruntime_genai_opens_the_dense_variant(made: tuple[Path, Path], gated: GatedModel) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    ids, mask = prompts(1, 9, padded=False)
    told = batch_budgets([Budget()], gated.cost, gated.gate_config)
    dense = Allocation.dense(LAYERS, GROUPS)
    expected = torch_logits(gated, ids, mask, [dense], told, 12).argmax(-1)[0].tolist()
    model = genai.Model(str(made[1]))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=9 + 12, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0)[9:].tolist()
    assert len(found) > 4  # it stops at </answer>
    assert found == expected[: len(found)]


def test_an_export_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to export"):
        ExportOptions(budgets=(), if_graph=False)
