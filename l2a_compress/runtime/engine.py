"""Continuous batching over a bundle: requests of any budget and length come and go between steps.

    waiting --prefill, one by one, into a free row of the caches--> running --decode, all rows together--> done
       ^                                                               |
       +---- memory is short, or the new budget needs other caches ----+

A row's computation does not depend on the others, so neither does its text. By default all run on the ``If`` graph.
Served by variants, each request runs on the static graph of its budget, and only graphs that have rows are loaded.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import ConfigError, L2AError, OutOfMemoryError, SessionError
from l2a_compress.limits import Contract
from l2a_compress.reasoning import Reasoning, Tags
from l2a_compress.runtime.chooser import Chooser, Serve
from l2a_compress.runtime.decoder import session_error
from l2a_compress.runtime.engine_lane import EngineLane, OpenEngine
from l2a_compress.runtime.lane import Lane
from l2a_compress.runtime.lanes import Lanes
from l2a_compress.runtime.native import Native
from l2a_compress.runtime.pages import give_back
from l2a_compress.runtime.providers import Provider
from l2a_compress.runtime.request import TAGS, Limits, Request, Told
from l2a_compress.runtime.sampling import Sampler, Sampling
from l2a_compress.runtime.scheduler import Scheduler

Array = np.ndarray[Any, np.dtype[Any]]
Runs = Literal["python", "native"]
LADDER = (1.0, 0.85, 0.7, 0.55, 0.4)  # of a bundle without variants
_TRIES = 3  # of a run that fails for another reason than memory


@dataclass(frozen=True)
class StepTime:
    """What one step of the engine did.

    Attributes:
        ended: Seconds of the engine's clock.
        budget: The largest of its rows.
        prompt_tokens: That were computed to give requests rows.
        prompt_seconds: That it took, loading of graphs among them.
        rows: That were decoded.
        context: Tokens that they have in the caches, all together.
        seconds: That decoding them took, without drawing tokens from what the model says.
    """

    ended: float
    budget: float
    prompt_tokens: int
    prompt_seconds: float
    rows: int
    context: int
    seconds: float


class Engine:
    """Runs requests together. One thread at a time may call it.

    Args:
        folder: the bundle.
        max_rows: most requests at a time; others wait.
        threads: of one operator; None leaves it to onnxruntime.
        contract: under which the gates allocate.
        serve: ``if``: one graph for every budget; ``variants``: a static graph for each budget of the ladder, whose
            dropped layers take no memory.
        max_graphs: most variants that are loaded at a time; a request whose variant is not waits until one is free.
        engine: ``python``: a session of onnxruntime for each graph that is loaded; ``native``: the C++ runtime, which
            has all graphs loaded over one copy of the weights, whatever ``max_graphs`` says.
        memory_left: Bytes that may still be taken; None, or a None from it, where nobody knows.
        provider: what onnxruntime runs graphs on.
        open_engine: opens an engine of TensorRT by its graph's name; then requests run on engines, one at a time.
        clock: in seconds.

    Attributes:
        ladder: Budgets to choose from, falling.
        ended: The last requests that are done, the newest at the end.
        steps: What the last steps did.
        paused: Whether those that have not begun wait.
        lanes: The graphs that are loaded, and the requests that run on each.

    Raises:
        BundleError: the folder is not a whole bundle, or has not the graphs to serve it so.
        SessionError: onnxruntime cannot load the ``If`` graph.
        ConfigError: a bad argument, or the C++ runtime is not there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_rows: int = 8,
        threads: int | None = None,
        contract: Contract = "cap",
        serve: Serve = "if",
        max_graphs: int = 1,
        engine: Runs = "python",
        memory_left: Callable[[], float | None] | None = None,
        provider: Provider = "cpu",
        open_engine: OpenEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_graphs", max_graphs)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value!r}")
        if threads is not None and threads < 0:
            raise ConfigError(f"threads must be at least 0 (onnxruntime's choice), found {threads!r}")
        choices = (("serve", serve, Serve), ("engine", engine, Runs), ("contract", contract, Contract))
        for name, word, words in ((name, word, get_args(kind)) for name, word, kind in choices):
            if word not in words:
                raise ConfigError(f"{name} must be one of {', '.join(words)}, found {word!r}")
        self.folder, self.threads, self.clock = Path(folder), threads, clock
        self.bundle = bundle = Bundle.load(self.folder)
        self.max_rows = max_rows if open_engine is None else 1
        self.contract, self.serve, self.engine = contract, serve, engine
        self.provider, self.open_engine = provider, open_engine
        names = ("think", "end_think", "answer", "end_answer")
        think, end_think, answer, end_answer = (bundle.tags[name] for name in names)
        self.tags = Tags(think=think, end_think=end_think, answer=answer, end_answer=end_answer)
        native = Native(self.folder, threads=threads, contract=contract) if engine == "native" else None
        self.lanes = Lanes(self.folder, bundle, serve, max_graphs, threads, provider, native, open_engine)
        self._chooser = Chooser(self.folder, bundle, contract=contract, serve=serve, decoder=self.lanes.decoder)
        budgets = {entry.budget for entry in bundle.variants if entry.budget is not None}
        self.ladder = tuple(
            budget for budget in sorted(budgets or LADDER, reverse=True) if self._chooser.serves(budget)
        )
        self.ended: deque[Request] = deque(maxlen=64)
        self.steps: deque[StepTime] = deque(maxlen=512)
        self.paused = False
        self._decoding = 0.0  # seconds of the step that runs
        self._numbers = itertools.count()
        self._scheduler = Scheduler(self.lanes, memory_left=memory_left or (lambda: None), clock=clock)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: Sequence[Budget | None],
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tiers: Sequence[str | None] | None = None,
        seconds: float | None = None,
        stops: Callable[[Request], bool] | None = None,
    ) -> list[Request]:
        """Queues requests: all of them, or none.

        Args:
            prompts: token ids, each ending in ``<think>``.
            budgets: one for each; None for all that the model has.
            limits: of their length, beside each budget's own cap.
            sampling: None for greedy. Each request draws as if it were alone.
            tiers: one for each, under which a selector may lower its budget; None: it stays.
            seconds: from now on, within which they should be done; None for any time.
            stops: asked after each token whether the request ends there.

        Raises:
            BudgetError: the model cannot keep to a budget.
            ConfigError: an id that is not in the vocabulary, a prompt that does not end in ``<think>``, or one that
                leaves no room for the longest text allowed.
        """
        limits, sampling = limits or Limits(), sampling or Sampling()
        if seconds is not None and not seconds > 0:
            raise ConfigError(f"seconds must be above 0, found {seconds!r}")
        made = []
        for prompt, asked, tier in zip(prompts, budgets, tiers or [None] * len(prompts), strict=True):
            budget, now = asked or Budget(), self.clock()
            told = self._chooser.told(budget)
            self._check(prompt, limits.cap(budget) + limits.max_answer_tokens + TAGS)
            made.append(
                Request(
                    number=next(self._numbers),
                    prompt=list(prompt),
                    ceiling=budget,
                    budget=budget,
                    limits=limits,
                    tier=tier,
                    deadline=None if seconds is None else now + seconds,
                    reasoning=Reasoning(self.tags, cap=limits.cap(budget), max_answer=limits.max_answer_tokens),
                    submitted=now,
                    told=told,
                    sampler=Sampler(sampling),
                    tau=limits.tau_threshold if self.bundle.gates["tokens"] else None,
                    stops=stops,
                )
            )
        self._scheduler.waiting.extend(made)
        return made

    def set_budget(self, request: Request, budget: Budget) -> None:
        """Changes what a request may spend from its next token on; tokens that are written stay.

        Keys and values that the new budget needs and the old one did not compute are computed again from the tokens.

        Raises:
            BudgetError: the model cannot keep to the budget; the old one stays.
            ConfigError: its cap on reasoning leaves more tokens than the bundle has positions; the old one stays.
            SessionError: the gates cannot be asked; the old one stays.
        """
        if request.done:
            return
        told, cap = self.check(request, budget), request.limits.cap(budget)
        runs = self.lanes.of(request) is not None
        if not runs:
            self._scheduler.changed()
        kept = None if request.kept is None else self._chooser.choose(request, budget, told)
        request.budget, request.told, request.reasoning.cap = budget, told, cap
        if kept is None or kept == request.kept:
            return
        before, request.kept = request.kept or (), kept
        grows = any(new > old for new, old in zip(kept, before, strict=True))
        variants = self.serve == "variants"
        if runs and (variants or (grows and not self.bundle.whole_cache)):
            self._scheduler.preempt(request, keep=variants and not grows)
        elif grows:
            self._scheduler.held.pop(request.number, None)

    def check(self, request: Request, budget: Budget) -> Told:
        """The budget as the inputs of a graph, if the request can have it.

        Raises:
            BudgetError: the model cannot keep to the budget.
            ConfigError: its cap on reasoning leaves more tokens than the bundle has positions.
        """
        self._check(request.prompt, request.limits.cap(budget) + request.limits.max_answer_tokens + TAGS)
        return self._chooser.told(budget)

    def cancel(self, request: Request, error: L2AError | None = None) -> None:
        """Writes no more of a request; ``error`` says why."""
        if not request.done:
            self._end(request, error)
            for queue in (self._scheduler.waiting, self._scheduler.late):
                if request in queue:
                    queue.remove(request)
                    self._scheduler.changed()
            if not self.busy:  # no step would follow
                self._rest()

    def memory_left(self) -> float | None:
        """Bytes that may still be taken, now; None where nobody knows."""
        return self._scheduler.memory_left()

    @property
    def rows(self) -> int:
        """How many requests run."""
        return self.lanes.rows

    @property
    def running(self) -> list[Request]:
        """The requests that have a row and are not done."""
        return self.lanes.running

    @property
    def waiting(self) -> Sequence[Request]:
        """The requests that wait for a row and can still be in time, the next one first."""
        return self._scheduler.waiting

    @property
    def queued(self) -> Iterator[Request]:
        """All that wait for a row, in the order they get one."""
        return itertools.chain(self._scheduler.waiting, self._scheduler.late)

    @property
    def hopeless(self) -> Sequence[Request]:
        """The requests that cannot be done by their deadline any more; they run when no other waits."""
        return self._scheduler.late

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.hopeless or self.running)

    @property
    def graphs(self) -> list[str]:
        """Names of the graphs that are loaded."""
        return [lane.entry.name for lane in self.lanes]

    @property
    def loaded_budgets(self) -> set[float]:
        """The budgets of the ladder whose graphs are loaded: all, where one graph serves them or all share one copy."""
        if self.serve == "if" or self.engine == "native":
            return set(self.ladder)
        return {lane.entry.budget for lane in self.lanes if lane.entry.budget is not None}

    @property
    def runs_on(self) -> str:
        """What the graphs that are loaded run on, as it was found, for people."""
        return "; ".join(f"{lane.entry.name}: {lane.runs_on}" for lane in self.lanes) or "nothing that is loaded"

    @property
    def resident_bytes(self) -> int:
        """Bytes of the host that keys and values have taken; pages that nothing was written to take none."""
        kept = sum(part.nbytes for held in self._scheduler.held.values() for part in held.values())
        return kept + sum(lane.resident_bytes for lane in self.lanes)

    def step(self) -> None:
        """Admits what there is room for and decodes one token of every row. No failure of a session leaves it.

        A request that fails for good is done, and its ``error`` says why.
        """
        began = self.clock()
        self._scheduler.retire()
        prompt_tokens = self._admit_all()
        self._scheduler.retire()
        self.lanes.free()
        self._scheduler.squeeze()
        admitted, decoded, self._decoding = self.clock(), list[Request](), 0.0
        for lane in list(self.lanes):
            if lane.requests and self._scheduler.grow(lane):
                decoded += lane.requests
                self._decode(lane, lane.requests)
                self._scheduler.retire()  # before the next one: who is asked whether a text stops may cancel others
        if decoded:
            now, budget = self.clock(), max(request.budget.compute for request in decoded)
            rows, context = len(decoded), sum(request.length for request in decoded)
            self.steps.append(StepTime(now, budget, prompt_tokens, admitted - began, rows, context, self._decoding))
        if not self.busy:
            self._rest(worked=bool(prompt_tokens or decoded))

    def close(self) -> None:
        """Ends all requests and frees graphs and caches."""
        for request in [*self.queued, *self.running]:
            self._end(request)
        self._scheduler.waiting.clear()
        self._scheduler.late.clear()
        self.lanes.clear()
        self._chooser.close()
        give_back()

    def _check(self, prompt: Sequence[int], new_tokens: int) -> None:
        bundle, think = self.bundle, self.tags.think
        wrong = [token for token in prompt if not 0 <= token < bundle.shape.vocab_size]
        if wrong:
            raise ConfigError(f"prompt: token id {wrong[0]} is not in the vocabulary of {bundle.shape.vocab_size}")
        if not len(prompt) or prompt[-1] != think:
            raise ConfigError(f"prompt: must end in <think>, token id {think}")
        if len(prompt) + new_tokens > bundle.positions:
            raise ConfigError(
                f"prompt: {len(prompt)} tokens and at most {new_tokens} new ones are more than the {bundle.positions} "
                "positions of the bundle; shorten it or lower its limits"
            )

    # Requests

    def _admit_all(self) -> int:
        """Gives rows to those that wait. Returns how many tokens were computed for it."""
        tokens = 0
        while (queue := self._scheduler.queue()) and self.rows < self.max_rows:
            if self.paused and queue[0].started is None:
                break
            request = queue.popleft()
            try:
                admitted = self._admit(request)
            except (L2AError, MemoryError) as error:
                if (lane := self.lanes.of(request)) is not None:
                    lane.remove(request)
                self._failed(request, self._ours(error))
                if not request.done:
                    queue.appendleft(request)
                continue
            if admitted is None:
                queue.appendleft(request)
                self._scheduler.crowded()
                break
            tokens += admitted
        return tokens

    def _admit(self, request: Request) -> int | None:
        """Computes a request's tokens and says how many; None where it must wait for memory or for another graph."""
        if request.kept is None and (self.serve == "variants" or self.open_engine is not None):
            request.kept = self._chooser.choose(request, request.budget, request.told)
        lane = self.lanes.open(self.lanes.graph(request.kept))
        if lane is None or not self._scheduler.reserve(lane, request, self.max_rows):
            return None
        held = self._scheduler.held
        if request.number in held and isinstance(lane, Lane):
            lane.resume(request, held.pop(request.number))
            return 0
        outputs = lane.prefill(request, self.lanes.inputs(lane, [request]))
        if request.kept is None:
            request.kept = tuple(outputs["kept_groups"][0].tolist())
        self._chooser.remember(request, request.told, request.kept)
        if request.started is None:
            request.started = self.clock()
        request.failures = 0
        self._take(request, outputs, 0)
        return request.length

    def _failed(self, request: Request, error: L2AError) -> None:
        """What becomes of the first that waits when it cannot run: it waits, is tried again, gets less, or ends."""
        short = isinstance(error, OutOfMemoryError)
        if short and self.rows:
            self._scheduler.crowded()
            return
        if short and self._scheduler.held:  # they are computed again
            self._scheduler.held.clear()
            return
        request.failures += 1
        if isinstance(error, SessionError) and not short and request.failures < _TRIES:
            return
        if isinstance(error, SessionError) and (short or self.serve == "variants") and self._lower(request):
            request.failures = 0
        else:
            self._end(request, error)

    def _lower(self, request: Request) -> bool:
        """Moves a request to the next smaller budget, which it does not leave any more. False where there is none."""
        for compute in self.ladder:
            if compute < request.budget.compute:
                lower = Budget(compute=compute)
                try:
                    self.set_budget(request, request.budget.tighter(lower))
                except L2AError:
                    continue
                request.ceiling = request.ceiling.tighter(lower)
                return True
        return False

    def _decode(self, lane: Lane | EngineLane, requests: list[Request]) -> bool:
        """One token of some rows of a graph. False where rows have moved."""
        began = self.clock()
        try:
            outputs = lane.decode(requests, self.lanes.inputs(lane, requests))
        except (SessionError, MemoryError) as error:
            failure = self._ours(error)
        else:
            self._decoding += self.clock() - began  # drawing tokens from it is no work of the model
            for row, request in enumerate(requests):
                request.failures = 0
                if not request.done:
                    self._take(request, outputs, row)
            return True
        try:  # here, for what it runs fails in no context of this failure
            return self._stumbled(lane, requests, failure)
        finally:
            del failure  # whose traceback has this frame, and with it the graph

    def _ours(self, error: L2AError | MemoryError) -> L2AError:
        """NumPy's lack of memory as one of ours."""
        return error if isinstance(error, L2AError) else session_error(self.folder, "run", error)

    def _stumbled(self, lane: Lane | EngineLane, requests: list[Request], error: L2AError) -> bool:
        """A step that failed is run again: with a row less or a smaller budget where memory was short.

        In the end each row is run alone, and those that fail so end. False where rows have moved.
        """
        newest, short = max(requests, key=lambda request: request.number), isinstance(error, OutOfMemoryError)
        if short:
            if self.rows > 1:
                self._scheduler.preempt(newest, keep=False)
                self._scheduler.crowded()
            elif not self._lower(newest):
                self._end(newest, error)
            return False
        for request in requests:
            request.failures += 1
        if max(request.failures for request in requests) < _TRIES:
            return True
        if len(requests) > 1:
            return all(request.done or self._decode(lane, [request]) for request in list(requests))
        self._end(newest, error)
        return True

    def _rest(self, *, worked: bool = False) -> None:
        """Nobody waits or runs: rows and caches end, and what prompts took goes back, where there is anything."""
        worked = worked or self.rows > 0
        self._scheduler.retire()
        self.lanes.free()
        if worked:
            give_back()

    def _end(self, request: Request, error: L2AError | None = None) -> None:
        forget: BaseException | None = error
        while forget is not None:  # its frames would keep graphs and caches alive for as long as the request is
            forget.__traceback__ = None
            forget = forget.__cause__ or forget.__context__
        request.reasoning.stage, request.error, request.ended = "done", error, self.clock()
        self._scheduler.held.pop(request.number, None)

    def _take(self, request: Request, outputs: Mapping[str, Array], row: int) -> None:
        """What the graph says becomes the token that is fed next."""
        stop = request.tau is not None and "tau" in outputs and float(outputs["tau"][row]) > request.tau
        try:
            logits = outputs["logits"][row, 0]
            if request.reasoning.begins_answer:
                logits = logits.copy()
                logits[self.tags.end_answer] = -np.inf
            token = request.sampler.token(logits)
        except (SessionError, MemoryError) as error:  # its row has moved on: it cannot be run again
            self._end(request, self._ours(error))
            return
        request.written.append(request.reasoning.advance(token, stop))
        if request.done or (request.stops is not None and request.stops(request)):
            self._end(request)
            request.finished = True
            self.ended.append(request)
            if request.started is not None and request.ended is not None:
                self._scheduler.ended(request.ended - request.started)
