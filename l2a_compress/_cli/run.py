"""``l2a run``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to answer.", show_default=False)],
    budget: Annotated[float, typer.Option(help="Share of the dense compute, in (0, 1].")] = 1.0,
    max_think_tokens: Annotated[int, typer.Option(help="Most tokens of reasoning.")] = 160,
    max_answer_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only that many of the most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: onnxruntime's choice.")] = None,
    stats: Annotated[bool, typer.Option(help="End with what ran.")] = False,
) -> None:
    """Answer a prompt from a bundle, at any budget, as it is written."""
    from l2a_compress.budget import Budget
    from l2a_compress.runtime.engine import Limits
    from l2a_compress.runtime.runtime import Answer, Runtime
    from l2a_compress.runtime.sampling import Sampling

    limits = Limits(max_think_tokens=max_think_tokens, max_answer_tokens=max_answer_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    asked = Budget(compute=budget)
    runtime = Runtime(bundle, max_rows=1, threads=threads)
    began, count, first = time.perf_counter(), 0, 0.0
    for piece in runtime.stream(prompt, asked, limits=limits, sampling=sampling):
        if not isinstance(piece, Answer):
            count += 1
            first = first or time.perf_counter()
            typer.echo(piece, nl=False)
            continue
        typer.echo()
        if stats:
            ended, shape = time.perf_counter(), runtime.engine.bundle.shape
            typer.echo(
                f"budget {asked}: cost {piece.cost:.3f}, {piece.layers} of {shape.num_layers} layers, {piece.heads} of "
                f"{shape.num_layers * shape.num_groups} KV groups; {piece.think_tokens} think tokens, ended by "
                f"{piece.stopped_by}; first token after {1000 * (first - began):.1f} ms, then "
                f"{1000 * (ended - first) / max(1, count - 1):.2f} ms a token"
            )
