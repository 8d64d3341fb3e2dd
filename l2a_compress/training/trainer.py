"""L2ATrainer: the Hugging Face Trainer with our step, our schedules, and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from l2a_compress.artifact import describe_files
from l2a_compress.errors import StorageError, TrainingError
from l2a_compress.files import fsync, fsync_tree
from l2a_compress.training.draws import Annealing
from l2a_compress.training.recipe import BETAS, OptimConfig
from l2a_compress.training.samples import LengthGrouped
from l2a_compress.training.step import TrainingStep

log = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
WEIGHTS = "model.safetensors"  # the name the Trainer looks for
_PARTIAL = ".partial"


class L2ATrainer(Trainer):
    """Trains a :class:`TrainingStep`. Only adapters and gates are optimized and saved.

    Args:
        annealing: temperature and noise over the run.
        optim: learning rates (the Trainer's own ``learning_rate`` is not looked at).
        explored: called once, behind the last step of the exploration.
        **kwargs: of the Trainer.
    """

    def __init__(
        self, *, annealing: Annealing, optim: OptimConfig, explored: Callable[[], None] | None = None, **kwargs: Any
    ) -> None:
        self.annealing, self.optim = annealing, optim
        super().__init__(**kwargs)
        if explored is not None:
            self.add_callback(_Explored(max(1, round(annealing.explore * self.args.max_steps)), explored))
        self._terms: dict[str, Tensor] = {}
        self._term_count = 0
        self._saving = False

    @property
    def _step(self) -> TrainingStep:
        return cast(TrainingStep, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one rate for the adapters and one for the gates; decay as the shared schedule scales both."""
        if self.optimizer is None:
            step = self._step
            gates = [value for value in step.gated.gate_parameters.values() if value.requires_grad]
            adapters = [value for value in step.gated.adapter_parameters.values() if value.requires_grad]
            groups = [{"params": gates, "lr": self.optim.gate_lr}]
            if adapters:
                groups.append({"params": adapters, "lr": self.optim.lr})
            self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=self.args.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, constant, linear decay over the last share of the steps."""
        if self.lr_scheduler is None:
            warmup = max(1, round(self.optim.warmup * num_training_steps))
            decay = max(1, round(self.optim.decay * num_training_steps))

            def rate(step: int) -> float:
                return max(0.0, min((step + 1) / warmup, 1.0, (num_training_steps - step) / decay))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or cast(torch.optim.Optimizer, self.optimizer), rate
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        """In order: the samples are drawn at random and grouped by length already."""
        return torch.utils.data.SequentialSampler(cast(LengthGrouped, train_dataset or self.train_dataset))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """The step's loss; every term is kept for the log."""
        step: TrainingStep = self.accelerator.unwrap_model(model)
        progress = self.state.global_step / max(1, self.state.max_steps)
        step.temperature, step.noise = self.annealing.temperature(progress), self.annealing.noise(progress)
        step.gather = self.accelerator.gather
        terms: dict[str, Tensor] = model(**inputs)
        for name, value in terms.items():
            if name != "loss":
                self._terms[name] = self._terms.get(name, torch.zeros_like(value.detach())) + value.detach()
        self._term_count += 1
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term since the last line, over all processes."""
        if "loss" in logs and self._term_count:
            for name, total in self._terms.items():
                mean = self.accelerator.reduce(total / self._term_count, reduction="mean")
                logs[name] = round(float(mean), 5)
            progress = self.state.global_step / max(1, self.state.max_steps)
            logs["temperature"] = round(self.annealing.temperature(progress), 4)
            logs["noise"] = round(self.annealing.noise(progress), 4)
            self._terms, self._term_count = {}, 0
        super().log(logs, start_time)

    def train(  # type: ignore[override]  # its other parameters are deprecated or for searches
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As the Trainer's own method, after making sure that the checkpoint is what was written.

        Raises:
            TrainingError: a file of the checkpoint is missing or damaged.
        """
        if isinstance(resume_from_checkpoint, str):
            verify_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes into a hidden folder and renames it when it is complete and on disk."""
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial, final = folder / _PARTIAL, folder / name
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files = json.dumps(describe_files(partial / name), indent=2)
                (partial / name / CHECKSUMS).write_text(files)
                fsync_tree(partial / name)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial / name, final)
                fsync(folder)
                shutil.rmtree(partial, ignore_errors=True)
                _remove_old(folder, keep=self.args.save_total_limit or 2)
        except (
            OSError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:  # the latter two from torch.save, save_file
            shutil.rmtree(partial, ignore_errors=True)
            what = str(error).strip().partition("\n")[0]
            raise StorageError(f"{final}: cannot save the checkpoint: {what}; free space and resume") from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        target = Path(output_dir or self.args.output_dir or ".")
        target.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained_tensors(self._step), target / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        try:
            load_trained_tensors(self._step, safetensors.torch.load_file(path))
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise TrainingError(f"{path}: cannot resume from it: {error}; delete that checkpoint folder") from error


class _Explored(TrainerCallback):
    """Calls a function behind one step, before a checkpoint of that step is written."""

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As of every callback."""
        if state.global_step == self.step:
            self.call()


def trained_tensors(step: TrainingStep) -> dict[str, Tensor]:
    """Adapters and gates by name, contiguous on the CPU."""
    parts = {**step.gated.adapter_parameters, **step.gated.gate_parameters}
    return {name: value.detach().cpu().contiguous() for name, value in parts.items()}


@torch.no_grad()
def load_trained_tensors(step: TrainingStep, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`trained_tensors`.

    Raises:
        ValueError: the names or shapes are not those of this model.
    """
    parts = {**step.gated.adapter_parameters, **step.gated.gate_parameters}
    if set(parts) != set(tensors):
        raise ValueError(f"{len(set(parts) ^ set(tensors))} tensors differ from those of this model")
    for name, parameter in parts.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the checksums written beside them.

    Raises:
        TrainingError: a file is missing or damaged; the message names it.
    """
    then = "delete that checkpoint folder: the run goes on from the one before, or from the start"
    try:
        noted = json.loads((folder / CHECKSUMS).read_bytes())
        found = describe_files(folder)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / CHECKSUMS}: cannot resume from it: {error}; {then}") from error
    for name, entry in noted.items():
        if found.get(name) != entry:
            state = "damaged" if name in found else "missing"
            raise TrainingError(f"{folder / name}: cannot resume from it: the file is {state}; {then}")


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a run's folder, None where there is none."""
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found


def _remove_old(folder: Path, keep: int) -> None:
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def training_arguments(
    optim: OptimConfig, *, folder: Path, seed: int, trackers: list[str], world_size: int, quiet: bool
) -> TrainingArguments:
    """The Trainer's arguments for a recipe; the global batch is split over ``world_size`` processes."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=optim.steps,
        per_device_train_batch_size=optim.batch_size // (optim.accumulate * world_size),
        gradient_accumulation_steps=optim.accumulate,
        max_grad_norm=optim.clip,
        weight_decay=0.0,
        bf16=optim.bf16,
        activation_checkpointing=optim.gradient_checkpointing,
        logging_steps=optim.log_steps,
        save_steps=optim.save_steps,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        report_to=trackers or "none",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=quiet,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    _use_one_gpu(arguments)
    return arguments


def _use_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps a process that sees several GPUs to the first: ``nn.DataParallel`` would copy a step with all its state."""
    if arguments.n_gpu > 1:
        log.warning(
            "%d GPUs are visible and this process uses the first of them; to use them all start it with "
            "accelerate launch --multi_gpu --num_processes %d -m l2a_compress compress train ...",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
