"""Continuous batching over the ``If`` graph of a bundle: requests of any budget and length come and go between steps.

    waiting --prefill, one by one, into a free row of the caches--> active --decode, all rows together--> done

A row's computation does not depend on the others, so neither does its text.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import BundleError, ConfigError
from l2a_compress.limits import Contract, limits_of, think_share
from l2a_compress.reasoning import Reasoning, Tags
from l2a_compress.runtime.caches import Caches
from l2a_compress.runtime.decoder import PAST, GraphDecoder
from l2a_compress.runtime.sampling import Sampler, Sampling

Array = np.ndarray[Any, np.dtype[Any]]
_TAGS = 3  # that are written after the prompt


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a request may write.

    Attributes:
        max_think_tokens: Of reasoning; the budget's own cap applies besides it.
        max_answer_tokens: Of the answer.
        tau_threshold: Reasoning stops once the transition gate exceeds it; None does not ask the gate.
    """

    max_think_tokens: int = 160
    max_answer_tokens: int = 16
    tau_threshold: float | None = 0.9

    def __post_init__(self) -> None:
        for name, least in (("max_think_tokens", 0), ("max_answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class _Told:
    """A budget as the graph's inputs."""

    features: tuple[float, float]
    limits: tuple[int, int, int]
    price: float


@dataclass(kw_only=True, eq=False)
class Request:
    """One text that is being written. Made by :meth:`Engine.submit`.

    Attributes:
        number: In the order of submission.
        prompt: Token ids, ending in ``<think>``.
        budget: What it may spend.
        reasoning: Its reasoning and answer so far, and where it stands.
        kept: KV groups that it runs of each layer; None until the gates have decided.
        written: All tokens so far, tags included.
    """

    number: int
    prompt: list[int]
    budget: Budget
    reasoning: Reasoning
    kept: tuple[int, ...] | None = None
    written: list[int] = field(default_factory=list)
    told: _Told = field(repr=False)
    sampler: Sampler = field(repr=False)
    tau: float | None = field(repr=False)
    length: int = field(repr=False)  # tokens in the caches

    @property
    def done(self) -> bool:
        """Whether nothing more will be written."""
        return self.reasoning.stage == "done"


class Engine:
    """Runs requests together. One thread at a time may call it.

    Args:
        folder: the bundle.
        max_rows: most requests at a time; others wait.
        threads: of one operator; None leaves it to onnxruntime.
        contract: under which the gates allocate.

    Raises:
        BundleError: the folder is not a whole bundle, or has no ``If`` graph of the dialect ``ort``.
    """

    def __init__(
        self, folder: str | Path, *, max_rows: int = 8, threads: int | None = None, contract: Contract = "cap"
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, found {max_rows!r}")
        self.bundle = bundle = Bundle.load(Path(folder))
        entry = bundle.if_graph
        if entry is None or bundle.dialect != "ort":
            raise BundleError(f"{folder}: has no If graph of the dialect ort; export it with --if-graph --dialect ort")
        self.max_rows, self.contract = max_rows, contract
        names = ("think", "end_think", "answer", "end_answer")
        think, end_think, answer, end_answer = (bundle.tags[name] for name in names)
        self.tags = Tags(think=think, end_think=end_think, answer=answer, end_answer=end_answer)
        self._decoder = GraphDecoder(Path(folder) / entry.file, threads=threads)
        inputs = self._decoder.inputs.items()
        self._caches = Caches(
            {name: (item.shape[1], item.shape[3], item.type) for name, item in inputs if name.startswith(PAST)}
        )
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._numbers = itertools.count()
        self._bound = -1  # rows that the decoder is bound to; -1: not to the active ones

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: Sequence[Budget | None],
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
    ) -> list[Request]:
        """Queues requests: all of them, or none.

        Args:
            prompts: token ids, each ending in ``<think>``.
            budgets: one for each; None for all that the model has.
            limits: of their length, beside each budget's own cap.
            sampling: None for greedy. Each request draws as if it were alone.

        Raises:
            BudgetError: the model cannot keep to a budget.
            ConfigError: an id that is not in the vocabulary, a prompt that does not end in ``<think>``, or one that
                leaves no room for the longest text allowed.
        """
        limits, sampling = limits or Limits(), sampling or Sampling()
        pairs = zip(prompts, budgets, strict=True)
        made = [self._request(prompt, budget or Budget(), limits, sampling) for prompt, budget in pairs]
        self._waiting.extend(made)
        return made

    def _request(self, prompt: Sequence[int], budget: Budget, limits: Limits, sampling: Sampling) -> Request:
        bundle, tags = self.bundle, self.tags
        stem, reference = bundle.gates["stem_layers"], bundle.gates["think_reference"]
        spend = limits_of(budget, bundle.cost, stem, contract=self.contract, prices=bundle.prices)
        wrong = [token for token in prompt if not 0 <= token < bundle.shape.vocab_size]
        if wrong:
            raise ConfigError(f"prompt: token id {wrong[0]} is not in the vocabulary of {bundle.shape.vocab_size}")
        if not len(prompt) or prompt[-1] != tags.think:
            raise ConfigError(f"prompt: must end in <think>, token id {tags.think}")
        caps = (limits.max_think_tokens, budget.think_tokens)
        cap = min(value for value in caps if value is not None)
        longest = len(prompt) + cap + limits.max_answer_tokens + _TAGS
        if longest > bundle.positions:
            raise ConfigError(
                f"prompt: {len(prompt)} tokens and at most {longest - len(prompt)} new ones are more than the "
                f"{bundle.positions} positions of the bundle; shorten it or lower its limits"
            )
        return Request(
            number=next(self._numbers),
            prompt=list(prompt),
            budget=budget,
            reasoning=Reasoning(tags, cap=cap, max_answer=limits.max_answer_tokens),
            told=_Told(
                (budget.compute, think_share(budget, reference)), (spend.units, spend.layers, spend.heads), spend.price
            ),
            sampler=Sampler(sampling),
            tau=limits.tau_threshold if bundle.gates["tokens"] else None,
            length=len(prompt),
        )

    def cancel(self, request: Request) -> None:
        """Writes no more of a request."""
        request.reasoning.stage = "done"
        if request in self._waiting:
            self._waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting) or not all(request.done for request in self._active)

    def step(self) -> None:
        """Admits what there is room for and decodes one token of every row."""
        self._retire()
        while self._waiting and len(self._active) < self.max_rows:
            self._admit(self._waiting.popleft())
        self._retire()
        if self._active:
            self._decode()

    def _admit(self, request: Request) -> None:
        """Prefills a request into the row behind the active ones."""
        row, length = len(self._active), len(request.prompt)
        self._caches.reserve(self.max_rows, length + request.reasoning.cap + request.reasoning.max_answer + _TAGS)
        self._decoder.bind(self._caches.view(row, 1))
        self._bound = -1
        outputs = self._decoder.step(
            np.array([request.prompt], dtype=np.int64), np.ones((1, length), dtype=np.int64), **self._told([request])
        )
        request.kept = tuple(outputs["kept_groups"][0].tolist())
        self._active.append(request)
        self._take(request, outputs, 0)

    def _decode(self) -> None:
        """One token of every row."""
        count = len(self._active)
        if self._bound != count:
            self._decoder.bind(self._caches.view(0, count))
            self._bound = count
        for request in self._active:
            request.length += 1
        lengths = np.array([request.length for request in self._active])
        mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
        fed = np.array([[request.written[-1]] for request in self._active], dtype=np.int64)
        outputs = self._decoder.step(fed, mask, **self._told(self._active))
        for row, request in enumerate(self._active):
            self._take(request, outputs, row)

    def _retire(self) -> None:
        """Rows that are done leave; the last row takes the place of each."""
        for row in reversed(range(len(self._active))):
            if self._active[row].done:
                last = self._active.pop()
                if row < len(self._active):
                    self._caches.move(len(self._active), row, last.length)
                    self._active[row] = last

    def _take(self, request: Request, outputs: Mapping[str, Array], row: int) -> None:
        """What the graph says becomes the token that is fed next."""
        logits = outputs["logits"][row, 0]
        if request.reasoning.begins_answer:
            logits = logits.copy()
            logits[self.tags.end_answer] = -np.inf
        stop = request.tau is not None and float(outputs["tau"][row]) > request.tau
        request.written.append(request.reasoning.advance(request.sampler.token(logits), stop))

    def _told(self, requests: Sequence[Request]) -> dict[str, Array]:
        """The decision inputs of some rows; -1 asks the gates."""
        layers = self.bundle.shape.num_layers
        return {
            "budget": np.array([request.told.features for request in requests], dtype=np.float32),
            "limits": np.array([request.told.limits for request in requests], dtype=np.int64),
            "price": np.array([request.told.price for request in requests], dtype=np.float32),
            "allocation": np.array([request.kept or (-1,) * layers for request in requests], dtype=np.int64),
        }
