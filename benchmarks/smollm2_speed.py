"""SmolLM2-135M: decode speed with skipped layers, exactness of skipping, training speed and memory against PEFT."""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, ratio, shown, verdict
from smollm2_setup import (
    Setup,
    batch_at,
    gated_of,
    peft_of,
    random_allocations,
    samples_of,
    two_thirds,
)
from torch import Tensor, nn
from transformers import DynamicCache

from l2a_compress._machine import peak_bytes
from l2a_compress._precision import use_bfloat16
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.physical import specialized
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.step import TrainingStep
from l2a_compress.training.teacher import TeacherCache

PROMPT, TOKENS = 64, 24  # tokens before, and tokens timed in each round
MEMORY_MODES = ("peft", "online", "cached")


@torch.no_grad()
def decode(setup: Setup) -> dict[str, Any]:
    """Greedy decoding of one sequence: two thirds of the layers against the plain Transformers model, dense."""
    section: dict[str, Any] = {"bars": {"ratio": 0.75}, "prompt_tokens": PROMPT, "timed_tokens": TOKENS}
    for dtype in ("float32", "bfloat16") if use_bfloat16("auto") else ("float32",):
        model, tokenizer = setup.base(dtype)
        gated = gated_of(model, setup.recipe(), tokenizer).eval()
        prompt = torch.randint(100, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(setup.seed))
        allocation = two_thirds(gated)

        def dense(_: int, model: Any = model, prompt: Tensor = prompt) -> None:
            _greedy(lambda ids, cache, _: model(ids, past_key_values=cache).logits, prompt)

        def kept(_: int, gated: GatedModel = gated, prompt: Tensor = prompt) -> None:
            _greedy(lambda ids, cache, at: gated.logits(gated(ids, cache=cache, position_ids=at).hidden), prompt)

        with specialized(gated, allocation):
            found = interleaved({"dense": dense, "two_thirds": kept}, setup.rounds)
        section[dtype] = _compared(found, "two_thirds", "dense") | {
            "layers": len(allocation.layers) / allocation.num_layers,
            "cost": gated.cost.fraction(allocation),
            "dense_ms_per_token": round(1000 * statistics.median(found["dense"]["cpu"]) / (TOKENS + 1), 2),
        }
        verdict(
            f"decode {dtype}: {shown(section[dtype]['cpu'])} of dense",
            section[dtype]["cpu"]["median"],
            0.75,
            at_most=True,
        )
    return section


def _greedy(step: Callable[[Tensor, DynamicCache, Tensor], Tensor], prompt: Tensor) -> None:
    """Prefill, then ``TOKENS`` single steps."""
    cache, ids, start = DynamicCache(), prompt, 0
    for _ in range(TOKENS + 1):
        positions = torch.arange(start, start + ids.shape[1])[None]
        start += ids.shape[1]
        ids = step(ids, cache, positions)[:, -1].argmax(-1, keepdim=True)


def _compared(found: Mapping[str, Mapping[str, list[float]]], above: str, below: str) -> dict[str, Any]:
    """Ratio of process CPU times (what a busy machine disturbs least) and of wall-clock times."""
    return {clock: ratio(found[above][clock], found[below][clock]) for clock in ("cpu", "wall")}


