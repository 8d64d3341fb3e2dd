r"""An artifact as a model of lm-evaluation-harness, under the name ``l2a``.

The harness finds only models that are registered before its command line runs, and has no hook for others. So this
module is its command line with ``l2a`` registered, and takes the same arguments:

    python -m l2a_compress.evaluation.lm_eval_adapter run --model l2a \
        --model_args artifact=runs/mine/artifact,budget=0.6 --tasks my_task --include_path my_tasks

From Python, importing this module registers the model for ``lm_eval.simple_evaluate(model="l2a", ...)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.modeling.generation import Generated, GenerationConfig, generate
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.collate import left_padded
from l2a_compress.training.encode import encode_prompt
from l2a_compress.training.examples import Example
from l2a_compress.training.pieces import begin_ids, token_ids
from l2a_compress.training.store import load_artifact

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("lm-eval is not installed: pip install 'l2a-compress[train,lm-eval]'") from error

__all__ = ["L2AModel", "main"]

_Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation


@register_model("l2a")
class L2AModel(TemplateLM):  # type: ignore[misc]
    """A trained artifact at one budget.

    Each request gets its own allocation, decided on its context. ``generate_until`` reasons and answers as in training;
    ``loglikelihood`` scores the continuation right after the context, without reasoning.
    """

    def __init__(
        self,
        artifact: str,
        budget: float = 1.0,
        contract: str = "cap",
        think_tokens: int | None = None,
        max_think_tokens: int | None = None,
        reply: str = "answer",
        dense: bool = False,
        base: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the artifact; these are what ``--model_args`` takes.

        Args:
            artifact: The folder that training wrote.
            budget: Share of the dense model's compute, in (0, 1].
            contract: ``cap`` or ``mean``.
            think_tokens: The budget's cap on think tokens, which the network is told.
            max_think_tokens: A cap on think tokens it is not told; by default that of the recipe.
            reply: ``answer`` returns the answer alone; ``trace`` the reasoning, then ``#### answer`` as in GSM8K.
            dense: Run the frozen base model instead: adapters and gates off.
            base: The base model's folder, where it is not at the place the artifact remembers.
            max_length: Most tokens of a context and its continuation; by default the model's.
            batch_size: Requests that run together; ``auto`` is 16.
            max_batch_size: Not used; the harness passes it.
            device: Where to run, e.g. ``cpu`` or ``cuda``.
        """
        super().__init__()
        if contract not in ("cap", "mean") or reply not in ("answer", "trace"):
            raise ConfigError(f"model_args: contract={contract} must be cap or mean, and reply={reply} answer or trace")
        loaded = load_artifact(artifact, base=base)
        self.gated, self.reply, self.dense = loaded.gated.to(device or "cpu"), reply, dense
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.budget, self.contract = Budget(compute=float(budget), think_tokens=think_tokens), contract
        most = loaded.recipe.evaluation.max_think_tokens if max_think_tokens is None else max_think_tokens
        self.limits = GenerationConfig(max_think_tokens=most, max_answer_tokens=64)
        self.max_length = int(max_length or self.gated.model.config.max_position_embeddings)
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 16
        self._seeds = count()  # a draw of its own for each batch: a task may ask one question many times

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the begin token where the tokenizer uses one, else the end token."""
        return (begin_ids(self.tokenizer) or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids, with the begin token in front where the tokenizer uses one."""
        (ids,) = token_ids(self.tokenizer, [string])
        return ids if add_special_tokens is False else [*begin_ids(self.tokenizer), *ids]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One reply per request, cut before the first of its stop strings."""
        prompts = [self._prompt(request.args[0]) for request in requests]
        replies = [""] * len(requests)
        for rows in self._batches(requests, [len(prompt) for prompt in prompts]):
            options = requests[rows[0]].args[1]
            limits = replace(self._limits(options), seed=next(self._seeds))
            outputs = self._generate([prompts[row] for row in rows], limits)
            for row, output in zip(rows, outputs, strict=True):
                replies[row] = _cut(self._text(output), options.get("until"))
                self.cache_hook.add_partial("generate_until", requests[row].args, replies[row])
        return replies

    def _prompt(self, context: str) -> list[int]:
        example = Example(prompt=context, traces={}, answer="", kind="reasoning")
        ids = encode_prompt(example, self.tokenizer)
        room = self.max_length - self.limits.max_think_tokens - self.limits.max_answer_tokens
        return ids[-max(room, 1) :]  # of a context that is too long the end, where the question is

    def _batches(self, requests: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers of requests with the same options and of like length."""
        order = sorted(range(len(requests)), key=lambda row: (repr(requests[row].args[1]), lengths[row]))
        batch: list[int] = []
        for row in order:
            if batch and (len(batch) >= self.batch_size or requests[row].args[1] != requests[batch[0]].args[1]):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _limits(self, options: Mapping[str, Any]) -> GenerationConfig:
        limits = self.limits
        unknown = [name for name in ("top_p", "top_k", "min_p") if options.get("do_sample") and options.get(name)]
        if unknown:
            raise ConfigError(f"generation_kwargs: {unknown[0]} is not known here; leave it out, and give temperature")
        if options.get("max_gen_toks") is not None:
            limits = replace(limits, max_think_tokens=min(limits.max_think_tokens, int(options["max_gen_toks"])))
        if options.get("do_sample"):
            limits = replace(limits, temperature=float(options.get("temperature", 1.0)))
        return limits

    def _generate(self, prompts: Sequence[list[int]], limits: GenerationConfig) -> list[Generated]:
        ids, mask = left_padded(prompts, self.eot_token_id, self.gated.model.device)
        return generate(
            self.gated,
            read_tags(self.tokenizer),
            ids,
            mask,
            budgets=[self.budget] * len(prompts),
            contract=self.contract,  # type: ignore[arg-type]
            config=limits,
            teacher=self.dense,
        )

    def _text(self, output: Generated) -> str:
        answer = str(self.tokenizer.decode(output.answer, skip_special_tokens=True)).strip()
        if self.reply == "answer":
            return answer
        return f"{self.tokenizer.decode(output.think, skip_special_tokens=True)}\n#### {answer}".strip()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of ``max_length``; a window is allocated on its first token."""
        totals = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(value for value, _ in self._score(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    @torch.no_grad()
    def _score(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        """Per pair the log-likelihood of its continuation, and whether greedy decoding would write it."""
        scores: dict[int, tuple[float, bool]] = {}
        fitted = [_fitted(pair, self.max_length) for pair in pairs]
        order = sorted(range(len(fitted)), key=lambda row: sum(map(len, fitted[row])))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores.update(zip(rows, self._score_batch([fitted[row] for row in rows]), strict=True))
        return [scores[row] for row in range(len(fitted))]

    def _score_batch(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        ids, mask = left_padded([context + more for context, more in pairs], self.eot_token_id, self.gated.model.device)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.dense:
            with self.gated.teacher():
                hidden = self.gated(ids, mask, position_ids=places).hidden
        else:
            contexts, seen = left_padded([context for context, _ in pairs], self.eot_token_id, ids.device)
            budgets = [self.budget] * len(pairs)
            decided = self.gated.allocate(contexts, seen, budgets, contract=self.contract)  # type: ignore[arg-type]
            with self.gated.forced(decided):
                hidden = self.gated(ids, mask, position_ids=places).hidden
        return [self._score_row(hidden[row], more) for row, (_, more) in enumerate(pairs)]

    def _score_row(self, hidden: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """``hidden`` is [length, width] and ends with the continuation."""
        logits = self.gated.logits(hidden[-len(continuation) - 1 : -1]).float()
        targets = torch.tensor(continuation, device=logits.device)
        value = -functional.cross_entropy(logits, targets, reduction="sum")
        return float(value), bool((logits.argmax(-1) == targets).all())


def _fitted(pair: _Pair, longest: int) -> _Pair:
    """A pair that fits: the beginning of its context gives way."""
    context, continuation = pair
    return context[-max(longest - len(continuation), 1) :], continuation


def _cut(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.split(stop)[0]
    return text


def main() -> None:
    """The harness's own command line, with the model ``l2a``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
