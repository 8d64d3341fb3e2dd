"""Runs in processes of their own: two of them at once, and one that is killed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import train
from test_exporters import new_artifact
from toy_models import save_base, tiny_recipe

REPOSITORY = Path(__file__).parents[2]


def run(*command: str, timeout: float = 500) -> str:
    """Runs a command with the repository's library; what it printed is in the failure."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def train_in_two(recipe: Recipe, tmp_path: Path) -> None:
    """Trains in two processes, to the folder ``two``."""
    path = tmp_path / "recipe.toml"
    tables = {name: table for name, table in recipe.to_json().items() if isinstance(table, dict)}
    lines = [f"seed = {recipe.seed}"]
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value not in (None, {})]
    path.write_text("\n".join(lines))
    # `accelerate launch --cpu` leaves starting the processes to mpirun; this starts them itself, with gloo.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "l2a_compress", "compress", "train", "--recipe", str(path), "--out", str(tmp_path / "two")]
    run(*launch, *command, "--no-evaluate", "--quiet")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = tiny_recipe(base, optim={"steps": 4, "save_steps": 4}, evaluation={"calibration": 4})
    train(recipe, tmp_path / "one", quiet=True)
    train_in_two(recipe, tmp_path)

    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for single, double in zip(one, two, strict=True):
        assert double["learning_rate"] == single["learning_rate"]
        for term in ("ce", "kl", "budget", "tokens", "transition", "cost"):
            assert double[term] == pytest.approx(single[term], abs=1.1e-5), (term, single["step"])  # logged to 5 digits
        assert double["loss"] == pytest.approx(single["loss"], abs=1e-4)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "artifact" / "artifact.json").read_text())["metrics"]["steps"] == 4
    assert {path.name for path in (tmp_path / "two" / "checkpoints" / "checkpoint-4").iterdir()} >= {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.slow
def test_two_processes_share_a_search_and_find_the_order_of_one(tmp_path: Path) -> None:
    plan = {"explore": 0.5, "settle": 0.5, "search_rows": 8, "search_trials": 3, "trial_steps": 1}
    sizes = {"steps": 2, "save_steps": 2}
    recipe = tiny_recipe(save_base(tmp_path / "base"), annealing=plan, optim=sizes, evaluation={"calibration": 4})
    train(recipe, tmp_path / "one", quiet=True)
    train_in_two(recipe, tmp_path)
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    assert one["order"] == two["order"]
    first, second = ({tuple(gone): loss for gone, loss in found["trials"]} for found in (one, two))
    assert first.keys() == second.keys()
    assert all(second[gone] == pytest.approx(loss, rel=1e-3) for gone, loss in first.items())


@pytest.mark.slow
def test_a_killed_run_loses_nothing_before_its_last_checkpoint(tmp_path: Path) -> None:
    results = tmp_path / "kills.json"
    run(
        str(REPOSITORY / "benchmarks" / "kill_resume.py"), "--kills", "5", "--longest", "1.0", "--results", str(results)
    )
    found = json.loads(results.read_text())
    assert found["kills"] == 5
    assert (found["unloadable"], found["lost"], found["stuck"]) == (0, 0, 0)
    assert found["same_as_never_killed"] is True
    assert found["last_step"] >= 5


@pytest.mark.slow
def test_an_export_killed_at_any_moment_leaves_a_whole_bundle_or_none(tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path)
    out = run(str(Path(__file__).with_name("kill_export.py")), str(artifact), str(tmp_path / "bundle"), "50")
    found = ast.literal_eval(out.strip().splitlines()[-1])
    assert sum(found.values()) == 50
    assert min(found.get("absent", 0), found.get("old", 0), found.get("new", 0)) >= 3  # kills fell into all phases
