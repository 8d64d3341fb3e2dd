"""SmolLM2-135M on GSM8K through the public ``train``: kill -9 and resume, then a real run and its evaluation."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import likelihood, progress, verdict
from smollm2_setup import Setup
from stale import refuse_other

from l2a_compress.evaluation.frontier import evaluate
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import CHECKPOINTS, LOG_FILE, train
from l2a_compress.training.store import load_artifact
from l2a_compress.training.trainer import last_checkpoint

COMPARED = ("loss", "ce", "kl", "budget", "grad_norm")


def resume(setup: Setup, steps: int = 8) -> dict[str, Any]:
    """A run that is killed in the middle and started again gives the losses of one that is not."""
    short = [
        f"optim.steps={steps}",
        "optim.batch_size=2",
        f"optim.save_steps={steps // 4}",
        "optim.log_steps=1",
        "optim.prior_rows=1",
        "data.max_length=160",
        "evaluation.calibration=16",
    ]
    recipe = setup.recipe(*short)
    whole, broken = setup.runs / "resume-whole", setup.runs / "resume-broken"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    _wait(_start(recipe, whole))
    killed = _kill_after_first_save(recipe, broken, setup.seed)
    _wait(_start(recipe, broken))
    lines = [_log(folder) for folder in (whole, broken)]
    # The log keeps what was logged before the checkpoint, so the resumed run's log has every step.
    pairs = [[row[name] for row in log for name in COMPARED if name in row] for log in lines]
    largest = max(abs(a - b) for a, b in zip(*pairs, strict=True))
    weights = [(folder / "artifact" / "gates.safetensors").read_bytes() for folder in (whole, broken)]
    print(
        f"killed -9 at step {killed} of {steps}, resumed; artifacts {'equal' if len(set(weights)) == 1 else 'differ'}"
    )
    verdict(f"largest difference of {len(pairs[0])} logged values: {largest:g}", largest, 0.0, at_most=True)
    return {
        "bars": {"largest_difference": 0.0},
        "largest_difference": largest,
        "gates_equal": len(set(weights)) == 1,
        "killed_after_step": killed,
        "steps": steps,
        "losses": [[row["loss"] for row in log if "loss" in row] for log in lines],
    }


def _start(recipe: Recipe, out: Path) -> subprocess.Popen[bytes]:
    """``train`` in a process of its own, which writes to a log beside ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".json")
    file.write_text(json.dumps(recipe.to_json()))
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, __file__, str(file), str(out)], stdout=log, stderr=log)


def _wait(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"training failed with code {process.returncode}; its log stands in the folder of --runs")


def _kill_after_first_save(recipe: Recipe, out: Path, seed: int) -> int:
    """Starts a run and kills it a random moment after its first checkpoint; the step of the last one."""
    process, checkpoints = _start(recipe, out), out / CHECKPOINTS
    while last_checkpoint(checkpoints) is None:
        if process.poll() is not None:
            raise SystemExit(f"training ended before its first checkpoint; see {out.with_suffix('.log')}")
        time.sleep(0.05)
    time.sleep(random.Random(seed).uniform(0.5, 4.0))
    os.kill(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("training ended before it was killed; give it more steps")
    found = last_checkpoint(checkpoints)
    assert found is not None
    return int(found.rpartition("-")[2])


def _log(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def real_run(setup: Setup, overrides: list[str]) -> dict[str, Any]:
    """Trains (or goes on with) the recipe's run and evaluates it; ``overrides`` are the recipe's, section.key=value."""
    recipe = setup.recipe(*overrides)
    out = setup.runs / "train"
    began, before = time.perf_counter(), last_checkpoint(out / CHECKPOINTS)
    artifact = out / "artifact"
    if artifact.exists():
        refuse_other(artifact, recipe)
    else:
        train(recipe, out)
    minutes = (time.perf_counter() - began) / 60
    log = _log(out)
    report = evaluate(load_artifact(artifact), recipe.evaluation, metric="nll", batch_size=16, progress=progress)
    print(" " * 60, end="\r")
    points = {
        "dense": [likelihood(report.dense)],
        "l2a": [likelihood(point) for point in report.points],
        "baselines": [likelihood(point) for point in report.baselines],
    }
    _table(points)
    ends = [{name: row.get(name) for name in ("step", *COMPARED, "cost")} for row in log[:1] + log[-1:]]
    return {"points": points, "training": {"minutes": round(minutes, 1), "resumed_from": before, "first_last": ends}}


def _table(points: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':16} {'budget':>7} {'cost':>6} {'layers off':>10} {'NLL':>7} {'KL':>7} {'agreement':>22}")
    for row in [*points["dense"], *points["l2a"], *points["baselines"]]:
        agreement = f"{row['agreement']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        shares = f"{row['budget']:7.2f} {row['cost']:6.3f} {row['layer_sparsity']:10.3f}"
        print(f"{row['name']:16} {shares} {row['nll']:7.3f} {row['kl']:7.3f} {agreement:>22}")


if __name__ == "__main__":
    train(Recipe.from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), quiet=True)
