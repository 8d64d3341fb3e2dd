"""Artifacts on disk: adapters in PEFT's own format, gates, tokenizer, and ``artifact.json`` over all of them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase

from l2a_compress.artifact import ARTIFACT_FILE, SCHEMA_VERSION, ArtifactConfig, describe_files
from l2a_compress.errors import ArtifactError, ConfigError
from l2a_compress.files import atomic_dir
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.families import family_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.modeling.tags import ensure_tags, read_tags
from l2a_compress.training.recipe import Recipe

GATES_FILE = "gates.safetensors"
ADAPTER_FOLDER = "adapter"
TOKENIZER_FOLDER = "tokenizer"
_PACKAGES = ("l2a-compress", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


@dataclass(frozen=True)
class LoadedArtifact:
    """A trained model, ready to run, with all that describes it."""

    gated: GatedModel
    tokenizer: PreTrainedTokenizerBase
    config: ArtifactConfig
    recipe: Recipe


def save_artifact(
    gated: GatedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    *,
    base_digest: str,
    metrics: Mapping[str, Any],
    force: bool = False,
) -> ArtifactConfig:
    """Writes the whole folder under a temporary name and renames it.

    Raises:
        StorageError: the folder exists (and not ``force``, or it is no artifact), or the disk is full or not writable.
    """
    with atomic_dir(folder, force=force, holding=ARTIFACT_FILE) as temporary:
        tensors = {name: value.detach().cpu().contiguous() for name, value in gated.gate_parameters.items()}
        _save_tensors(tensors, temporary / GATES_FILE)
        if gated.adapter_parameters:
            adapter = temporary / ADAPTER_FOLDER
            gated.adapter_config.to_peft().save_pretrained(str(adapter))
            weights = {name: value.detach().cpu().contiguous() for name, value in gated.adapter_parameters.items()}
            _save_tensors(weights, adapter / "adapter_model.safetensors")
        tokenizer.save_pretrained(str(temporary / TOKENIZER_FOLDER))
        config = ArtifactConfig(
            schema_version=SCHEMA_VERSION,
            base={
                "name": recipe.model.name,
                "family": family_of(gated.model.config),
                "digest": base_digest,
                "path": _place(recipe.model.name),
            },
            shape=gated.shape,
            gates=gated.gate_config.to_json(),
            adapter=gated.adapter_config.to_json(),
            prices={"mean": tuple((float(b), float(p)) for b, p in gated.prices)} if gated.prices else {},
            training=recipe.to_json(),
            metrics=dict(metrics),
            seed=recipe.seed,
            versions={name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
            files=describe_files(temporary),
        )
        config.write(temporary)
    return config


def _place(name: str) -> str | None:
    """The absolute path of a base model that is a folder."""
    return str(Path(name).resolve()) if name != "embedded" and Path(name).is_dir() else None


def note_metric(folder: str | Path, name: str, value: Any) -> ArtifactConfig:
    """Puts something that was measured into an artifact's ``metrics``, in the place of what had that name.

    Raises:
        ArtifactError: the folder is not a whole artifact.
        StorageError: the disk is full or the folder is not writable.
    """
    config = ArtifactConfig.load(folder)
    config = replace(config, metrics={**config.metrics, name: value})
    config.write(folder)
    return config


def load_artifact(folder: str | Path, *, base: str | None = None) -> LoadedArtifact:
    """Loads an artifact and its base model.

    Args:
        folder: what training wrote.
        base: the base model's folder or hub name, where it is not at the place the artifact remembers.

    Raises:
        ArtifactError: the folder is not a whole artifact, or the base model is not the one it was trained on.
        ConfigError: the base model cannot be loaded.
    """
    folder = Path(folder)
    config = ArtifactConfig.load(folder)
    recipe = Recipe.from_json(config.training)
    settings, noted = recipe.model, config.base.get("path")
    where = base or settings.name
    if base is None and noted and Path(noted).is_dir():  # a relative name says nothing in another folder
        where = noted
    try:
        model, tokenizer = load_base(
            where, gguf_file=settings.gguf_file, dtype=settings.dtype, attention=settings.attention
        )
    except ConfigError as error:
        raise ConfigError(f"{folder}: its base {error}; say where it is now with --base") from error
    ensure_tags(tokenizer, model, add=settings.add_tags)
    if digest_of(model) != config.base["digest"]:
        raise ArtifactError(f"{folder}: was trained on another base model than {where!r}; give the right one (--base)")
    try:
        gates, adapter = GateConfig.from_json(config.gates), AdapterConfig(**config.adapter)
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"{folder}: gates or adapter settings that this version does not know: {error}") from error
    gated = GatedModel.wrap(model, gates, adapter)
    _fill(gated.gate_parameters, folder / GATES_FILE)
    if gated.adapter_parameters:
        _fill(gated.adapter_parameters, folder / ADAPTER_FOLDER / "adapter_model.safetensors")
    gated.prices = config.prices.get("mean", ())
    gated.think_id = read_tags(tokenizer).think
    gated.eval()
    return LoadedArtifact(gated, tokenizer, config, recipe)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.torch.save(dict(tensors)))  # unlike save_file, a full disk is an OSError here


@torch.no_grad()
def _fill(parameters: Mapping[str, torch.nn.Parameter], path: Path) -> None:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: not a safetensors file ({error}); copy the folder or train it again") from error
    if set(tensors) != set(parameters):
        raise ArtifactError(f"{path}: holds {len(tensors)} tensors of other names than the {len(parameters)} expected")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ArtifactError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])
