"""`l2a compress train` as one function: recipe -> artifact folder.

recipe -> base model + tokenizer -> wrap -> prior from single-drop losses -> Trainer (resumable) -> prices -> artifact
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, set_seed

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ARTIFACT_FILE, ArtifactConfig
from l2a_compress.errors import ArtifactError, ConfigError, StorageError
from l2a_compress.files import locked, write_atomic
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import drop_losses, prior_scores
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.modeling.prices import calibrate_prices, price_grid
from l2a_compress.modeling.tags import ensure_tags
from l2a_compress.training.calibration import calibration_prompts, demand_batches
from l2a_compress.training.checks import check_model, check_recipe, is_searched
from l2a_compress.training.data import load_examples
from l2a_compress.training.data_config import MixtureConfig
from l2a_compress.training.demand import fit_demand
from l2a_compress.training.mixture import Mixture
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.samples import LengthGrouped, SampleCollator, Samples, in_batches, whole_samples
from l2a_compress.training.search import search
from l2a_compress.training.step import TrainingStep
from l2a_compress.training.store import save_artifact
from l2a_compress.training.trainer import L2ATrainer, last_checkpoint, training_arguments

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.json"
LOG_FILE = "training_log.jsonl"
SEARCH_FILE = "search.json"  # what was tried, once the exploration is over
_SEARCH_ROWS = 64  # training examples that a static method is chosen on
_MENDABLE = ("optim.threads", "optim.save_steps", "optim.log_steps")
_MOST_TOLD = 3  # settings that a message names


def train(
    recipe: Recipe,
    out: Path,
    *,
    trackers: Sequence[str] = (),
    resume: bool = True,
    force: bool = False,
    quiet: bool = False,
    check: Callable[[GatedModel, PreTrainedTokenizerBase], object] | None = None,
) -> Path:
    """Trains gates and adapters and writes the artifact to ``out / "artifact"``.

    Checkpoints stand in ``out / "checkpoints"``; a run that was cut off goes on from the last one when it is started
    again with the same recipe.

    Args:
        recipe: all settings.
        out: the run's folder.
        trackers: names of the Trainer's trackers (tensorboard, wandb, ...).
        resume: go on from the last checkpoint; else start again.
        force: throw away the checkpoints of a run with other settings, where the folder holds one.
        quiet: no progress bar.
        check: told the untrained model and its tokenizer before anything else is done with them, to raise what is wrong
            with them for what follows the training.

    Raises:
        ConfigError: the folder holds a run with other settings, or these do not go together.
        DataError: the data cannot be read, or one of its splits is empty.
        TrainingError: the loss is not finite, or a checkpoint cannot be read.
        StorageError: the disk is full or not writable, or another process trains in the folder.
    """
    state = _processes()
    check_recipe(recipe, trackers, state.num_processes)
    with locked(out) if state.is_main_process else nullcontext():
        return _train(recipe, out, state, trackers=trackers, resume=resume, force=force, quiet=quiet, check=check)


def _train(
    recipe: Recipe,
    out: Path,
    state: PartialState,
    *,
    trackers: Sequence[str],
    resume: bool,
    force: bool,
    quiet: bool,
    check: Callable[[GatedModel, PreTrainedTokenizerBase], object] | None,
) -> Path:
    if recipe.optim.threads:
        torch.set_num_threads(recipe.optim.threads)
    checkpoints = _prepare(recipe, out, resume=resume, force=force, main=state.is_main_process)
    state.wait_for_everyone()
    gated, tokenizer, digest = build(recipe)
    check_model(recipe, gated)
    if check is not None:
        check(gated, tokenizer)
    samples = training_samples(recipe, tokenizer)
    collate = SampleCollator(tokenizer)
    gated.to(state.device)
    if not recipe.static.method:
        # Read now, so that what is wrong with it does not show when training is over.
        device = gated.model.device
        calibration = calibration_prompts(recipe, tokenizer, recipe.evaluation.calibration, device=device)
        fitted = bool(recipe.evaluation.demand_rows) and gated.gate_config.has_demand
        demand = demand_batches(recipe, tokenizer, device=device) if fitted else []
    if recipe.optim.teacher == "cached":
        from l2a_compress.training.teacher import TeacherCache

        samples.teacher = TeacherCache.build(gated, samples, collate, recipe.optim, out / "teacher")
    start, fixed = last_checkpoint(checkpoints), None
    if recipe.static.method:
        fixed = _fix(recipe, gated, samples, collate)
    elif start is None:
        _set_prior(gated, samples, collate, recipe.optim.prior_rows)
    main = state.is_main_process

    def explored() -> None:
        search(gated, samples, collate, recipe, file=out / SEARCH_FILE, main=main, quiet=quiet or not main)

    if is_searched(recipe):
        gated.allocator.layer_gates.requires_grad_(False)
        gated.allocator.head_gates.requires_grad_(False)
    arguments = training_arguments(
        recipe.optim,
        folder=checkpoints,
        seed=recipe.seed,
        trackers=list(trackers),
        world_size=state.num_processes,
        quiet=quiet,
    )
    trainer = L2ATrainer(
        annealing=dataclasses.replace(recipe.annealing, noise_start=0.0, noise_end=0.0) if fixed else recipe.annealing,
        optim=recipe.optim,
        explored=explored if is_searched(recipe) else None,
        model=TrainingStep(gated, recipe.objective, seed=recipe.seed),
        args=arguments,
        train_dataset=LengthGrouped(samples, batch_size=recipe.optim.batch_size),
        data_collator=collate,
    )
    began = time.time()
    trainer.train(resume_from_checkpoint=start)
    if samples.unfit:
        log.warning(
            "%d examples were too long, had a tag in their text, or were refused by the chat template, and were "
            "replaced by others of their source",
            samples.unfit,
        )
    if not main:
        return out / "artifact"
    _write_log(trainer, out / LOG_FILE)
    if fixed is None:
        if demand:
            fit_demand(gated, demand, seed=recipe.seed)
        gated.prices = calibrate_prices(gated, calibration, price_grid(gated))
    trainer.accelerator.free_memory()  # it knows the model, which knows it: else both stay
    metrics: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "from_step": int(start.rpartition("-")[2]) if start else 0,
        "seconds": round(time.time() - began, 1),  # since that step
        "last": next((row for row in reversed(trainer.state.log_history) if "loss" in row), {}),
    }
    if is_searched(recipe) and (out / SEARCH_FILE).is_file():
        noted = json.loads((out / SEARCH_FILE).read_text())
        metrics["search"] = {name: noted[name] for name in ("order", "trials")}
    if fixed is not None:
        metrics["static"] = {"allocation": fixed[0].to_json(), "budget": fixed[1]}
    return _saved(gated, tokenizer, recipe, out / "artifact", digest, metrics)


def _fix(recipe: Recipe, gated: GatedModel, samples: Samples, collate: SampleCollator) -> tuple[Allocation, float]:
    """Fixes the gates to what a static method keeps, and the samples to what that costs: (allocation, budget).

    Such a model is only ever asked for what it is, and explores nothing.
    """
    allocation = static_allocation(recipe, gated, samples, collate)
    gated.allocator.fix(allocation)
    budget = math.ceil(1e4 * gated.cost.fraction(allocation)) / 1e4
    samples.draws = dataclasses.replace(
        samples.draws, minimum=budget, minimum_share=1.0, dense_share=0.0, contract="cap"
    )
    return allocation, budget


def _saved(
    gated: GatedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    digest: str,
    metrics: dict[str, Any],
) -> Path:
    """Writes the artifact. What was measured of the one before stays where it is the same model."""
    before = _before(folder)
    made = save_artifact(gated, tokenizer, recipe, folder, base_digest=digest, metrics=metrics, force=True)
    if before is not None and before.digest == made.digest:
        dataclasses.replace(made, metrics=made.metrics | before.metrics).write(folder)
    return folder


def _before(artifact: Path) -> ArtifactConfig | None:
    """The artifact that is replaced, where it is a whole one."""
    try:
        return ArtifactConfig.load(artifact)
    except ArtifactError:
        return None


def build(recipe: Recipe) -> tuple[GatedModel, PreTrainedTokenizerBase, str]:
    """The wrapped model, its tokenizer, and the digest of the base weights (with added tags, where asked)."""
    settings = recipe.model
    set_seed(recipe.seed)
    model, tokenizer = load_base(
        settings.name, gguf_file=settings.gguf_file, dtype=settings.dtype, attention=settings.attention
    )
    tags = ensure_tags(tokenizer, model, add=settings.add_tags)
    digest = digest_of(model)
    gates = recipe.gates
    if "heads" in recipe.objective.without:
        gates = dataclasses.replace(gates, heads=False)
    gated = GatedModel.wrap(model, gates, recipe.adapter)
    gated.think_id = tags.think
    return gated, tokenizer, digest


def training_samples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """All samples of the run, in order."""
    mixture = MixtureConfig(sources=recipe.data.sources)
    draws = recipe.draws
    if not recipe.objective.weight("kl"):  # noised samples would have no loss at all
        draws = dataclasses.replace(draws, noised_share=0.0)
    count = recipe.optim.steps * recipe.optim.batch_size
    examples = load_examples(mixture, "train", recipe.seed, length=count)
    assert isinstance(examples, Mixture)  # of one source, too: it is shuffled
    return Samples(
        examples,
        tokenizer,
        draws,
        count=count,
        seed=recipe.seed,
        max_length=lambda place: mixture.sources[examples.part_of(place)].max_length,
        think_reference=recipe.gates.think_reference,
    )


def static_allocation(recipe: Recipe, gated: GatedModel, samples: Samples, collate: SampleCollator) -> Allocation:
    """What a static method keeps of the model, chosen on training examples."""
    from l2a_compress.evaluation.baselines import BASELINES, Context

    chooser = gated
    if recipe.static.artifact:
        from l2a_compress.training.store import load_artifact

        chooser = load_artifact(recipe.static.artifact).gated.to(gated.model.device)
    batches = in_batches(whole_samples(samples, _SEARCH_ROWS), collate, device=gated.model.device)
    chosen = BASELINES[recipe.static.method](Context(chooser, lambda: batches), recipe.static.compute)
    (allocation,) = broadcast_object_list([chosen])  # all processes train the main one's choice
    assert isinstance(allocation, Allocation)
    return allocation


def _set_prior(gated: GatedModel, samples: Samples, collate: SampleCollator, rows: int) -> None:
    """Starts the gates from what dropping each layer and group alone does to the frozen model."""
    batches = in_batches(whole_samples(samples, rows), collate, device=gated.model.device)
    gated.eval()
    with gated.teacher():  # adapters still do nothing: leaving them out is the same and faster
        gated.allocator.set_prior(*prior_scores(*drop_losses(gated, batches), gated.cost))
    gated.train()


def _prepare(recipe: Recipe, out: Path, *, resume: bool, force: bool, main: bool) -> Path:
    """The checkpoints' folder, after making sure that it belongs to this recipe."""
    import shutil

    checkpoints, noted, artifact = out / CHECKPOINTS, out / RECIPE_FILE, out / "artifact"
    if not main:
        return checkpoints
    for folder, known in ((checkpoints, noted), (artifact, artifact / ARTIFACT_FILE)):
        taken = os.path.lexists(folder) and (not folder.is_dir() or folder.is_symlink() or any(folder.iterdir()))
        if taken and not known.is_file():
            raise StorageError(f"{folder}: is of something else than a run, and is not replaced; choose another --out")
    others = _others(noted.read_text(), recipe) if noted.is_file() else []
    if others and not force:
        told = "; ".join(others[:_MOST_TOLD]) + ("; ..." if len(others) > _MOST_TOLD else "")
        raise ConfigError(
            f"{out}: holds a run with other settings ({told}); choose another --out, or --force to replace it"
        )
    if others or not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / SEARCH_FILE).unlink(missing_ok=True)
    write_atomic(noted, json.dumps(recipe.to_json(), indent=2, sort_keys=True) + "\n")
    return checkpoints


def _others(noted: str, recipe: Recipe) -> list[str]:
    """In what a noted recipe would train another model."""
    try:
        old = _settings(Recipe.from_json(json.loads(noted)))
    except (ValueError, AttributeError, ConfigError) as error:
        return [f"the noted recipe cannot be read: {error}"]
    new = _settings(recipe)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """By dotted name, without what may change in the middle of a run or behind it."""
    found: dict[str, Any] = {}
    for section, value in recipe.to_json().items():
        if section != "evaluation":
            parts = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"{section}.{key}".removesuffix("."): one for key, one in parts}
    return {name: value for name, value in found.items() if name not in _MENDABLE}


def _write_log(trainer: L2ATrainer, path: Path) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in trainer.state.log_history))


def is_main_process() -> bool:
    """Whether this process writes files and talks to the user (the first one of a launch)."""
    return bool(_processes().is_main_process)


def _processes() -> PartialState:
    """All processes of a launch; on a CPU they do not see each other unless told so."""
    return PartialState(cpu=not torch.cuda.is_available())
