"""A bundle that answers: text in, text out, at any budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from l2a_compress.budget import Budget
from l2a_compress.errors import BundleError, ConfigError, L2AError
from l2a_compress.limits import Contract
from l2a_compress.runtime.chooser import Serve
from l2a_compress.runtime.controller import Controller
from l2a_compress.runtime.costs import cost_table
from l2a_compress.runtime.engine import Engine, Runs
from l2a_compress.runtime.engine_lane import OpenEngine
from l2a_compress.runtime.policy import Policy
from l2a_compress.runtime.providers import Provider
from l2a_compress.runtime.request import Limits, Request
from l2a_compress.runtime.sampling import Sampling
from l2a_compress.runtime.signals import Reading, Source, machine

log = logging.getLogger(__name__)
TOKENIZER_FILE = "tokenizer.json"
_IDLE = 0.001  # seconds
Asked = Budget | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one prompt got.

    Attributes:
        think: The reasoning.
        answer: The answer.
        think_tokens: Tokens of the reasoning, without tags.
        answer_tokens: Tokens of the answer, without tags.
        finished: Whether the text ended by itself: by the model, a limit or a stop text. Else the request was
            cancelled, or the server closed, and this is as far as it came.
        stopped_by: Why reasoning ended: ``model``, ``cap`` or ``tau``.
        budget: What it might spend when it ended.
        layers: How many layers ran at the end.
        heads: KV groups that ran at the end, summed over the layers.
        cost: Share of the dense layers' compute that ran at the end.
    """

    think: str
    answer: str
    think_tokens: int
    answer_tokens: int
    finished: bool
    stopped_by: str
    budget: Budget
    layers: int
    heads: int
    cost: float


