"""`l2a compress verify`: is a bundle whole, does it keep the export rules, and does it say what PyTorch says?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import DynamicCache

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.bundle import WEIGHT_FILE, Bundle, GraphEntry
from l2a_compress.engines import BuildRecipe, engines
from l2a_compress.errors import BundleError, ConfigError
from l2a_compress.exporters import rules
from l2a_compress.exporters.facts import initializers
from l2a_compress.exporters.specialize import specialize
from l2a_compress.exporters.weights import alignment
from l2a_compress.modeling.budgets import BudgetBatch, batch_budgets
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.runtime.decoder import CACHE_TYPES, PAST, Array, GraphDecoder, predicates
from l2a_compress.runtime.providers import Provider
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.store import load_artifact

log = logging.getLogger(__name__)
_ROWS = 16  # that are compared at a time


class Decoder(Protocol):
    """What runs a graph: ``GraphDecoder``, or the engine of one."""

    in_place: bool

    def start(self, batch: int, capacity: int) -> None:
        """Begins anew."""

    def step(self, input_ids: Array, attention_mask: Array, **inputs: Array) -> Mapping[str, Array]:
        """Runs it once."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How one graph compares with PyTorch under one budget.

    Attributes:
        graph: its name.
        budget: the compute budget, or a text for a mixture.
        tokens: greedy tokens that were compared.
        equal: how many of them were the same.
        difference: largest absolute difference of a logit.
        allocations: whether the graph allocated what PyTorch allocates; True where it does not allocate.
    """

    graph: str
    budget: str
    tokens: int
    equal: int
    difference: float
    allocations: bool


def lint(folder: Path, bundle: Bundle) -> list[str]:
    """What breaks the export rules, each as a sentence; also runs onnx's own checker."""
    found = []
    for entry in bundle.graphs:
        path = folder / entry.file
        try:
            onnx.checker.check_model(str(path))
        except (onnx.checker.ValidationError, onnx.onnx_cpp2py_export.checker.ValidationError) as error:
            found.append(f"{entry.file}: onnx.checker: {error}")
        model = onnx.load(str(path), load_external_data=False)
        for tensor in initializers(model.graph):
            place = {item.key: item.value for item in tensor.external_data}
            if not place:
                continue
            step = 1 if "[" in tensor.name else alignment(int(place["length"]))  # some rows of a tensor stand anywhere
            if place["location"] != WEIGHT_FILE or int(place["offset"]) % step:
                found.append(f"{entry.file}: {tensor.name} is not at an aligned place of {WEIGHT_FILE}")
        if bundle.dialect == "standard":
            found += [f"{entry.file}: {finding}" for finding in rules.check(model)]
    return found


