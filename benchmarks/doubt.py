"""What the dense embedded model is in doubt about: how much of its loss is a choice of words, and not a mistake.

    python benchmarks/doubt.py        # a minute; figures go to benchmarks/results/doubt.json

Labels of training samples of recipe `mini`, as the frozen model without adapters sees them. The first label of a trace
chooses between its long and its short wording, which the dense model is not told.
"""

from __future__ import annotations

import argparse
import json

import torch
from measure import RESULTS

from l2a_compress.files import write_atomic
from l2a_compress.training.objective import Supervised, label_nll, log_probabilities
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import build, training_samples
from l2a_compress.training.samples import SampleCollator


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = Recipe.named("mini", [f"seed={options.seed}"])
    gated, tokenizer, _ = build(recipe)
    samples, collate = training_samples(recipe, tokenizer), SampleCollator(tokenizer)
    totals = torch.zeros(3)
    with torch.no_grad(), gated.eval().teacher():
        for start in range(0, options.rows, 16):
            batch = collate([samples[index] for index in range(start, start + 16)])["batch"]
            where = Supervised.of(batch["labels"])
            states = gated(batch["input_ids"], batch["attention_mask"]).hidden[where.mask]
            known = log_probabilities(gated.logits(states))
            nll = label_nll(known, where.targets)
            first = torch.cat([torch.ones(1, dtype=torch.bool), where.rows.diff() > 0])
            sure = known.amax(-1) > torch.tensor(0.9).log()
            totals += torch.stack([nll.sum(), nll[first].sum(), nll[sure].sum()])
    every, first, sure = (totals / options.rows).tolist()
    found = {
        "rows": options.rows,
        "seed": options.seed,
        "nats_a_row": round(every, 4),
        "of_the_first_label": round(first, 4),
        "share_of_the_first_label": round(first / every, 4),
        "of_labels_where_the_best_word_has_90_percent": round(sure, 4),
    }
    write_atomic(RESULTS / "doubt.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
