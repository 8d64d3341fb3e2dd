"""Kills a training run with SIGKILL at random moments and resumes it, again and again.

    python benchmarks/kill_resume.py --kills 100

A tiny random model saves a checkpoint after every step. After each kill the newest checkpoint must load whole
(``unloadable``), must not be older than the newest one that was seen before the kill (``lost``), and the next process
must get beyond it (``stuck``). At the end the weights are compared, bit by bit, with those of a run that was
never killed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from measure import machine

RESULTS = Path(__file__).parent / "results" / "kill_resume.json"
PATIENCE = 300.0  # seconds until a process that makes no progress counts as stuck
STEPS = 50_000  # more than any run gets to


def new_base(folder: Path) -> Path:
    """A tiny random Qwen3 with the embedded task's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from l2a_compress.embedded.pretrain import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base: Path, save_steps: int) -> dict[str, Any]:
    """The recipe, as JSON."""
    return {
        "model": {"name": str(base), "attention": "eager"},
        "data": {"subset": "easy"},
        "gates": {"stem_layers": 1, "hidden": 4},
        "adapter": {"rank": 1, "dropout": 0.1},
        "optim": {"steps": STEPS, "batch_size": 2, "save_steps": save_steps, "log_steps": 1000, "threads": 1},
        "evaluation": {"calibration": 4},  # each start reads them, and nothing is evaluated
    }


def train_in_child(recipe: dict[str, Any], out: Path) -> None:
    """What a killed process runs."""
    from l2a_compress.training.recipe import Recipe
    from l2a_compress.training.run import train

    with (out / "child.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        train(Recipe.from_json(recipe), out / "run", quiet=True)


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = (out / "run" / "checkpoints").glob("checkpoint-*")
    return max((int(path.name.partition("-")[2]) for path in found), default=0)


def wait_until(condition: Callable[[], bool], child: BaseProcess, patience: float = PATIENCE) -> bool:
    """Whether the condition came true while the process was alive."""
    end = time.monotonic() + patience
    while time.monotonic() < end and child.is_alive():
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def is_loadable(checkpoint: Path) -> bool:
    """Whether checksums hold, every file parses and the state is that of the step in the folder's name."""
    import safetensors.torch
    import torch

    from l2a_compress.errors import L2AError
    from l2a_compress.training.trainer import verify_checkpoint

    try:
        verify_checkpoint(checkpoint)
        safetensors.torch.load_file(checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        return bool(state["global_step"] == int(checkpoint.name.partition("-")[2]))
    except (L2AError, OSError, ValueError, RuntimeError, KeyError) as error:
        print(f"{checkpoint}: {error}", flush=True)
        return False


def run_once(context: Any, recipe: dict[str, Any], out: Path, delay: float) -> dict[str, int]:
    """Starts the run, lets it save once, kills it ``delay`` seconds later, and looks at what is left."""
    before = newest(out)
    child = context.Process(target=train_in_child, args=(recipe, out))
    child.start()
    moved = wait_until(lambda: newest(out) > before, child)
    time.sleep(delay if moved else 0)
    seen = newest(out)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    last = newest(out)
    loadable = last > 0 and is_loadable(out / "run" / "checkpoints" / f"checkpoint-{last}")
    return {"unloadable": int(not loadable), "lost": int(last < seen), "stuck": int(not moved), "step": last}


def never_killed(context: Any, base: Path, out: Path, step: int) -> Path:
    """The checkpoint of that step from one uninterrupted run."""
    out.mkdir()
    child = context.Process(target=train_in_child, args=(settings(base, step), out))
    child.start()
    wait_until(lambda: newest(out) >= step, child, patience=12 * PATIENCE)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return out / "run" / "checkpoints" / f"checkpoint-{step}"


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit by bit."""
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def main() -> None:
    """Runs the kills and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--shortest", type=float, default=0.2, help="seconds from a process's first save to its kill")
    parser.add_argument("--longest", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    # One server process imports everything once; every run is forked from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["l2a_compress.training.run", "transformers.models.qwen3.modeling_qwen3"])
    draw, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        base, out = new_base(Path(name) / "base"), Path(name) / "killed"
        out.mkdir()
        rows = []
        for number in range(options.kills):
            rows.append(run_once(context, settings(base, 1), out, draw.uniform(options.shortest, options.longest)))
            print(f"kill {number + 1}: {rows[-1]}", flush=True)
        counts = {key: sum(row[key] for row in rows) for key in ("unloadable", "lost", "stuck")}
        step = rows[-1]["step"]
        straight = never_killed(context, base, Path(name) / "straight", step)
        same = same_tensors(out / "run" / "checkpoints" / f"checkpoint-{step}", straight)
    found = {"kills": options.kills, **counts, "last_step": step, "same_as_never_killed": same}
    found |= {"seed": options.seed, "seconds": round(time.monotonic() - began, 1), "machine": machine(1)}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