def specialized(
    folder: Path, bundle: Bundle, entry: GraphEntry, *, rows: int = 3, tokens: int = 40
) -> dict[str, float]:
    """Largest difference of a logit between each variant and ``if`` or ``told`` specialised to its allocation.

    Both run in onnxruntime on one thread, on random tokens without ``<think>``, where the graph computes the budget's
    embedding and the variant has it from PyTorch. 0.0 is equality bit for bit.
    """
    found = {}
    tokens = min(tokens, bundle.positions)
    graph = onnx.load(str(folder / entry.file), load_external_data=False)
    ids = np.random.default_rng(0).choice(
        sorted({*range(bundle.shape.vocab_size)} - {bundle.tags["think"]}), (rows, tokens)
    )
    mask = np.ones_like(ids)
    mask[0, : tokens // 4] = 0
    for variant in bundle.variants:
        kept = [len(groups) for groups in variant.allocation.groups] if variant.allocation else []
        inputs = {"budget": np.full((rows, 2), [variant.budget, 1.0], dtype=np.float32)}
        inputs["allocation"] = np.tile(np.array(kept, dtype=np.int64), (rows, 1))
        inputs |= predicates(inputs["allocation"], bundle.gates["stem_layers"], bundle.widths)  # some outlive an If
        one = _logits(specialize(graph, bundle.widths, kept).SerializeToString(), folder, ids, mask, inputs)
        other = _logits(str(folder / variant.file), folder, ids, mask, {})
        found[variant.name] = float(np.abs(one - other).max())
    return found


def _logits(graph: bytes | str, folder: Path, ids: Array, mask: Array, inputs: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": mask, **inputs}
    feed = {}
    for item in session.get_inputs():
        past = item.name.startswith(PAST)
        feed[item.name] = (
            np.zeros((len(ids), item.shape[1], 0, item.shape[3]), CACHE_TYPES[item.type][0])
            if past
            else given[item.name]
        )
    found: Array = session.run(["logits"], feed)[0]
    return found


def parity(
    folder: Path,
    artifact: Path,
    *,
    base: str | None = None,
    prompts: int = 64,
    tokens: int = 64,
    budgets: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    threads: int = 1,
    provider: Provider = "cpu",
    open_decoder: Callable[[GraphEntry], Decoder] | None = None,
    target: str | None = None,
) -> Iterator[Parity]:
    """Compares greedy tokens of ``If`` graphs and variants with PyTorch's hard-gated model, on calibration prompts.

    PyTorch's greedy tokens are fed to both, so one token that differs does not hide what comes after it. It computes in
    32 bits, whatever the base model has. What runs a graph is onnxruntime on ``provider``, or what ``open_decoder``
    makes of it; then graphs that have an engine for ``target`` are compared. Prompts that leave no room for ``tokens``
    are left out.

    Raises:
        BundleError: the bundle was made of another base model than the artifact, or has no engine to compare. Whether
            it was made of the same training is what the tokens say.
        ConfigError: no prompt leaves room for so many tokens, or a CPU is to run bf16.
    """
    bundle = Bundle.load(folder)
    entries = [*bundle.decoders, *(entry for entry in bundle.graphs if entry.kind == "told")]
    recipes: list[BuildRecipe] = []
    if open_decoder is not None:
        entries, recipes = _with_engines(folder, bundle, entries, target)
    elif bundle.precision == "bf16" and provider == "cpu":
        raise ConfigError(f"{folder}: onnxruntime cannot run bf16 on a CPU; give --provider, or --engines")
    loaded = load_artifact(artifact, base=base)
    gated = loaded.gated.float()
    if loaded.config.base["digest"] != bundle.base["digest"]:
        raise BundleError(f"{folder}: was exported from another base model than that of {artifact}")
    rows, room = _room(recipes, bundle.positions, tokens)
    batches = _fitting(calibration_prompts(loaded.recipe, loaded.tokenizer, prompts, batch_size=rows), room)
    for entry in entries:
        decoder: Decoder | None = None  # the one before is closed first: there may be no room for two
        if open_decoder is not None:
            decoder = open_decoder(entry)
        else:
            in_place = bundle.dialect == "ort"
            decoder = GraphDecoder(folder / entry.file, in_place=in_place, threads=threads, provider=provider)
        wanted: list[tuple[str, list[float]]] = [(f"{budget:g}", [budget]) for budget in budgets]
        if entry.kind == "variant":
            assert entry.budget is not None
            wanted = [(f"{entry.budget:g}", [entry.budget])]
        else:
            wanted.append(("mixed", list(budgets)))
        for name, cycle in wanted:
            yield _compare(gated, entry, decoder, batches, name, cycle, tokens, bundle.widths)


def _with_engines(
    folder: Path, bundle: Bundle, entries: Sequence[GraphEntry], target: str | None
) -> tuple[list[GraphEntry], list[BuildRecipe]]:
    """Those of ``entries`` that have an engine, and the recipes of these."""
    names = {entry.name for entry in entries}
    recipes = [each.recipe for each in engines(folder, bundle, target) if each.recipe.graph in names]
    if not recipes:
        raise BundleError(
            f"{folder}: has no engine to compare; export with --target {target or 'trt or trt-rtx'}, and some of told, "
            "variants and if among --engines"
        )
    return [entry for entry in entries if entry.name in {recipe.graph for recipe in recipes}], recipes


def _room(recipes: Sequence[BuildRecipe], positions: int, tokens: int) -> tuple[int, int]:
    """Most rows, and most tokens of a prompt with ``tokens`` behind it, that all graphs and engines take."""
    rows, room = _ROWS, positions - tokens
    for profile in (profile for recipe in recipes for profile in recipe.profiles):
        batch, fed = profile.shapes["input_ids"][2]
        total = profile.shapes["attention_mask"][2][1]
        rows, room = min(rows, batch), min(room, fed if profile.name == "prefill" else total - tokens)
    return rows, room


def _fitting(batches: Sequence[tuple[Tensor, Tensor]], most: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of at most ``most`` tokens, left-padded as before."""
    fitting, count = [], 0
    for ids, mask in batches:
        lengths = mask.sum(1)
        fits = lengths <= most
        if fits.any():
            longest = int(lengths[fits].max())
            fitting.append((ids[fits, -longest:], mask[fits, -longest:]))
        count += int((~fits).sum())
    if not fitting:
        raise ConfigError(
            f"none of {count} prompts has at most {most} tokens, which is the room beside those that are written: "
            "compare fewer tokens (--tokens), or export with more positions (engines: --max-prompt, --max-context)"
        )
    if count:
        log.warning("%d prompts of more than %d tokens have no room and are not compared", count, most)
    return fitting


def _compare(
    gated: GatedModel,
    entry: GraphEntry,
    decoder: Decoder,
    batches: Sequence[tuple[Tensor, Tensor]],
    name: str,
    cycle: Sequence[float],
    tokens: int,
    widths: Sequence[int],
) -> Parity:
    count = equal = 0
    worst, same = 0.0, True
    for ids, mask in batches:
        asked = [Budget(compute=cycle[row % len(cycle)]) for row in range(len(ids))]
        told = batch_budgets(asked, gated.cost, gated.gate_config)
        given = [entry.allocation] * len(ids) if entry.allocation else gated.allocate(ids, mask, asked)
        expected = torch_logits(gated, ids, mask, given, told, tokens)
        follow = expected.argmax(-1)
        inputs = {} if entry.allocation else graph_inputs(told, gated.shape.num_layers)
        if entry.kind == "told":
            chosen = np.array([[len(groups) for groups in allocation.groups] for allocation in given], dtype=np.int64)
            stem = gated.gate_config.stem_layers
            shown = {"budget": inputs["budget"]} if gated.gate_config.tokens else {}
            inputs = {**shown, "allocation": chosen, **predicates(chosen, stem, widths)}
        found, kept = graph_logits(decoder, ids, mask, follow, inputs)
        if kept is not None:
            same &= kept.tolist() == [[len(groups) for groups in allocation.groups] for allocation in given]
        count += follow.size
        equal += int((found.argmax(-1) == follow).sum())
        worst = max(worst, float(np.abs(found - expected).max()))
    return Parity(graph=entry.name, budget=name, tokens=count, equal=equal, difference=worst, allocations=same)


@torch.no_grad()
def torch_logits(
    gated: GatedModel, ids: Tensor, mask: Tensor, allocations: Sequence[Allocation], told: BudgetBatch, steps: int
) -> Array:
    """Logits of greedy steps of the hard-gated model. Left-padded prompts -> [batch, steps, vocabulary]."""
    found = []
    with gated.forced(allocations):
        cache, tokens = DynamicCache(), ids
        for _ in range(steps):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            gated.state.offset = gated.think_offset(tokens, told.features)
            hidden = gated(tokens, mask, cache=cache, position_ids=positions).hidden[:, -1:]
            logits = gated.logits(hidden)[:, 0].float()
            found.append(logits.numpy())
            tokens = logits.argmax(-1)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return np.stack(found, axis=1)


def graph_inputs(told: BudgetBatch, num_layers: int) -> dict[str, Array]:
    """The inputs of an ``If`` graph that decides by these budgets."""
    limits = torch.stack([told.limits.units, told.limits.layers, told.limits.heads], dim=1)
    return {
        "budget": told.features.float().numpy(),
        "limits": limits.numpy(),
        "price": told.limits.price.numpy(),
        "allocation": np.full((len(limits), num_layers), -1, dtype=np.int64),
    }


def graph_logits(
    decoder: Decoder, ids: Tensor, mask: Tensor, follow: Array, inputs: dict[str, Array]
) -> tuple[Array, Array | None]:
    """Logits of a graph that is fed the tokens ``follow`` [batch, steps], and what it allocated."""
    tokens, seen = (ids.numpy(), mask.numpy()) if not decoder.in_place else right_padded(ids, mask)
    steps, kept = follow.shape[1], None
    decoder.start(len(tokens), tokens.shape[1] + steps)
    found = []
    for step in range(steps):
        outputs = decoder.step(tokens, seen, **inputs)
        found.append(outputs["logits"][:, 0])
        if "kept_groups" in outputs:
            kept = outputs["kept_groups"]
            inputs = inputs | {"allocation": kept}
        tokens, seen = follow[:, step : step + 1], one_more(seen, in_place=decoder.in_place)
    return np.stack(found, axis=1), kept


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Array, Array]:
    """Left-padded prompts with the padding behind, as the ``ort`` dialect takes them, and their mask."""
    lengths = mask.sum(1)
    rows = torch.zeros(len(ids), int(lengths.max()), dtype=ids.dtype)
    for row, length in enumerate(lengths.tolist()):
        rows[row, :length] = ids[row, ids.shape[1] - length :]
    return rows.numpy(), _ones(lengths.numpy())


def one_more(mask: Array, *, in_place: bool) -> Array:
    """The mask when each row has got one more token: behind its own, or in a new slot for all."""
    return _ones(mask.sum(1) + 1) if in_place else np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)


def _ones(lengths: Array) -> Array:
    """[batch, longest]: that many ones at the start of each row."""
    return (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
