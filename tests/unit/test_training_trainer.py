"""Training runs: rates, schedules, resuming bit by bit, and checkpoints that are whole or absent."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import resource
import shutil
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import TrainingArguments

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.errors import ConfigError, DataError, StorageError, TrainingError
from l2a_compress.modeling.search import given_up, greedy_path, path_scores
from l2a_compress.training.mixture import Mixture
from l2a_compress.training.objective import ObjectiveConfig
from l2a_compress.training.recipe import OptimConfig, Recipe
from l2a_compress.training.run import SEARCH_FILE, build, train, training_samples
from l2a_compress.training.search import Trials
from l2a_compress.training.step import TrainingStep
from l2a_compress.training.store import load_artifact, note_metric
from l2a_compress.training.trainer import (
    L2ATrainer,
    last_checkpoint,
    load_trained_tensors,
    trained_tensors,
    training_arguments,
    verify_checkpoint,
)
from toy_models import LAYERS, new_gated, save_base, tiny_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def recipe(base: Path) -> Recipe:
    """Six steps with checkpoints at 3 and 6, with dropout, so that the generators' state matters."""
    return tiny_recipe(base, adapter={"dropout": 0.2}, draws={"switch_share": 0.3})


@pytest.fixture(scope="module")
def straight(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(recipe, out, quiet=True)
    return out


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines with a loss, without how long they took."""
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def copy_until(run: Path, step: int, to: Path) -> Path:
    """A run's folder as it was when it was cut off after that step's checkpoint."""
    to.mkdir()
    shutil.copy(run / "recipe.json", to)
    shutil.copytree(run / "checkpoints" / f"checkpoint-{step}", to / "checkpoints" / f"checkpoint-{step}")
    return to


def test_a_run_leaves_artifact_log_and_two_checkpoints(straight: Path) -> None:
    assert {path.name for path in straight.iterdir()} == {
        "artifact",
        "checkpoints",
        "recipe.json",
        "training_log.jsonl",
    }
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6"}
    rows = log_of(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"ce", "kl", "budget", "tokens", "transition", "cost", "layer_sparsity", "temperature", "noise"} <= {
        *rows[0]
    }
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_resumed_run_continues_bit_by_bit(recipe: Recipe, straight: Path, tmp_path: Path) -> None:
    out = copy_until(straight, 3, tmp_path / "run")
    train(recipe, out, quiet=True)
    for name in ("gates.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / "artifact" / name).read_bytes() == (straight / "artifact" / name).read_bytes()
    assert log_of(out) == log_of(straight)
    first, second = (json.loads((run / "artifact" / "artifact.json").read_text()) for run in (out, straight))
    assert first["prices"] == second["prices"]
    before = safetensors.torch.load_file(straight / "checkpoints" / "checkpoint-3" / "model.safetensors")
    after = safetensors.torch.load_file(straight / "checkpoints" / "checkpoint-6" / "model.safetensors")
    numbers = [name for name, value in before.items() if value.is_floating_point()]  # not the order of the groups
    assert all(not torch.equal(before[name], after[name]) for name in numbers)  # everything was trained in between


# Behind step 3, whose checkpoint is gone on from, and behind step 5.
@pytest.mark.parametrize(("explore", "trials"), [(0.5, 0), (0.8, 3)])
def test_what_goes_is_searched_once_behind_the_exploration(
    base: Path, tmp_path: Path, explore: float, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"explore": explore, "settle": explore, "search_rows": 4, "search_trials": trials, "trial_steps": 2}
    searched = tiny_recipe(base, adapter={"dropout": 0.2}, annealing=plan)
    paths = []

    def search(*args: Any, **more: Any) -> list[Allocation]:
        paths.append(greedy_path(*args, **more))
        return paths[-1]

    monkeypatch.setattr("l2a_compress.training.search.greedy_path", search)
    whole = tmp_path / "whole"
    train(searched, whole, quiet=True)
    guess, path = paths if trials else paths * 2
    assert len(paths) == (2 if trials else 1)
    assert sorted(given_up(path)) == sorted(given_up(guess)) == list(range(1, LAYERS))
    metrics = json.loads((whole / "artifact" / "artifact.json").read_text())["metrics"]
    assert metrics["search"]["order"] == given_up(path)
    assert len(metrics["search"]["trials"]) >= trials
    assert all(math.isfinite(loss) for _, loss in metrics["search"]["trials"])
    gates = safetensors.torch.load_file(whole / "artifact" / "gates.safetensors")
    groups = path_scores(path, searched.gates.stem_layers)
    assert torch.equal(gates["allocator.layer_gates.outer_bias"][:, 0], groups.amax(1))
    assert torch.equal(gates["allocator.head_gates.outer_bias"], groups.sort(descending=True, stable=True).values)
    for kind in ("layer", "head"):  # the order is the same for all inputs and budgets
        assert not gates[f"allocator.{kind}_gates.outer"].any()
    found = [guess, path] if trials else [path]
    noted = copy_until(whole, 3, tmp_path / "noted")
    shutil.copy(whole / SEARCH_FILE, noted)
    train(searched, noted, quiet=True)
    assert paths == found  # what a search that came to its end has noted is not searched again
    rest = copy_until(whole, 3, tmp_path / "rest")
    train(searched, rest, quiet=True)
    assert paths == found * (1 if explore == 0.5 else 2)
    for run in (noted, rest):
        assert (run / "artifact" / "gates.safetensors").read_bytes() == (
            whole / "artifact" / "gates.safetensors"
        ).read_bytes()


def test_a_search_that_was_cut_off_tries_nothing_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 4, "search_trials": 2, "trial_steps": 1}
    recipe = tiny_recipe(base, annealing=plan, adapter={"dropout": 0.2}, optim={"steps": 2, "save_steps": 1})
    tried: list[tuple[int, ...]] = []
    trial, cut = Trials.trial, [3]

    def counted(self: Trials, allocation: Allocation) -> list[float]:
        if len(tried) == cut[0]:
            raise KeyboardInterrupt
        tried.append(tuple(layer for layer, groups in enumerate(allocation.groups) if not groups))
        return trial(self, allocation)

    monkeypatch.setattr(Trials, "trial", counted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", quiet=True)
    cut[0] = -1
    found = train(recipe, tmp_path / "cut", quiet=True)
    noted = json.loads((found / "artifact.json").read_text())["metrics"]["search"]["trials"]
    assert [tuple(gone) for gone, _ in noted] == tried
    assert len(set(tried)) == len(tried) > 3
    monkeypatch.undo()
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert (found / "gates.safetensors").read_bytes() == (whole / "gates.safetensors").read_bytes()
    again = dataclasses.replace(recipe, seed=recipe.seed + 1)
    train(again, tmp_path / "cut", force=True, quiet=True)
    assert json.loads((tmp_path / "cut" / SEARCH_FILE).read_text())["trials"] != noted


@pytest.mark.parametrize(
    "notes", ["{", '{"trials": [], "scores": [[1.0], [1.0, 2.0]]}', '{"trials": [], "scores": [[1.0]]}']
)
def test_a_search_whose_notes_are_damaged_is_one_error(base: Path, tmp_path: Path, notes: str) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 4, "search_trials": 1, "trial_steps": 1}
    recipe = tiny_recipe(base, annealing=plan, optim={"steps": 2, "save_steps": 1})
    tmp_path.joinpath(SEARCH_FILE).write_text(notes)
    with pytest.raises(TrainingError, match=r"search.json: not what a search notes .*; remove it"):
        train(recipe, tmp_path, quiet=True)


def test_a_searched_order_without_a_demand_head_knows_no_prices(base: Path, tmp_path: Path) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 4}
    changes: dict[str, Any] = {"annealing": plan, "gates": {"demand": False}, "optim": {"steps": 2, "save_steps": 2}}
    with pytest.raises(ConfigError, match=r"draws.contract = 'both'.*set draws.contract=cap"):
        train(tiny_recipe(base, **changes), tmp_path, quiet=True)
    train(tiny_recipe(base, draws={"contract": "cap"}, **changes), tmp_path, quiet=True)


def test_trials_without_adapters_are_refused_at_the_start(base: Path, tmp_path: Path) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 4, "search_trials": 1, "trial_steps": 1}
    changes: dict[str, Any] = {"adapter": {"rank": 0}, "optim": {"steps": 2, "save_steps": 2}}
    with pytest.raises(ConfigError, match=r"search_trials = 1: .*adapter.rank = 0 has none; set annealing.search_tri"):
        train(tiny_recipe(base, annealing=plan, **changes), tmp_path, quiet=True)
    train(tiny_recipe(base, annealing=plan | {"search_trials": 0}, **changes), tmp_path, quiet=True)


def test_a_base_in_float16_is_refused_where_layers_compute_in_it(base: Path, tmp_path: Path) -> None:
    half = {"model": {"dtype": "float16"}}
    with pytest.raises(ConfigError, match=r"model.dtype = 'float16': .*set model.dtype=bfloat16 or float32"):
        train(tiny_recipe(base, **half), tmp_path, quiet=True)
    train(tiny_recipe(base, **half, optim={"precision": "bf16", "steps": 1}), tmp_path, quiet=True)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path))


def test_a_switch_of_budgets_that_inline_gates_do_not_have_is_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"gates": {"mode": "inline"}, "optim": {"steps": 1}}
    train(tiny_recipe(base, **changes), tmp_path / "one", quiet=True)
    assert "draws.switch_share = 0.1 has no effect: inline gates" in caplog.text
    caplog.clear()
    train(tiny_recipe(base, draws={"switch_share": 0.0}, **changes), tmp_path / "two", quiet=True)
    assert "switch_share" not in caplog.text


def test_a_least_compute_below_the_stem_is_found_before_training(base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "gates": {"stem_layers": 3, "least_compute": 0.4},
        "draws": {"minimum": 0.5},
        "optim": {"steps": 1},
    }
    with pytest.raises(ConfigError, match=r"gates.least_compute = 0.4: is below 0.5"):
        train(tiny_recipe(base, **changes), tmp_path / "gated", quiet=True)
    static = {"method": "uniform", "compute": 0.7}  # which serves no mean
    assert train(tiny_recipe(base, static=static, **changes), tmp_path / "static", quiet=True).is_dir()


def test_what_is_evaluated_may_change_when_training_is_over(
    base: Path, recipe: Recipe, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    other = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, calibration=8, problems=9))
    train(other, out, quiet=True)
    assert load_artifact(out / "artifact").recipe == other
    assert log_of(out) == log_of(straight)


def test_what_cannot_be_calibrated_is_found_before_training(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"{i} #### {i}"}) + "\n" for i in range(8)))
    data = {"source": str(rows), "kind": "gsm8k", "subset": None, "calibration_share": 0.0}
    with pytest.raises(DataError, match="the calibration split is empty"):
        train(tiny_recipe(base, data=data, model={"add_tags": True}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_each_source_has_its_own_longest_example(base: Path) -> None:
    sources = [{"kind": "embedded", "max_length": length, "weight": 1.0} for length in (256, 64)]
    recipe = tiny_recipe(base)
    recipe = Recipe.from_json(recipe.to_json() | {"data": {"sources": sources}})
    _, tokenizer, _ = build(recipe)
    samples = training_samples(recipe, tokenizer)
    mixture = samples.examples
    assert isinstance(mixture, Mixture)
    assert {samples.max_length(place) for place in range(20)} == {256, 64}
    assert all(samples.max_length(place) == (256, 64)[mixture.part_of(place)] for place in range(20))


def test_a_run_longer_than_its_data_goes_on_with_rows_that_have_not_come(base: Path, tmp_path: Path) -> None:
    files = {"large": 90, "small": 10}
    for name, rows in files.items():
        lines = [json.dumps({"text": f"{name} {row}"}) for row in range(rows)]
        tmp_path.joinpath(f"{name}.jsonl").write_text("\n".join(lines))
    shares = {"heldout_share": 0.0, "calibration_share": 0.0, "kind": "text"}
    sources = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": 1.0, **shares} for name in files]
    recipe = tiny_recipe(base, optim={"steps": 25, "batch_size": 10})
    recipe = Recipe.from_json(recipe.to_json() | {"data": {"sources": sources}})
    samples = training_samples(recipe, build(recipe)[1])
    assert len(samples.examples) == len(samples) == 250
    seen = {example.prompt for example in samples.examples}
    assert seen == {f"{name} {row}" for name, rows in files.items() for row in range(rows)}


def test_what_replaces_a_sample_does_not_depend_on_the_length_of_the_run(base: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n}", "trace": "1 + 1 " * (100 if n % 3 else 1), "answer": "2"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"source": str(tmp_path / "rows.jsonl"), "kind": "reasoning", "subset": None, "max_length": 100}

    def first(steps: int) -> list[list[int]]:
        recipe = tiny_recipe(base, data=data, optim={"steps": steps, "batch_size": 2})
        samples = training_samples(recipe, build(recipe)[1])
        return [samples[place]["input_ids"] for place in range(2)]

    assert first(1) == first(50)


def test_a_base_of_16_bits_is_searched_too(base: Path, tmp_path: Path) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 4, "search_trials": 1, "trial_steps": 1}
    settings = {"dtype": "bfloat16"}, {"precision": "bf16", "steps": 2, "save_steps": 2}
    recipe = tiny_recipe(base, annealing=plan, model=settings[0], optim=settings[1])
    metrics = json.loads((train(recipe, tmp_path, quiet=True) / "artifact.json").read_text())["metrics"]
    assert sorted(metrics["search"]["order"]) == list(range(1, LAYERS))


def test_a_finished_run_can_be_started_again(recipe: Recipe, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    before = note_metric(out / "artifact", "split", {"points": 1})
    more = dataclasses.replace(recipe.optim, threads=torch.get_num_threads(), save_steps=2)  # which train nothing else
    train(dataclasses.replace(recipe, optim=more), out, quiet=True)
    assert (out / "artifact" / "gates.safetensors").read_bytes() == (
        straight / "artifact" / "gates.safetensors"
    ).read_bytes()
    after = ArtifactConfig.load(out / "artifact")
    assert (after.digest, after.metrics) == (before.digest, before.metrics)  # with what was measured since
    assert after.metrics["from_step"] == 0
    mended = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, calibration=8))
    train(mended, out, quiet=True)  # other prices: another model
    after = ArtifactConfig.load(out / "artifact")
    assert after.digest != before.digest
    assert (after.metrics["from_step"], "split" in after.metrics) == (6, False)


def test_a_run_that_begins_anew_keeps_nothing(recipe: Recipe, straight: Path, tmp_path: Path) -> None:
    out = copy_until(straight, 6, tmp_path / "run")
    (out / SEARCH_FILE).write_text("of before")
    train(recipe, out, quiet=True, resume=False)
    assert log_of(out) == log_of(straight)
    assert not (out / SEARCH_FILE).exists()


def test_a_cached_teacher_is_trained_by_and_gone_on_with(base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(base, optim={"steps": 2, "save_steps": 1, "teacher": "cached"})
    train(recipe, tmp_path / "whole", quiet=True)
    assert all(row["kl"] > 0 for row in log_of(tmp_path / "whole"))
    out = copy_until(tmp_path / "whole", 1, tmp_path / "rest")
    shutil.copytree(tmp_path / "whole" / "teacher", out / "teacher")
    train(recipe, out, quiet=True)
    assert log_of(out) == log_of(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    def second(*_: object) -> None:
        with pytest.raises(StorageError, match="another process works in it"):
            train(recipe, tmp_path / "run", quiet=True)
        raise KeyboardInterrupt

    for _ in range(2):  # the first has let go of it
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", quiet=True, check=second)


def test_a_model_that_was_trained_leaves_the_memory(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.nn.Module]] = []
    short = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, steps=1))
    train(short, tmp_path / "run", quiet=True, check=lambda gated, _: seen.append(weakref.ref(gated)))
    gc.collect()
    assert seen[0]() is None


def test_another_seed_is_another_run(base: Path, straight: Path, tmp_path: Path) -> None:
    other = tiny_recipe(base, adapter={"dropout": 0.2}, draws={"switch_share": 0.3}, seed=4)
    train(other, tmp_path / "run", quiet=True)
    assert [row["loss"] for row in log_of(tmp_path / "run")] != [row["loss"] for row in log_of(straight)]


def test_gradient_accumulation_gives_the_same_losses(base: Path, tmp_path: Path) -> None:
    # Under `mean` the budget term looks at the rows of one forward, so the two differ there by design.
    losses = {}
    for accumulate in (1, 2):
        changes = {"draws": {"contract": "cap"}, "optim": {"accumulate": accumulate, "steps": 4}}
        train(tiny_recipe(base, **changes), tmp_path / str(accumulate), quiet=True)
        losses[accumulate] = log_of(tmp_path / str(accumulate))
    for one, two in zip(losses[1], losses[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["kl"] == pytest.approx(one["kl"], abs=2e-5)


def test_gradient_checkpointing_and_bf16_train(base: Path, tmp_path: Path) -> None:
    changes = {"optim": {"gradient_checkpointing": True, "precision": "bf16", "steps": 2}}
    train(tiny_recipe(base, **changes), tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in log_of(tmp_path / "run")]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_settings_of_another_run_are_refused_unless_forced(base: Path, straight: Path, tmp_path: Path) -> None:
    out = copy_until(straight, 6, tmp_path / "run")
    other = tiny_recipe(base, optim={"steps": 1})
    with pytest.raises(
        ConfigError,
        match=r"with other settings \(adapter.dropout: 0.2 -> 0.0; draws.switch_share: .*; optim.steps: 6 -> 1\)",
    ):
        train(other, out, quiet=True)
    assert last_checkpoint(out / "checkpoints") is not None
    train(other, out, quiet=True, force=True)
    assert [row["step"] for row in log_of(out)] == [1]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("fault", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_one_clear_error(
    recipe: Recipe, straight: Path, tmp_path: Path, name: str, fault: str
) -> None:
    out = copy_until(straight, 3, tmp_path / "run")
    path = out / "checkpoints" / "checkpoint-3" / name
    content = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    with pytest.raises(TrainingError, match=f"checkpoint-3/{name}: cannot resume .*delete that checkpoint folder"):
        verify_checkpoint(out / "checkpoints" / "checkpoint-3")
    if name == "optimizer.pt" and fault == "flipped":  # and that is what a run does first
        with pytest.raises(TrainingError, match=name):
            train(recipe, out, quiet=True)


def test_a_checkpoint_of_another_model_is_one_clear_error(straight: Path) -> None:
    tensors = safetensors.torch.load_file(straight / "checkpoints" / "checkpoint-3" / "model.safetensors")
    step = TrainingStep(new_gated(rank=3), ObjectiveConfig(), seed=0)
    with pytest.raises(ValueError, match=r"has shape .* expected"):
        load_trained_tensors(step, tensors)
    tensors.popitem()
    with pytest.raises(ValueError, match="1 tensors differ"):
        load_trained_tensors(TrainingStep(new_gated(rank=2), ObjectiveConfig(), seed=0), tensors)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Every write beyond ``size`` bytes of a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_a_storage_error_and_the_older_checkpoint_stays(
    recipe: Recipe, straight: Path, tmp_path: Path, file: str
) -> None:
    out = copy_until(straight, 3, tmp_path / "run")
    old = out / "checkpoints" / "checkpoint-3"
    size = (old / file).stat().st_size
    with (
        largest_file(size - 1),
        pytest.raises(StorageError, match=r"checkpoint-6: cannot save the checkpoint: .*free space"),
    ):
        train(recipe, out, quiet=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(recipe, out, quiet=True)  # with space again it goes on
    assert (out / "artifact" / "gates.safetensors").read_bytes() == (
        straight / "artifact" / "gates.safetensors"
    ).read_bytes()


def test_a_loss_that_is_not_a_number_stops_the_run(base: Path, tmp_path: Path) -> None:
    wild = tiny_recipe(base, optim={"lr": 1e20, "gate_lr": 1e20, "clip": 1e30})
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(wild, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "artifact").exists()


def new_trainer(tmp_path: Path, **optim: Any) -> L2ATrainer:
    settings = OptimConfig(**{"steps": 100, "batch_size": 8} | optim)
    recipe = Recipe(optim=settings)
    return L2ATrainer(
        annealing=recipe.annealing,
        optim=settings,
        model=TrainingStep(new_gated(), ObjectiveConfig(), seed=0),
        args=training_arguments(settings, folder=tmp_path, seed=0, trackers=[], world_size=1, quiet=True),
    )


def test_adapters_and_gates_have_their_own_rates(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, lr=1e-3, gate_lr=5e-3)
    optimizer = trainer.create_optimizer()
    gated = trainer.model.gated
    wanted = {id(p): 5e-3 for p in gated.gate_parameters.values() if p.requires_grad} | {
        id(p): 1e-3 for p in gated.adapter_parameters.values()
    }
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found == wanted
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_the_schedule_warms_up_stays_and_falls_to_zero(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, lr=1.0, gate_lr=2.0, warmup=0.1, decay=0.5)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    expected = [min((step + 1) / 10, 1.0, (100 - step) / 50) for step in range(100)]
    assert [rate[0] for rate in rates] == pytest.approx([2 * value for value in expected])
    assert [rate[1] for rate in rates] == pytest.approx(expected)
    assert scheduler.get_last_lr() == [0.0, 0.0]


def test_a_process_that_sees_several_gpus_uses_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class TwoGpus(TrainingArguments):
        """As on a machine with two GPUs, where one process was started."""

        @functools.cached_property
        def _setup_devices(self) -> torch.device:
            device: torch.device = TrainingArguments._setup_devices.func(self)
            self._n_gpu = 2
            return device

    monkeypatch.setattr("l2a_compress.training.trainer.TrainingArguments", TwoGpus)
    trainer = new_trainer(tmp_path)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 8
    assert "2 GPUs are visible and this process uses the first" in caplog.text
    assert "accelerate launch --multi_gpu --num_processes 2" in caplog.text


def test_trained_tensors_round_trip() -> None:
    first, second = (TrainingStep(new_gated(seed=seed), ObjectiveConfig(), seed=0) for seed in (0, 1))
    tensors = {name: value.clone() for name, value in trained_tensors(first).items()}
    load_trained_tensors(second, tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in trained_tensors(second).items())


def test_no_checkpoint_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "none") is None
    (tmp_path / ".partial" / "checkpoint-9").mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None
