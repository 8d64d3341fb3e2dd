"""A real checkpoint on a CPU: SmolLM2-135M-Instruct on GSM8K. One command, which can be stopped and started again.

    export L2A_DATA=DATA                               # or --data DATA: the folder with gsm8k/train.jsonl
    python benchmarks/smollm2.py                       # decode, logits, training, memory, resume: some ten minutes
    python benchmarks/smollm2.py train                 # the recipe's run and its evaluation: about an hour on two cores
    python benchmarks/smollm2.py decode training --again
    python benchmarks/smollm2.py train --set optim.steps=3 --set evaluation.problems=4

    decode     seconds per token at two thirds of the layers / dense Transformers              bar <= 0.75
    logits     largest difference of masked and skipped execution, fp32                        bar <= 1e-5
    training   speed / PEFT's LoRA on the same batches, teacher online | cached                bar >= 0.65 | 0.9
    memory     peak memory / PEFT's LoRA                                                       bar <= 1.2
    resume     losses of a run that is killed with -9 and resumed, against one that is not     bar: equal
    train      held-out NLL, KL to dense and agreement with dense at five budgets, against block influence

The checkpoint is fetched as fetch_models.py says; docs/data.md says where to get GSM8K's train.jsonl. Figures go to
benchmarks/results/smollm2.json; a section that is there under the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import smollm2_speed
import smollm2_train
import torch
from fetch_models import DEFAULT_CACHE
from measure import RESULTS, Results
from smollm2_setup import Setup

SPEED = {
    "decode": smollm2_speed.decode,
    "logits": smollm2_speed.logits,
    "training": smollm2_speed.training,
    "memory": smollm2_speed.memory,
    "resume": smollm2_train.resume,
}


def main() -> None:
    """The command."""
    options = _options()
    setup, results = Setup.of(options), Results(options.out)
    torch.set_num_threads(setup.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not (setup.data / "gsm8k" / "train.jsonl").is_file():
        raise SystemExit(
            f"{setup.data / 'gsm8k' / 'train.jsonl'} is absent: give its folder with --data (see docs/data.md)"
        )
    for name in options.sections:
        settings = {key: getattr(options, key) for key in ("threads", "rounds", "batch_size", "max_length", "seed")}
        if name == "train":
            settings["set"] = sorted(options.set)
        if not options.again and results.get(name, settings) is not None:
            print(f"{name}: is in {options.out} already; --again measures it anew")
            continue
        print(f"{name} ...", flush=True)
        section = smollm2_train.real_run(setup, options.set) if name == "train" else SPEED[name](setup)
        results.put(name, section, settings, threads=setup.threads)
    print(f"figures: {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = [*SPEED, "train"]
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(sections)}; all but train")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    data = os.environ.get("L2A_DATA") or None
    parser.add_argument("--data", type=Path, default=data, help="folder with gsm8k/train.jsonl; default: L2A_DATA")
    parser.add_argument("--runs", type=Path, default=DEFAULT_CACHE.parent / "runs", help="training runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2.json", help="figures (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of a timing (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="of the training speed and memory (%(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure what has been measured already")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="recipe of train")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give a folder with gsm8k/train.jsonl by --data or L2A_DATA (see docs/data.md)")
    unknown = [name for name in options.sections if name not in sections]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; there are {', '.join(sections)}")
    options.sections = options.sections or list(SPEED)
    return options


if __name__ == "__main__":
    main()
