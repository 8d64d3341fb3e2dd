"""Makes the embedded model from nothing: ``python -m l2a_compress.embedded.pretrain --out DIR``.

One run, one seed: generated problems, loss on the reasoning and the answer only, Muon for the weight matrices and
AdamW for the rest, a curriculum on the number of steps, linear decay over the last half. The log of the
run (one JSON object a line) is left beside the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from l2a_compress._precision import use_bfloat16
from l2a_compress.embedded import task

TAGS = ["<pad>", "<think>", "</think>", "<answer>", "</answer>"]
IGNORE = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the task's vocabulary; ``</answer>`` ends a text."""
    words = {word: index for index, word in enumerate([*TAGS, *task.vocabulary(), "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</answer>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>"]})
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised 12-layer Qwen3 model with 4 KV groups and about 1.3 M parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # type: ignore[call-arg]  # faster here than sdpa: the heads are tiny
    )
    return Qwen3ForCausalLM(config)


def opening(style: task.Style) -> str:
    """The word that a trace begins with, which asks for its style; a brief trace has none to spare."""
    return "" if style == "brief" else f" {style}"


def full_text(problem: task.Problem, style: task.Style) -> tuple[str, str]:
    """The prompt, up to and with ``<think>``, and what follows it."""
    return (
        f"{problem.prompt} <think>",
        f"{opening(style)} {problem.trace(style)} </think> <answer> {problem.answer} </answer>".lstrip(),
    )


def batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    batch_size: int,
    styles: Sequence[task.Style] = task.STYLES,
    easy_share: float = 0.3,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``(input_ids, labels)`` of shape [batch, length], grouped by length within pools of 16 batches.

    Padded on the right to a multiple of 16: a CPU kernel is built for every new shape. Over the first ``easy_share`` of
    the steps problems grow from one step to all.
    """
    rng = random.Random(seed)
    pool_batches = 16
    for pool in range((steps + pool_batches - 1) // pool_batches):
        progress = pool * pool_batches / steps
        grown = progress / easy_share if easy_share else 1.0
        top = min(task.MAX_STEPS, 1 + int(grown * task.MAX_STEPS))
        stream = task.problems(seed=seed * 1_000_003 + pool, split="train", steps=(0, top))
        rows = []
        for _ in range(pool_batches * batch_size):
            prompt, rest = full_text(next(stream), rng.choice(styles))
            head, tail = tokenizer.encode(prompt), tokenizer.encode(rest)
            rows.append((head + tail, [IGNORE] * len(head) + tail))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        for group in groups[: steps - pool * pool_batches]:
            yield _pad(group, tokenizer.pad_token_id)


def _pad(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def train(
    out: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    styles: Sequence[task.Style] = task.STYLES,
    base: Path | None = None,
    log_every: int = 50,
) -> None:
    """Trains the model, from nothing or from ``base``, and saves it, its tokenizer and the log in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    if base is None:
        model, easy_share = build_model(tokenizer, seed), 0.3
    else:
        model, easy_share = Qwen3ForCausalLM.from_pretrained(base, attn_implementation="eager"), 0.0
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 100, 1.0, 2 * (1 - s / steps))) for o in optimizers
    ]
    started, seen, window = time.time(), 0, []
    with (out / "training_log.jsonl").open("w") as log:
        settings = {"seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr, "torch": torch.__version__}
        bf16 = use_bfloat16("auto")
        settings |= {"bf16": bf16, "threads": torch.get_num_threads(), "styles": list(styles)}
        settings |= {"base": str(base) if base else None}
        settings |= {"parameters": sum(p.numel() for p in model.parameters())}
        log.write(json.dumps({"settings": settings}) + "\n")
        for step, (ids, labels) in enumerate(batches(tokenizer, seed, steps, batch_size, styles, easy_share), start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            seen += ids.numel()
            window.append(loss.item())
            if step % log_every == 0 or step == steps:
                row = {"step": step, "loss": round(sum(window) / len(window), 4), "tokens": seen}
                row["seconds"] = round(time.time() - started, 1)
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
                window = []
            if step % 500 == 0 or step == steps:
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
        for style in styles:
            report = evaluate(model, tokenizer, style=style, count=2000)
            log.write(json.dumps({"heldout": report}) + "\n")
            print(report, flush=True)


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    style: task.Style,
    count: int,
    batch_size: int = 200,
    **options: object,
) -> dict[str, object]:
    """Greedy exact match of the answer on held-out problems, in all and by family and difficulty."""
    model.eval()
    named = tokenizer.convert_tokens_to_ids(list(task.STYLES))
    stream = task.problems(seed=20_26, split="heldout", **options)  # type: ignore[arg-type]
    items = sorted((next(stream) for _ in range(count)), key=lambda p: len(p.prompt.split()))
    right: dict[str, list[bool]] = {}
    exact_trace: list[bool] = []
    for start in range(0, count, batch_size):
        group = items[start : start + batch_size]
        heads = tokenizer(
            [f"{full_text(p, style)[0]}{opening(style)}" for p in group], padding=True, return_tensors="pt"
        )
        out = model.generate(  # type: ignore[misc]
            input_ids=heads["input_ids"],
            attention_mask=heads["attention_mask"],
            max_new_tokens=130,
            do_sample=False,
            begin_suppress_tokens=named,  # behind a style's name stands no other, and a brief trace has none
        )
        texts = tokenizer.batch_decode(out[:, heads["input_ids"].shape[1] :])
        for problem, text in zip(group, texts, strict=True):
            answer = text.partition("<answer>")[2].partition("</answer>")[0].strip()
            exact_trace.append(text.partition("</think>")[0].strip() == problem.trace(style))
            for key in ("all", problem.family, problem.difficulty, problem.wording):
                right.setdefault(key, []).append(answer == problem.answer)
    accuracy = {key: round(sum(hits) / len(hits), 4) for key, hits in sorted(right.items())}
    return {"style": style, "n": count, "exact_match": accuracy, "exact_trace": sum(exact_trace) / count}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW has 0.003")
    parser.add_argument("--styles", default=",".join(task.STYLES), help="lengths of reasoning that are drawn from")
    parser.add_argument("--base", type=Path, help="model to go on from (default: none)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    styles = options.styles.split(",")
    if unknown := set(styles) - set(get_args(task.Style)):
        parser.error(f"--styles {', '.join(sorted(unknown))}: choose from {', '.join(get_args(task.Style))}")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    sizes = {"steps": options.steps, "batch_size": options.batch_size}
    train(options.out, seed=options.seed, lr=options.lr, styles=styles, base=options.base, **sizes)


if __name__ == "__main__":
    main()
