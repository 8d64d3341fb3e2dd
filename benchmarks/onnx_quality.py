"""What each precision of a bundle costs in quality: KL, agreement and task accuracy against fp32.

    python benchmarks/onnx_quality.py --artifact runs/mini/artifact            # the embedded model: with exact match
    python benchmarks/onnx_quality.py --artifact A --problems 64 --tokens 64   # any artifact: KL and agreement

Every precision is exported to a bundle of its own, and its If graph is run at each budget. KL and agreement are of the
next token, on greedy tokens of the fp32 graph up to the end of its answer; exact match is of answers that each graph
writes itself, on held-out problems of the embedded task, and its difference to fp32's problem by problem. Figures go
to benchmarks/results/onnx_quality.json, under the base model's name.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measure import RESULTS, Results
from onnx_speed import BUNDLES

from l2a_compress.budget import Budget
from l2a_compress.evaluation.answers import matches
from l2a_compress.evaluation.prompts import Problem, held_out
from l2a_compress.evaluation.statistics import paired, wilson
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.exporters.verify import graph_inputs, graph_logits, one_more, right_padded
from l2a_compress.modeling.budgets import batch_budgets
from l2a_compress.modeling.tags import read_tags
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.training.collate import left_padded
from l2a_compress.training.store import LoadedArtifact, load_artifact

PRECISIONS = {**BUNDLES, "fp16": ("fp16", None)}  # fp32 comes first
BUDGETS = (1.0, 0.8, 0.66)
ROWS = 32  # of a batch


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=300, help="held-out problems (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="most greedy tokens of each, for KL (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_quality.json", help="figures (%(default)s)")
    options = parser.parse_args()
    loaded = load_artifact(options.artifact)
    name = Path(str(loaded.config.base["name"])).name
    exact = name == "embedded"
    problems = held_out(
        loaded.recipe.data, loaded.tokenizer, metric="accuracy", count=options.problems, seed=loaded.recipe.seed
    )
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        decoders = dict(_decoders(options.artifact, Path(work), options.threads))
        for budget in BUDGETS:
            for point in _likelihoods(loaded, decoders, problems, budget, options.tokens):
                if exact:
                    point |= _exact(loaded, decoders[point["precision"]], problems, budget)
                    fp32 = next(one for one in [*points, point] if one["budget"] == budget)
                    point["less_fp32"] = paired(point["outcomes"], fp32["outcomes"])
                points.append(point)
                print(
                    "  ".join(
                        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in point.items()
                    )
                )
    settings = {"problems": len(problems), "tokens": options.tokens, "seed": loaded.recipe.seed, "rows": ROWS}
    settings |= {"scored": "until the answer ends"}
    Results(options.out).put(name, {"points": points}, settings, threads=options.threads)
    print(f"figures: {options.out}")


def _decoders(artifact: Path, work: Path, threads: int) -> Iterator[tuple[str, GraphDecoder]]:
    for name, (precision, block) in PRECISIONS.items():
        folder = work / name.replace("/", "-")
        export(artifact, folder, ExportOptions(budgets=(), precision=precision, block=block, positions=1024))
        yield name, GraphDecoder(folder / "if.onnx", threads=threads)


def _batches(loaded: LoadedArtifact, problems: Sequence[Problem]) -> Iterator[tuple[list[Problem], Any, Any]]:
    ordered = sorted(problems, key=lambda problem: (problem.length, len(problem.prompt)))
    for start in range(0, len(ordered), ROWS):
        rows = ordered[start : start + ROWS]
        yield rows, *left_padded([row.prompt for row in rows], int(loaded.tokenizer.pad_token_id or 0))


def _inputs(loaded: LoadedArtifact, budget: float, rows: int) -> dict[str, Any]:
    gated = loaded.gated
    told = batch_budgets([Budget(compute=budget)] * rows, gated.cost, gated.gate_config)
    return graph_inputs(told, gated.shape.num_layers)


def until_the_end(written: npt.NDArray[Any], ends: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[batch, tokens]: up to and with the first of the tokens that end a text. What stands behind nobody reads."""
    ended = np.isin(written, ends)
    found: npt.NDArray[np.bool_] = ended.cumsum(1) - ended == 0
    return found


