"""The checkpoint, data and models that the SmolLM2 benchmarks start from."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from l2a_compress import Allocation
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.loading import load_base
from l2a_compress.modeling.tags import ensure_tags
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import training_samples
from l2a_compress.training.samples import SampleCollator, Samples

CHECKPOINT = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The command's options."""

    models: Path
    data: Path
    runs: Path
    threads: int
    rounds: int
    batch_size: int
    max_length: int
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setup:
        """From parsed options, which may have more."""
        return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})

    def recipe(self, *overrides: str) -> Recipe:
        """The shipped recipe, on the local checkpoint and data."""
        file = fetch(CHECKPOINT, self.models)
        local = [
            f'model.name="{file.parent}"',
            f'model.gguf_file="{file.name}"',
            f'data.source="{self.data / "gsm8k" / "train.jsonl"}"',
            "data.subset=",  # a file has none
            f"data.max_length={self.max_length}",
            f"optim.threads={self.threads}",
            f"seed={self.seed}",
        ]
        return Recipe.named(CHECKPOINT, [*local, *overrides])

    def base(self, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The checkpoint as training loads it, tags included."""
        file = fetch(CHECKPOINT, self.models)
        model, tokenizer = load_base(str(file.parent), gguf_file=file.name, dtype=dtype)
        ensure_tags(tokenizer, model, add=True)
        return model, tokenizer


def gated_of(model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> GatedModel:
    """Gates and adapters on a copy of the model; adapters that are not zero, as after training."""
    torch.manual_seed(recipe.seed)
    gated = GatedModel.wrap(copy.deepcopy(model), recipe.gates, recipe.adapter)
    gated.think_id = tokenizer.convert_tokens_to_ids("<think>")
    for name, value in gated.adapter_parameters.items():
        if "lora_B" in name:
            value.data.normal_(std=0.002)
    return gated


def peft_of(model: PreTrainedModel, recipe: Recipe) -> Any:
    """The peer: the same adapters on a copy of the model through PEFT alone."""
    torch.manual_seed(recipe.seed)
    return get_peft_model(copy.deepcopy(model), recipe.adapter.to_peft())


def samples_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Samples, SampleCollator]:
    """The samples of a run, and what makes batches of them."""
    return training_samples(recipe, tokenizer), SampleCollator(tokenizer)


def batch_at(samples: Samples, collate: SampleCollator, number: int, size: int) -> dict[str, Tensor]:
    """Batch ``number`` of ``size`` samples; the same one for every variant."""
    start = number * size % len(samples)
    return collate([samples[index] for index in range(start, start + size)])["batch"]


def two_thirds(gated: GatedModel) -> Allocation:
    """Two thirds of the layers (66.7 %), all KV groups: of the gated layers, drops are spread evenly."""
    shape, stem = gated.shape, gated.gate_config.stem_layers
    count, candidates = round(shape.num_layers / 3), range(stem, shape.num_layers)
    dropped = {candidates[int((at + 0.5) * len(candidates) / count)] for at in range(count)}
    return Allocation.of_layers(set(range(shape.num_layers)) - dropped, shape.num_layers, shape.num_groups)


def random_allocations(gated: GatedModel, count: int, seed: int) -> Sequence[Allocation]:
    """Allocations that drop a random third of the layers and, in what stays, a random KV group of every other layer."""
    draw = torch.Generator().manual_seed(seed)
    shape, stem, found = gated.shape, gated.gate_config.stem_layers, []
    for _ in range(count):
        groups = [tuple(range(shape.num_groups))] * shape.num_layers
        order = torch.randperm(shape.num_layers - stem, generator=draw).tolist()
        for place, layer in enumerate(order):
            if place < shape.num_layers // 3:
                groups[stem + layer] = ()
            elif place % 2:
                lost = int(torch.randint(shape.num_groups, (1,), generator=draw))
                groups[stem + layer] = tuple(group for group in range(shape.num_groups) if group != lost)
        found.append(Allocation(num_groups=shape.num_groups, groups=tuple(groups)))
    return found
