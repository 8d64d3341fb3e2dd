"""One engine in a process of its own, asked for timings over standard input: peers need their own environments.

    python benchmarks/engines.py KIND PATH THREADS

It answers each line ``{"task": "prefill" | "decode", "batch": n, "length": n, "tokens": n, ...}`` with
``{"seconds": s}``: of the whole prefill of ``length`` tokens per row, or of one decode step after it, for all rows
together. Nothing but numpy and the engine itself is imported, so any environment that has the engine can run it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np

TOKEN = 300  # any ordinary token; what is decoded does not matter, how long it takes does


_draw = np.random.default_rng(0)


def _prompt(batch: int, length: int) -> Any:
    """Never the same twice: an engine may keep what it computed for a prompt."""
    return _draw.integers(1_000, 20_000, (batch, length))


class Bundle:
    """Graphs of a bundle through the project's own decoder."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads, self.open = path, threads, {}

    def _decoder(self, graph: str) -> Any:
        from pathlib import Path

        from l2a_compress.runtime.decoder import GraphDecoder

        if graph not in self.open:
            self.open[graph] = GraphDecoder(Path(self.path) / f"{graph}.onnx", threads=self.threads)
        return self.open[graph]

    def run(self, task: str, batch: int, length: int, tokens: int, graph: str, kept: list[int] | None = None) -> float:
        """``kept`` are the groups of each layer that an ``If`` graph is told to run."""
        decoder, extra = self._decoder(graph), {}
        if kept is not None:
            extra = {
                "budget": np.ones((batch, 2), dtype=np.float32),
                "limits": np.full((batch, 3), 1 << 40, dtype=np.int64),
                "price": np.full(batch, -np.inf, dtype=np.float32),
                "allocation": np.tile(np.array(kept, dtype=np.int64), (batch, 1)),
            }
        decoder.start(batch, length + tokens + 1)
        total = np.ones((batch, length + tokens + 1), dtype=np.int64)
        if task == "prefill":
            began = time.perf_counter()
            decoder.step(_prompt(batch, length), total[:, :length], **extra)
            return time.perf_counter() - began
        fed = np.full((batch, 1), TOKEN, dtype=np.int64)  # behind a cache of zeros, which takes no less time than any
        decoder.step(fed, total[:, : length + 1], **extra)
        began = time.perf_counter()
        for step in range(1, tokens):
            decoder.step(fed, total[:, : length + 1 + step], **extra)
        return (time.perf_counter() - began) / (tokens - 1)


class GenAI:
    """onnxruntime-genai on a folder of its own model builder."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        config.overlay(
            json.dumps(
                {
                    "model": {
                        "decoder": {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
                    }
                }
            )
        )
        self.og, self.model = og, og.Model(config)

    def run(self, task: str, batch: int, length: int, tokens: int, **_: Any) -> float:
        """Greedy search; an end token does not stop it before ``max_length``."""
        params = self.og.GeneratorParams(self.model)
        longest = length + tokens + 2
        params.set_search_options(max_length=longest, min_length=longest, batch_size=batch, do_sample=False)
        generator = self.og.Generator(self.model, params)
        ids = _prompt(batch, length).astype(np.int32)
        began = time.perf_counter()
        generator.append_tokens(ids if batch > 1 else ids[0])
        if task == "prefill":
            return time.perf_counter() - began
        generator.generate_next_token()  # takes the prompt's logits
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(1, tokens):
            generator.generate_next_token()
        return (time.perf_counter() - began) / (tokens - 1)


class OpenVINO:
    """OpenVINO GenAI's pipeline on a GGUF file; its own clock of each step, as it has no call for one."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino_genai as genai

        self.genai = genai
        self.pipe = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, task: str, batch: int, length: int, tokens: int, **_: Any) -> float:
        """The first step, or the mean of those after the second, which is slower than the rest."""
        import openvino as ov

        ids = _prompt(batch, length)
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        count = 1 if task == "prefill" else tokens + 1
        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True)
        raw = self.pipe.generate(inputs, config).perf_metrics.raw_metrics
        steps = list(raw.token_infer_durations)  # microseconds
        assert len(steps) == count
        return float(steps[0] if task == "prefill" else np.mean(steps[2:])) / 1e6


class LlamaCpp:
    """llama.cpp's server, in this process (xllamacpp), on a GGUF file; one slot for each row of a batch."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads, self.server, self.slots = path, threads, None, 0

    def _open(self, slots: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = self.path
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.n_parallel, params.n_ctx = slots, slots * 1024
        params.n_batch = params.n_ubatch = 512
        params.cache_prompt = False
        self.server, self.slots = None, slots
        self.server = xllamacpp.Server(params)

    def run(self, task: str, batch: int, length: int, tokens: int, **_: Any) -> float:
        """The server's own clock of a prompt; of decoding, the median gap between tokens once all rows decode."""
        if self.slots != batch:
            self._open(batch)
        count = 1 if task == "prefill" else 3 * tokens
        settings = {"n_predict": count, "ignore_eos": True, "top_k": 1, "cache_prompt": False, "stream": True}
        arrived: list[list[float]] = [[] for _ in range(batch)]
        last: list[dict[str, Any]] = [{} for _ in range(batch)]

        def ask(row: int, prompt: list[int]) -> None:
            def take(piece: Any) -> None:
                arrived[row].append(time.perf_counter())
                last[row] = piece

            self.server.handle_completions({"prompt": prompt, **settings}, take)

        rows = [threading.Thread(target=ask, args=item) for item in enumerate(_prompt(batch, length).tolist())]
        for row in rows:
            row.start()
        for row in rows:
            row.join()
        if task == "prefill":
            return float(last[0]["timings"]["prompt_ms"]) / 1000
        together = max(times[0] for times in arrived)
        gaps = [b - a for times in arrived for a, b in itertools.pairwise(times) if a >= together]
        return float(np.median(gaps))


class Transformers:
    """The Hugging Face model in bf16, sdpa attention, a dynamic cache."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.cache = torch, transformers.DynamicCache
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def run(self, task: str, batch: int, length: int, tokens: int, **_: Any) -> float:
        """Greedy steps."""
        torch = self.torch
        with torch.inference_mode():
            ids, cache = torch.from_numpy(_prompt(batch, length)), self.cache()
            began = time.perf_counter()
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            if task == "prefill":
                return time.perf_counter() - began
            fed = torch.full((batch, 1), TOKEN)
            self.model(fed, past_key_values=cache)
            began = time.perf_counter()
            for _ in range(1, tokens):
                self.model(fed, past_key_values=cache).logits[:, -1].argmax(-1)
            return (time.perf_counter() - began) / (tokens - 1)


KINDS = {"bundle": Bundle, "genai": GenAI, "openvino": OpenVINO, "llamacpp": LlamaCpp, "transformers": Transformers}


def main() -> None:
    """Answers until the input ends. What the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = KINDS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": engine.run(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
