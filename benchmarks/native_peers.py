"""What the C++ runtime is compared with, each in a process of its own that answers as cpp/bench does.

python benchmarks/native_peers.py python | genai BUNDLE THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

_draw = np.random.default_rng(0)


class Python:
    """The Python runtime's engine."""

    def __init__(self, folder: str, threads: int) -> None:
        from l2a_compress.runtime.engine import Engine

        self.engines = {serve: Engine(folder, threads=threads, serve=serve) for serve in ("if", "variants")}

    def step(self, *, serve: str, batch: int, length: int, tokens: int) -> dict[str, float]:
        """Seconds of the first step, which computes the prompts, less a decode step; and of a decode step."""
        from l2a_compress.runtime.request import Limits

        engine = self.engines[serve]
        prompts = _draw.integers(10, engine.bundle.shape.vocab_size // 2, (batch, length))
        prompts[:, -1] = engine.tags.think
        limits = Limits(max_think_tokens=tokens + 8, tau_threshold=None)
        requests = engine.submit(prompts.tolist(), [None] * batch, limits=limits)
        began = time.perf_counter()
        engine.step()
        first = time.perf_counter() - began
        engine.step()
        warm, count = time.perf_counter(), 0
        while count < tokens and len(engine.running) == batch:
            engine.step()
            count += 1
        decode = (time.perf_counter() - warm) / max(1, count)
        for request in requests:
            engine.cancel(request)
        engine.step()
        return {"prefill": first - decode, "decode": decode}


class GenAI:
    """onnxruntime-genai on the bundle itself, whose dense variant its genai_config.json names."""

    def __init__(self, folder: str, threads: int) -> None:
        from engines import GenAI as Engine

        self.engine = Engine(folder, threads)

    def step(self, *, serve: str, batch: int, length: int, tokens: int) -> dict[str, float]:
        """As the other; ``serve`` means nothing here."""
        asked = {"batch": batch, "length": length}
        prefill = self.engine.run("prefill", tokens=2, **asked)
        return {"prefill": prefill, "decode": self.engine.run("decode", tokens=max(2, tokens), **asked)}


def main() -> None:
    """Answers until the input ends. What an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = {"python": Python, "genai": GenAI}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        asked.pop("task")
        print(json.dumps(engine.step(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    main()