@torch.no_grad()
def logits(setup: Setup) -> dict[str, Any]:
    """Largest difference of fp32 logits: masked execution against skipping, and against sliced weights."""
    model, tokenizer = setup.base("float32")
    recipe = setup.recipe()
    gated = gated_of(model, recipe, tokenizer).eval()
    samples, collate = samples_of(recipe, tokenizer)
    batch = batch_at(samples, collate, 0, 2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real, worst = mask.bool(), {"skipped": 0.0, "sliced": 0.0, "scale": 0.0}
    for allocation in [two_thirds(gated), *random_allocations(gated, 3, setup.seed)]:
        with gated.forced([allocation], skip=False):
            masked = gated.logits(gated(ids, mask).hidden[real])
        with gated.forced([allocation]):
            skipped = gated.logits(gated(ids, mask).hidden[real])
        with specialized(gated, allocation):
            sliced = gated.logits(gated(ids, mask).hidden[real])
        worst["skipped"] = max(worst["skipped"], float((masked - skipped).abs().max()))
        worst["sliced"] = max(worst["sliced"], float((masked - sliced).abs().max()))
        worst["scale"] = max(worst["scale"], float(masked.abs().max()))
    verdict(f"masked - skipped logits: {worst['skipped']:.2e}", worst["skipped"], 1e-5, at_most=True)
    print(f"masked - sliced and merged: {worst['sliced']:.2e} of logits up to {worst['scale']:.1f} (rounding of sums)")
    return {"bars": {"skipped": 1e-5}, "largest_difference": worst, "allocations": 4, "positions": int(real.sum())}


class Trainee:
    """One way of training, with its own optimizer; ``cached`` needs ``prepare`` first."""

    def __init__(self, mode: str, setup: Setup, recipe: Recipe, model: nn.Module, tokenizer: Any) -> None:
        self.mode, self.setup, self.bf16 = mode, setup, recipe.optim.bf16
        self.samples, self.collate = samples_of(recipe, tokenizer)
        self.step: Any = None
        if mode == "peft":
            self.model: Any = peft_of(model, recipe)  # type: ignore[arg-type]
        else:
            gated = gated_of(model, recipe, tokenizer)  # type: ignore[arg-type]
            self.step = self.model = TrainingStep(gated, recipe.objective, seed=recipe.seed)
            self.step.noise = recipe.annealing.noise_start
        self.model.train()
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def prepare(self, recipe: Recipe, folder: Path) -> None:
        """Computes the cached teacher of all samples."""
        cache = TeacherCache.build(self.step.gated, self.samples, self.collate, recipe.optim, folder)
        self.samples.teacher = cache

    def __call__(self, number: int) -> None:
        """One whole step: batch, forward, backward, clipping, AdamW."""
        batch = batch_at(self.samples, self.collate, number, self.setup.batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self._peft_loss(batch) if self.mode == "peft" else self.step(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _peft_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss: Tensor = self.model(**inputs).loss
        return loss


def training(setup: Setup) -> dict[str, Any]:
    """Whole training steps on the same batches: ours with either teacher against PEFT's LoRA through Transformers."""
    recipe = _training_recipe(setup, setup.rounds + 1)
    model, tokenizer = setup.base(recipe.model.dtype)
    trainees = {mode: Trainee(mode, setup, recipe, model, tokenizer) for mode in MEMORY_MODES}
    with tempfile.TemporaryDirectory() as folder:
        trainees["cached"].prepare(recipe, Path(folder))
        found = interleaved(trainees, setup.rounds)
    section: dict[str, Any] = {"bars": {"online": 0.65, "cached": 0.9}, "bf16": recipe.optim.bf16}
    section["peft_seconds"] = found["peft"]["cpu"]
    for mode in ("online", "cached"):
        section[mode] = _compared(found, "peft", mode)
        text = f"training speed, teacher {mode}: {shown(section[mode]['cpu'])} of PEFT LoRA"
        verdict(text, section[mode]["cpu"]["median"], section["bars"][mode], at_most=False)
    return section


def _training_recipe(setup: Setup, batches: int) -> Recipe:
    return setup.recipe(f"optim.steps={batches}", f"optim.batch_size={setup.batch_size}", 'optim.teacher="cached"')


def memory(setup: Setup) -> dict[str, Any]:
    """Peak resident memory of a few training steps, each way in a process of its own."""
    peaks = {mode: _peak_of(setup, mode) for mode in MEMORY_MODES}
    section: dict[str, Any] = {"bars": {"online": 1.2, "cached": 1.2}, "peak_mb": peaks}
    for mode in ("online", "cached"):
        section[mode] = round(peaks[mode] / peaks["peft"], 4)
        text = f"peak memory, teacher {mode}: {section[mode]:.3f} of PEFT LoRA ({peaks[mode]:.0f} MB)"
        verdict(text, section[mode], 1.2, at_most=True)
    return section


def _peak_of(setup: Setup, mode: str) -> float:
    """Megabytes, from a fresh process that runs this file."""
    values = [f"{name}={getattr(setup, name)}" for name in setup.__dataclass_fields__]
    done = subprocess.run([sys.executable, __file__, mode, *values], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def _measure_peak(mode: str, values: list[str]) -> None:
    fields = dict(value.split("=", 1) for value in values)
    paths = {name: Path(fields.pop(name)) for name in ("models", "data", "runs")}
    setup = Setup(**paths, **{name: int(value) for name, value in fields.items()})  # type: ignore[arg-type]
    torch.set_num_threads(setup.threads)
    recipe = _training_recipe(setup, 3)
    model, tokenizer = setup.base(recipe.model.dtype)
    trainee = Trainee(mode, setup, recipe, model, tokenizer)
    del model
    gc.collect()
    _forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        if mode == "cached":
            trainee.prepare(recipe, Path(folder))
        for number in range(3):
            trainee(number)
    print(_peak_mb())


def _forget_peak() -> None:
    """Loading has a peak of its own, the same for all; where the system cannot forget it, it counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    peak = peak_bytes()
    if peak is not None:
        return peak / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


if __name__ == "__main__":
    _measure_peak(sys.argv[1], sys.argv[2:])
