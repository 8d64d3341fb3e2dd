"""At equal cost: one layer more gone, or as much off the heads of the layers that stay?

    python benchmarks/head_trials.py --seed 0        and 1, 2; 20 minutes each, goes on where it was cut off

Trials of other settings than these, or that do not note theirs, are measured anew.

A network that has met any allocation alike (the exploration of `frontier.py run main`: 600 steps) is trained for a
little while at each allocation, from the same weights and on the same samples, as the trials of the search are, and
its loss is measured behind it. Layers go in the order that the search of `main` found for that seed. What is narrowed
instead is found anew: a few groups at a time, of different layers, those whose absence raises the loss least.

Figures go to benchmarks/results/head_trials.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from frontier import LONG
from frontier_summary import RECORDS
from frontier_tables import trials_table
from measure import RESULTS, machine
from stale import differences, refuse_other, told, trained_settings

from l2a_compress.allocation import Allocation
from l2a_compress.files import write_atomic
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import inputs_of, mean_loss
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import train, training_samples
from l2a_compress.training.samples import SampleCollator
from l2a_compress.training.search import Trials, search_batches
from l2a_compress.training.step import Batch
from l2a_compress.training.store import load_artifact

RESULT = RESULTS / "head_trials.json"
EXPLORED = (
    *("optim.steps=600", "optim.decay=0.0", "annealing.explore=1.0", "annealing.settle=1.0"),
    *("annealing.search_rows=0", "annealing.search_trials=0", "evaluation.calibration=16", "evaluation.demand_rows=0"),
)
HELD_OUT, STEPS = 768, 160  # samples that losses are measured on, and training steps of a trial
CHOSEN_ON, AT_ONCE = 4, 3  # batches that groups are chosen on, and groups that go between two measurements
DEEPEST = 5  # layers


@torch.no_grad()
def narrowed(gated: GatedModel, batches: Sequence[Batch], now: Allocation, count: int) -> Allocation:
    """An allocation with ``count`` groups less, and no layer less."""
    states, groups = [inputs_of(gated, batch) for batch in batches], list(now.groups)
    while count > 0:
        losses = {}
        for layer in range(gated.gate_config.stem_layers, len(groups)):
            for group in groups[layer] if len(groups[layer]) > gated.gate_config.min_groups else ():
                kept = tuple(other for other in groups[layer] if other != group)
                losses[layer, kept] = mean_loss(gated, batches, states, [*groups[:layer], kept, *groups[layer + 1 :]])
        if not losses:
            raise ValueError(f"{count} groups more are to go than the layers can give up")
        gone = dict[int, tuple[int, ...]]()
        for layer, kept in sorted(losses, key=losses.__getitem__):
            if len(gone) < min(AT_ONCE, count):
                gone.setdefault(layer, kept)
        for layer, kept in gone.items():
            groups[layer] = kept
        count -= len(gone)
    return Allocation(num_groups=now.num_groups, groups=tuple(groups))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All trials of one seed; what is known of all seeds."""
    settings = [f"seed={options.seed}", f"optim.threads={options.threads}", "optim.batch_size=16", *LONG, *EXPLORED]
    recipe = Recipe.named("mini", settings)
    folder = options.work / f"head-trials-s{options.seed}"
    if (folder / "artifact").is_dir():
        refuse_other(folder / "artifact", recipe)
    else:
        train(recipe, folder, quiet=True)
    torch.set_num_threads(options.threads)
    loaded = load_artifact(folder / "artifact")
    gated = loaded.gated
    plan = replace(recipe.annealing, search_rows=HELD_OUT, search_trials=1, trial_steps=STEPS)
    recipe = replace(recipe, annealing=plan)
    collate = SampleCollator(loaded.tokenizer)
    held_out, steps = search_batches(gated, training_samples(recipe, loaded.tokenizer), collate, recipe)
    trials = Trials(gated, recipe, steps, held_out)

    content: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found = content.setdefault(f"seed {options.seed}", {})
    noted = json.loads((RECORDS / f"main-s{options.seed}.json").read_text())["training"]["search"]["order"]
    asked = trained_settings(recipe) | {"order": noted[:DEEPEST], "chosen_on": CHOSEN_ON, "at_once": AT_ONCE}
    other = differences(found["settings"], asked) if "settings" in found else ["settings that are not noted"]
    if found.get("trials") and other:
        print(f"seed {options.seed}: trials are measured anew ({told(other)})", flush=True)
        found["trials"] = {}
    found |= {"machine": machine(options.threads), "settings": asked}
    shape, cost = gated.shape, gated.cost
    equal = round(cost.layer_units / cost.group_units) + shape.num_groups  # groups that cost what a layer does
    rows = found.setdefault("trials", {})
    for count in range(DEEPEST + 1):
        kept = set(range(shape.num_layers)) - set(noted[:count])
        without = Allocation.of_layers(kept, shape.num_layers, shape.num_groups)
        for kind in ("layers", "heads") if count < DEEPEST else ("layers",):
            name = f"{kind} {count}"
            if name in rows:
                continue
            one = without if kind == "layers" else narrowed(gated, held_out[:CHOSEN_ON], without, equal)
            rows[name] = {"cost": cost.fraction(one), "groups": one.groups, "losses": trials.trial(one)}
            write_atomic(RESULT, json.dumps(content) + "\n")
            mean = sum(rows[name]["losses"]) / len(held_out)
            print(f"{name}: cost {rows[name]['cost']:.4f}, loss {mean:.5f}", flush=True)
    return content


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/l2a_compress/frontier")
    options = parser.parse_args()
    print(*trials_table(run(options)).values())


if __name__ == "__main__":
    main()