class Runtime:
    """An open bundle. One thread at a time may call it; :class:`~l2a_compress.runtime.server.Server` serves many.

    A budget is a :class:`~l2a_compress.budget.Budget`, None for all that the model has, or ``"auto"``: what the
    selector finds right for the machine, now and while the text is written.
    """

    def __init__(self, engine: Engine, *, policy: Policy | None = None, sources: Sequence[Source] = ()) -> None:
        self.engine, self.policy, self.sources = engine, policy or Policy(), tuple(sources)
        path = engine.folder / TOKENIZER_FILE
        if TOKENIZER_FILE not in engine.bundle.files:
            raise BundleError(f"{path}: the bundle has no tokenizer; export it again")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more precise
            raise BundleError(f"{path}: not a tokenizer ({error}); export it again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # What a tokenizer puts in front of every text, where it does; a tag that is written in a text is not a tag.
        self._begin = self.tokenizer.encode("").ids[:1]
        self.tokenizer.encode_special_tokens = True
        self._controller: Controller | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        max_rows: int = 8,
        threads: int | None = None,
        contract: Contract = "cap",
        serve: Serve = "if",
        max_graphs: int = 1,
        engine: Runs = "python",
        policy: Policy | None = None,
        sources: Sequence[Source] | None = None,
        provider: Provider = "cpu",
        open_engine: OpenEngine | None = None,
    ) -> Runtime:
        """Opens a bundle and verifies every file of it.

        Args:
            folder: the bundle.
            max_rows: most prompts that run at a time.
            threads: of one operator; None leaves it to onnxruntime.
            contract: under which the gates allocate.
            serve: ``if``: one graph for every budget; ``variants``: a static graph for each budget of the ladder.
            max_graphs: most variants that are loaded at a time.
            engine: ``native``: the C++ runtime runs the graphs, all over one copy of the weights (docs/cpp.md).
            policy: of the selector; None for the default one.
            sources: of signals; None for those of this machine, of its GPU too where that is what serves.
            provider: what onnxruntime runs graphs on: ``cpu``, ``cuda``, ``trt`` or ``trt-rtx``.
            open_engine: opens an engine of TensorRT by its graph's name, as
                ``partial(EngineDecoder, target="trt")``; prompts then run on engines, one at a time.

        Raises:
            EngineError: an engine is not built, or not for what is here; says how to build it.
            BundleError: the folder is not a whole bundle, or has not the graphs to serve it so.
            SessionError: onnxruntime cannot load the graph.
            ConfigError: a bad argument, or the C++ runtime is not there.
        """
        policy = policy or Policy()
        found = machine(gpu=provider != "cpu" or open_engine is not None) if sources is None else sources
        made = Engine(
            folder,
            max_rows=max_rows,
            threads=threads,
            contract=contract,
            serve=serve,
            max_graphs=max_graphs,
            engine=engine,
            memory_left=partial(_memory_left, found, policy),
            provider=provider,
            open_engine=open_engine,
        )
        return cls(made, policy=policy, sources=found)

    @property
    def controller(self) -> Controller:
        """What steers requests whose budget is ``"auto"``. The first use measures what budgets cost on this machine."""
        if self.engine.open_engine is not None:
            raise ConfigError("budget auto: what engines cost is not measured yet; give a budget")
        if self._controller is None:
            table = cost_table(self.engine, progress=log.warning)
            self._controller = Controller(self.engine, table, self.policy, self.sources)
        return self._controller

    def encode(self, text: str) -> list[int]:
        """A prompt as the model was trained on it: token ids, ending in ``<think>``.

        Raises:
            ConfigError: the text has a tag in it, and the tokenizer cannot read it as ordinary characters; or it is no
                text.
        """
        try:
            ids, tags = self.tokenizer.encode(text, add_special_tokens=False).ids, self.engine.tags
        except TypeError as error:  # half of a surrogate pair
            raise ConfigError(f"prompt {text[:40]!r}: is no text ({error})") from error
        if {tags.think, tags.end_think, tags.answer, tags.end_answer} & set(ids):
            raise ConfigError(f"prompt {text[:40]!r}: has a think or answer tag in it; leave it out")
        return [*self._begin, *ids, tags.think]

    def submit(
        self,
        prompts: Sequence[str | Sequence[int]],
        budgets: Sequence[Asked],
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tier: str = "default",
        seconds: float | None = None,
    ) -> list[Request]:
        """Queues prompts for :meth:`step`: all of them, or none. Arguments and errors are those of :meth:`generate`."""
        limits = limits or Limits()
        if isinstance(prompts, str):
            raise ConfigError("prompts must be a list of texts, found one text; put it into a list")
        self.policy.tier(tier)
        if len(budgets) != len(prompts):
            raise ConfigError(f"{len(budgets)} budgets for {len(prompts)} prompts; give one, or one for each")
        steered = [_steered(budget) for budget in budgets]
        controller = self.controller if any(steered) else None  # may measure, which needs an idle engine
        requests = self.engine.submit(
            [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
            [budget if isinstance(budget, Budget) else None for budget in budgets],
            limits=limits,
            sampling=sampling,
            tiers=[tier if auto else None for auto in steered],
            seconds=seconds,
            stops=self._stops if limits.stop else None,
        )
        if controller is not None:
            for request in requests:
                controller.apply(request)
        return requests

    def set_budget(self, request: Request, budget: Asked, *, tier: str = "default") -> None:
        """Changes what a request may spend from its next token on. Where that fails all stays as it was.

        Raises:
            BudgetError: the model cannot keep to the budget.
            ConfigError: the policy has no such tier, or the text could become longer than the bundle has positions.
            SessionError: the gates cannot be asked.
        """
        steered = _steered(budget)
        ceiling = budget if isinstance(budget, Budget) else Budget()
        if not request.done:
            self.engine.check(request, ceiling)  # what the selector will ever give is within it
        before = request.ceiling, request.tier
        request.ceiling, request.tier = ceiling, tier if steered else None
        try:
            if steered:
                self.controller.enforce(request)
            else:
                self.engine.set_budget(request, ceiling)
        except L2AError:
            request.ceiling, request.tier = before
            raise

    def step(self) -> None:
        """Decides, if it is time to, and writes one token of every request that runs."""
        if self._controller is not None:
            self._controller.update()
        self.engine.step()
        if not self.engine.rows:
            time.sleep(_IDLE)  # those that wait, wait for memory

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        budget: Asked | Sequence[Asked] = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tier: str = "default",
        seconds: float | None = None,
    ) -> list[Answer]:
        """Answers all prompts together.

        Args:
            prompts: texts, or token ids that end in ``<think>``.
            budget: one for all, or one for each.
            limits: of their length.
            sampling: None for greedy. Each prompt draws as if it were alone.
            tier: of the policy, for budgets that are ``"auto"``.
            seconds: from now on, within which an answer should be there; the selector plans with it.

        Raises:
            BudgetError: the model cannot keep to a budget.
            ConfigError: a prompt that is too long, or another bad argument; nothing has been generated then.
            SessionError: a request could not be finished, after all that could be tried; the others are ended too.
        """
        one = budget is None or isinstance(budget, Budget | str)
        if not one and not isinstance(budget, Sequence):
            raise ConfigError(f"budget must be a Budget, 'auto', None, or a list of them, found {budget!r}")
        budgets: list[Any] = [budget] * len(prompts) if one else list(budget)  # type: ignore[arg-type]
        requests = self.submit(prompts, budgets, limits=limits, sampling=sampling, tier=tier, seconds=seconds)
        try:
            while not all(request.done for request in requests):
                self.step()
        finally:
            for request in requests:  # where a step was interrupted
                self.engine.cancel(request)
        return [self.answer(request) for request in requests]

    def stream(
        self,
        prompt: str | Sequence[int],
        budget: Asked = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tier: str = "default",
        seconds: float | None = None,
    ) -> Iterator[str | Answer]:
        """Pieces of text as they are written, tags included, and the answer as the last item; as :meth:`generate`."""
        (request,) = self.submit([prompt], [budget], limits=limits, sampling=sampling, tier=tier, seconds=seconds)
        pieces = self._pieces(request)
        next(pieces)  # from here on the request ends with the iterator, be it ever asked or not
        return pieces

    def _pieces(self, request: Request) -> Iterator[str | Answer]:
        told = ""
        try:
            yield told
            while not request.done:
                self.step()
                text = self.text(request)
                if len(text) > len(told):
                    yield text[len(told) :]
                    told = text
            yield self.answer(request)
        finally:
            self.engine.cancel(request)  # where the caller does not listen any more

    def text(self, request: Request) -> str:
        """What a request has written so far, tags included, without what may still change or be cut."""
        text = self.tokenizer.decode(request.written, skip_special_tokens=False)
        stop, tag = request.limits.stop, self.tokenizer.id_to_token(self.engine.tags.answer)
        head, found, answer = text.rpartition(str(tag))
        if found and stop:
            text = head + found + _before(answer, stop, whole=request.done)
        return text if request.done else text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character

    def answer(self, request: Request) -> Answer:
        """What a request that is done has written.

        Raises:
            L2AError: why it could not be finished.
        """
        if request.error is not None:
            raise request.error
        bundle, reasoning = self.engine.bundle, request.reasoning
        ran = request.allocation(bundle.shape.num_groups)
        answer = self.tokenizer.decode(reasoning.answer)
        return Answer(
            think=self.tokenizer.decode(reasoning.think).strip(),
            answer=_before(answer, request.limits.stop, whole=True).strip(),
            think_tokens=len(reasoning.think),
            answer_tokens=len(reasoning.answer),
            finished=request.finished,
            stopped_by=reasoning.stopped_by,
            budget=request.budget,
            layers=0 if ran is None else len(ran.layers),
            heads=0 if ran is None else ran.num_kept_groups,
            cost=0.0 if ran is None else bundle.cost.fraction(ran),
        )

    def _stops(self, request: Request) -> bool:
        """Whether the answer holds one of the texts that end it."""
        text = self.tokenizer.decode(request.reasoning.answer)
        return any(stop in text for stop in request.limits.stop)


def _steered(budget: Asked) -> bool:
    """Whether a budget is the selector's to find."""
    if not (budget is None or budget == "auto" or isinstance(budget, Budget)):
        raise ConfigError(f'budget must be a Budget, None or "auto", found {budget!r}')
    return budget == "auto"


def _before(text: str, stops: Sequence[str], *, whole: bool) -> str:
    """The part before the first of some texts; of a text that grows, without an end that one of them may begin with."""
    end = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
    if end == len(text) and not whole:
        begun = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        end -= max(begun, default=0)
    return text[:end]


def _memory_left(sources: Sequence[Source], policy: Policy) -> float | None:
    """Bytes that may still be taken, as far as somebody knows."""
    readings: dict[str, Reading] = {}
    for source in sources:
        if not set(policy.memories).isdisjoint(source.units):
            readings |= source.read()
    values = [readings[name].value for name in policy.memories if name in readings]
    known = [value for value in values if value is not None]
    return max(0.0, min(known) - policy.memory_reserve_bytes) if known else None
