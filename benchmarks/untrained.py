"""An artifact of a checkpoint whose gates are not trained, to measure speed and memory: those of trained bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fetch_models import fetch
from stale import made

from l2a_compress.allocation import Allocation
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import build
from l2a_compress.training.store import save_artifact

CHECKPOINT = "smollm2-135m"
LAYERS, GROUPS = 30, 3
_FIRST = 3  # of the layers that are skipped, one after another


def untrained(folder: Path, models: Path, *, heads: bool, checkpoint: str = CHECKPOINT) -> Path:
    """The artifact, made once. Its gates say the same for every prompt, as training by search leaves them."""

    def make() -> None:
        file = fetch(checkpoint, models)
        recipe = Recipe.named(CHECKPOINT, [f'model.name="{file.parent}"', f'model.gguf_file="{file.name}"'])
        recipe = replace(recipe, gates=replace(recipe.gates, heads=heads))
        gated, tokenizer, digest = build(recipe)
        save_artifact(gated, tokenizer, recipe, folder, base_digest=digest, metrics={})

    return made(folder, {"checkpoint": checkpoint, "heads": heads}, make)


def allocation(
    *, skipped: int = 0, narrowed: int = 0, width: int = GROUPS, layers: int = LAYERS, groups: int = GROUPS
) -> Allocation:
    """Without ``skipped`` layers, and with ``width`` groups in the last ``narrowed`` ones."""
    widths = [0 if _FIRST <= at < _FIRST + skipped else groups for at in range(layers)]
    widths[layers - narrowed :] = [width] * narrowed
    return Allocation(num_groups=groups, groups=tuple(tuple(range(width)) for width in widths))