def _likelihoods(
    loaded: LoadedArtifact, decoders: dict[str, GraphDecoder], problems: Sequence[Problem], budget: float, tokens: int
) -> Iterator[dict[str, Any]]:
    """KL of each precision from fp32, in nats a token, and how often the most likely token is the same."""
    ends = [one for one in (read_tags(loaded.tokenizer).end_answer, loaded.tokenizer.eos_token_id) if one is not None]
    total = dict.fromkeys(decoders, 0.0)
    equal, allocations, count, rows_seen = dict.fromkeys(decoders, 0), dict.fromkeys(decoders, 0), 0, 0
    for rows, ids, mask in _batches(loaded, problems):
        inputs = _inputs(loaded, budget, len(rows))
        follow = _greedy(decoders["fp32"], ids, mask, dict(inputs), tokens)
        scored = until_the_end(follow, ends)
        reference, chosen = graph_logits(decoders["fp32"], ids, mask, follow, inputs)
        wanted = torch.from_numpy(reference[scored]).log_softmax(-1)
        for precision, decoder in decoders.items():
            logits, kept = graph_logits(decoder, ids, mask, follow, inputs)
            found = torch.from_numpy(logits[scored]).log_softmax(-1)
            total[precision] += float((wanted.exp() * (wanted - found)).sum())
            equal[precision] += int((found.argmax(-1) == wanted.argmax(-1)).sum())
            allocations[precision] += int(np.equal(kept, chosen).all(1).sum())
        count, rows_seen = count + int(scored.sum()), rows_seen + len(rows)
    for precision in decoders:
        yield {
            "precision": precision,
            "budget": budget,
            "kl": max(total[precision] / count, 0.0),
            "agreement": equal[precision] / count,
            "tokens_scored": count,
            "same_allocation": allocations[precision] / rows_seen,
        }


def _greedy(decoder: GraphDecoder, ids: Any, mask: Any, inputs: dict[str, Any], tokens: int) -> Any:
    """[batch, tokens]: what the graph itself would write."""
    fed, seen = right_padded(ids, mask)
    decoder.start(len(fed), fed.shape[1] + tokens)
    written = []
    for _ in range(tokens):
        outputs = decoder.step(fed, seen, **inputs)
        inputs["allocation"] = outputs["kept_groups"]
        fed, seen = outputs["logits"][:, 0].argmax(-1)[:, None], one_more(seen, in_place=True)
        written.append(fed)
    return np.concatenate(written, axis=1)


def _exact(loaded: LoadedArtifact, decoder: GraphDecoder, problems: Sequence[Problem], budget: float) -> dict[str, Any]:
    """Exact match of the answers between the tags; reasoning that does not end within its limit is wrong."""
    tags, hits = read_tags(loaded.tokenizer), list[bool]()
    for rows, ids, mask in _batches(loaded, problems):
        limit = round(1.25 * max(row.length for row in rows)) + 24
        written = _greedy(decoder, ids, mask, _inputs(loaded, budget, len(rows)), limit)
        for row, tokens in zip(rows, written.tolist(), strict=True):
            hit = tags.answer in tokens and tags.end_answer in tokens
            if hit:
                answer = tokens[tokens.index(tags.answer) + 1 : tokens.index(tags.end_answer)]
                hit = matches(str(loaded.tokenizer.decode(answer, skip_special_tokens=True)), row.example.answer)
            hits.append(hit)
    low, high = wilson(sum(hits), len(hits))
    outcomes = "".join(str(int(hit)) for hit in hits)
    return {"accuracy": sum(hits) / len(hits), "accuracy_low": low, "accuracy_high": high, "outcomes": outcomes}


if __name__ == "__main__":
    main()
