"""What the C++ runtime is compared with, each in a process of its own that answers as cpp/bench does.

python benchmarks/native_peers.py python | variants | genai BUNDLE THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

_draw = np.random.default_rng(0)


class Python:
    """The Python runtime's engines: of the If graph, and of variants, one of which is open at a time."""

    def __init__(self, folder: str, threads: int, kinds: Sequence[Literal["if", "variants"]]) -> None:
        from l2a_compress.runtime.engine import Engine

        self.engines = {serve: Engine(folder, threads=threads, serve=serve) for serve in kinds}

    def memory(self) -> dict[str, int]:
        """Kilobytes of this process's memory, as the kernel counts them."""
        lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
        return {line[0][:-1]: int(line[1]) for line in lines if line[0] in ("Pss:", "Anonymous:")}

    def step(
        self, *, serve: str, batch: int, length: int, tokens: int, budget: float = 1.0, finish: bool = False
    ) -> dict[str, float]:
        """Processor time of the first step, which computes the prompts, less a decode step; and of a decode step."""
        from l2a_compress.budget import Budget
        from l2a_compress.runtime.request import Limits

        engine = self.engines[serve]
        prompts = _draw.integers(10, engine.bundle.shape.vocab_size // 2, (batch, length))
        prompts[:, -1] = engine.tags.think
        limits = Limits(max_think_tokens=tokens + 8, tau_threshold=None)
        requests = engine.submit(prompts.tolist(), [Budget(compute=budget)] * batch, limits=limits)
        began = time.process_time()
        engine.step()
        first = time.process_time() - began
        engine.step()
        warm, count = time.process_time(), 0
        while count < tokens and len(engine.running) == batch:
            engine.step()
            count += 1
        decode = (time.process_time() - warm) / max(1, count)
        while finish and engine.busy:
            engine.step()
        for request in requests:
            engine.cancel(request)
        engine.step()
        return {"prefill": first - decode, "decode": decode}


class GenAI:
    """onnxruntime-genai on the bundle itself, whose dense variant its genai_config.json names."""

    def __init__(self, folder: str, threads: int) -> None:
        from engines import GenAI as Engine

        self.engine = Engine(folder, threads)

    def step(self, *, batch: int, length: int, tokens: int) -> dict[str, float]:
        """As the other, by greedy search."""
        og, model = self.engine.og, self.engine.model
        params, longest = og.GeneratorParams(model), length + tokens + 4
        params.set_search_options(max_length=longest, min_length=longest, batch_size=batch, do_sample=False)
        generator = og.Generator(model, params)
        ids = _draw.integers(1_000, 20_000, (batch, length)).astype(np.int32)
        began = time.process_time()
        generator.append_tokens(ids if batch > 1 else ids[0])
        generator.generate_next_token()  # takes the prompt's logits
        first = time.process_time() - began
        generator.generate_next_token()
        began = time.process_time()
        for _ in range(tokens):
            generator.generate_next_token()
        return {"prefill": first, "decode": (time.process_time() - began) / tokens}


def main() -> None:
    """Answers until the input ends. What an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    kinds: dict[str, tuple[Literal["if", "variants"], ...]] = {"python": ("if", "variants"), "variants": ("variants",)}
    engine = Python(folder, threads, kinds[kind]) if kind in kinds else GenAI(folder, threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        answer = getattr(engine, asked.pop("task"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
