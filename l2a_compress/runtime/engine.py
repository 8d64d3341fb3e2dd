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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle, GraphEntry
from l2a_compress.errors import BundleError, ConfigError, L2AError, OutOfMemoryError, SessionError
from l2a_compress.limits import Contract
from l2a_compress.reasoning import Reasoning, Tags
from l2a_compress.runtime.chooser import Chooser, Decoder, Serve, decision, widths_of
from l2a_compress.runtime.decoder import GraphDecoder, predicates, session_error
from l2a_compress.runtime.engine_lane import EngineLane, OpenEngine
from l2a_compress.runtime.lane import Lane
from l2a_compress.runtime.native import Native
from l2a_compress.runtime.pages import give_back
from l2a_compress.runtime.providers import Provider
from l2a_compress.runtime.request import TAGS, Limits, Request, Told
from l2a_compress.runtime.sampling import Sampler, Sampling
from l2a_compress.runtime.tensorrt import EngineDecoder

Array = np.ndarray[Any, np.dtype[Any]]
Runs = Literal["python", "native"]
LADDER = (1.0, 0.85, 0.7, 0.55, 0.4)  # of a bundle without variants
_SLOW = 0.1  # weight of the newest request in what requests have taken lately
_LOOK = 0.2  # seconds between two looks at the memory that is left for rows that run
_TRIES = 3  # of a run that fails for another reason than memory


@dataclass(frozen=True)
class StepTime:
    """What one step of the engine did: its largest budget, tokens of prompts, rows that were decoded, and seconds.

    Seconds are without those of loading a graph.
    """

    ended: float
    budget: float
    prompt_tokens: int
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What rows of one budget cost: seconds of a token of a prompt and of a step, layers, groups, bytes of a token."""

    prefill_seconds: float
    decode_seconds: float
    layers: int
    heads: int
    cache_bytes: int


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
        memory_left: Bytes that may still be taken, now; None where nobody knows.
        ended: The last requests that are done, the newest at the end.
        steps: What the last steps did.
        paused: Whether those that wait stay so.

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
        choices = (("serve", serve, Serve), ("engine", engine, Runs), ("contract", contract, Contract))
        for name, word, words in ((name, word, get_args(kind)) for name, word, kind in choices):
            if word not in words:
                raise ConfigError(f"{name} must be one of {', '.join(words)}, found {word!r}")
        self.folder, self.threads, self.clock = Path(folder), threads, clock
        self.bundle = bundle = Bundle.load(self.folder)
        self.max_rows = max_rows if open_engine is None else 1
        self.contract, self.serve, self._max_graphs = contract, serve, max_graphs
        self.provider, self.open_engine = provider, open_engine
        names = ("think", "end_think", "answer", "end_answer")
        think, end_think, answer, end_answer = (bundle.tags[name] for name in names)
        self.tags = Tags(think=think, end_think=end_think, answer=answer, end_answer=end_answer)
        self._chooser = Chooser(self.folder, bundle, contract=contract, serve=serve, decoder=self._decoder)
        budgets = {entry.budget for entry in bundle.variants if entry.budget is not None}
        self.ladder = tuple(
            budget for budget in sorted(budgets or LADDER, reverse=True) if self._chooser.serves(budget)
        )
        self.ended: deque[Request] = deque(maxlen=64)
        self.steps: deque[StepTime] = deque(maxlen=512)
        self.memory_left = memory_left or (lambda: None)
        self._lanes: dict[str, Lane | EngineLane] = {}
        self._waiting: deque[Request] = deque()
        self._late: deque[Request] = deque()  # that could not be in time any more
        self._service = 0.0  # seconds that requests have taken lately, from the first token to the last
        self._held: dict[int, dict[str, Array]] = {}  # keys and values of those that wait for another graph
        self._loading = 0.0  # seconds of the step
        self._looked = float("-inf")  # at the memory that is left
        self._full: int | None = None  # so many rows were too many
        self.paused = False
        self._numbers = itertools.count()
        self._whole = bundle.if_graph if open_engine is None else bundle.told_graph
        missing = (self._whole if serve == "if" else bundle.variants) or None
        dialect = "ort" if open_engine is None else "standard"
        if missing is None or bundle.dialect != dialect:
            option = {"if": "--if-graph", "variants": "--variants"}[serve]
            raise BundleError(
                f"{folder}: has no graphs of the dialect {dialect} to serve; export with {option} "
                + (f"--dialect {dialect}" if open_engine is None else "--target trt")
            )
        self.engine, self._native = engine, None
        if engine == "native":
            self._native = Native(self.folder, threads=threads, contract=contract)
            self._max_graphs = len(bundle.graphs)
        if serve == "if" and self._whole is not None:
            self._open(self._whole)

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
        self._waiting.extend(made)
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
        kept = None if request.kept is None else self._chooser.choose(request, budget, told)
        request.budget, request.told, request.reasoning.cap = budget, told, cap
        if kept is None or kept == request.kept:
            return
        before, request.kept = request.kept or (), kept
        lane = self._lane_of(request)
        grows = any(new > old for new, old in zip(kept, before, strict=True))
        if self.serve == "variants":
            if lane is not None:
                self._interrupt(lane, request, keep=not grows)
            elif grows:
                self._held.pop(request.number, None)
        elif grows and lane is not None and not self.bundle.whole_cache:
            self._interrupt(lane, request, keep=False)

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
            for queue in (self._waiting, self._late):
                if request in queue:
                    queue.remove(request)

    @property
    def rows(self) -> int:
        """How many requests run."""
        return sum(len(lane.requests) for lane in self._lanes.values())

    @property
    def running(self) -> list[Request]:
        """The requests that have a row and are not done."""
        return [request for lane in self._lanes.values() for request in lane.requests if not request.done]

    @property
    def waiting(self) -> Sequence[Request]:
        """The requests that wait for a row and can still be in time, the next one first."""
        return self._waiting

    @property
    def queued(self) -> Iterator[Request]:
        """All that wait for a row, in the order they get one."""
        return itertools.chain(self._waiting, self._late)

    @property
    def hopeless(self) -> Sequence[Request]:
        """The requests that cannot be done by their deadline any more; they run when no other waits."""
        return self._late

    @property
    def late(self) -> int:
        """How many cannot be done by their deadline any more."""
        return len(self._late)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._late or self.running)

    @property
    def graphs(self) -> list[str]:
        """Names of the graphs that are loaded."""
        return list(self._lanes)

    @property
    def loaded_budgets(self) -> set[float]:
        """The budgets of the ladder whose graphs are loaded: all, where one graph serves them or all share one copy."""
        if self.serve == "if" or self._native is not None:
            return set(self.ladder)
        return {lane.entry.budget for lane in self._lanes.values() if lane.entry.budget is not None}

    @property
    def runs_on(self) -> str:
        """What the graphs that are loaded run on, as it was found, for people."""
        return "; ".join(f"{name}: {lane.runs_on}" for name, lane in self._lanes.items()) or "nothing that is loaded"

    @property
    def resident_bytes(self) -> int:
        """Bytes of the host that keys and values have really taken; what is only reserved for them takes none."""
        kept = sum(part.nbytes for held in self._held.values() for part in held.values())
        return kept + sum(lane.resident_bytes for lane in self._lanes.values())

    def step(self) -> None:
        """Admits what there is room for and decodes one token of every row. No failure of a session leaves it.

        A request that fails for good is done, and its ``error`` says why.
        """
        began, self._loading = self.clock(), 0.0
        self._retire()
        prompt_tokens = self._admit_all()
        self._retire()
        self._squeeze()
        running = self.running
        for lane in list(self._lanes.values()):
            if lane.requests:
                self._decode(lane)
        if running:
            now, budget = self.clock(), max(request.budget.compute for request in running)
            self.steps.append(StepTime(now, budget, prompt_tokens, len(running), now - began - self._loading))
        if not self.busy:
            self._retire()
            self._free()
            if running:
                give_back()  # what prompts took

    def rehearse(self, budget: Budget, *, rows: int, prompt_tokens: int, new_tokens: int) -> Rehearsal:
        """Runs so many rows of made-up text and says what they cost.

        Raises:
            ConfigError: requests are running.
            SessionError: a graph cannot be loaded or run.
        """
        if self.busy:
            raise ConfigError("requests are running; measure before they come: `l2a bench`, or `Runtime.controller`")
        text = [1 + place % (self.bundle.shape.vocab_size - 1) for place in range(prompt_tokens - 1)]
        limits = Limits(max_think_tokens=new_tokens + 1, max_answer_tokens=1, tau_threshold=None)
        requests = self.submit([[*text, self.tags.think]] * rows, [budget] * rows, limits=limits)
        for request in requests:
            request.sampler = Endless(self.tags)
        began = self.clock()
        self._admit_all()
        admitted = self.clock()
        for _ in range(new_tokens):
            self.step()
        ended = self.clock()
        failed = next((request.error for request in requests if request.error is not None), None)
        lane, kept = self._lane_of(requests[0]), requests[0].kept or ()
        for request in requests:
            self.cancel(request)
        self._retire()
        self._free()
        self.steps.clear()
        if failed is not None or lane is None:
            raise failed or SessionError(f"{self.folder}: no row could run")
        return Rehearsal(
            prefill_seconds=(admitted - began) / (rows * prompt_tokens),
            decode_seconds=(ended - admitted) / new_tokens,
            layers=sum(1 for count in kept if count),
            heads=sum(kept),
            cache_bytes=lane.caches.token_bytes,
        )

    def close(self) -> None:
        """Ends all requests and frees graphs and caches."""
        for request in [*self._waiting, *self._late, *self.running]:
            self._end(request)
        self._waiting.clear()
        self._late.clear()
        self._lanes.clear()
        self._chooser.close()
        self._native = None
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

    # Graphs

    def _open(self, entry: GraphEntry) -> Lane | EngineLane | None:
        """The lane of a graph; None where other graphs are in use and no more may be loaded."""
        lane = self._lanes.pop(entry.name, None)
        if lane is None:
            idle = [name for name, other in self._lanes.items() if not other.requests]  # the oldest first
            for name in idle[: max(0, len(self._lanes) + 1 - self._max_graphs)]:
                del self._lanes[name]  # before the new graph is loaded: there may be no room for both
            if len(self._lanes) >= self._max_graphs:
                return None
            began = self.clock()
            decoder = self._decoder(entry)
            if isinstance(decoder, EngineDecoder):
                lane = EngineLane(decoder, entry)
            else:
                lane = Lane(self.folder / entry.file, entry, decoder)
            self._loading += self.clock() - began
        self._lanes[entry.name] = lane
        return lane

    def _decoder(self, entry: GraphEntry) -> Decoder:
        if self.open_engine is not None:
            return self.open_engine(self.folder, self.bundle, entry.name)
        if self._native is not None:
            return self._native.decoder(entry.name)
        return GraphDecoder(self.folder / entry.file, threads=self.threads, provider=self.provider)

    def _lane_of(self, request: Request) -> Lane | EngineLane | None:
        return next((lane for lane in self._lanes.values() if request in lane.requests), None)

    def _entry(self, request: Request) -> GraphEntry:
        """The graph that a request runs on."""
        if request.kept is None and (self.serve == "variants" or self.open_engine is not None):
            request.kept = self._chooser.choose(request, request.budget, request.told)
        if self.serve == "if" and self._whole is not None:
            return self._whole
        return next(entry for entry in self.bundle.variants if widths_of(entry) == request.kept)

    def _inputs(self, lane: Lane | EngineLane, requests: Sequence[Request]) -> dict[str, Array]:
        """What a graph reads beside tokens and mask; an allocation of -1 asks the gates."""
        if lane.entry.kind not in ("if", "told"):
            return {}
        layers, told = self.bundle.shape.num_layers, decision([request.told for request in requests])
        kept = np.array([request.kept or (-1,) * layers for request in requests], dtype=np.int64)
        if lane.entry.kind == "if":
            return {**told, "allocation": kept}
        runs = predicates(kept, self.bundle.gates["stem_layers"], self.bundle.widths)
        shown = {"budget": told["budget"]} if self.bundle.gates["tokens"] else {}
        return {**shown, "allocation": kept, **runs}

    # Requests

    def _admit_all(self) -> int:
        """Gives rows to those that wait. Returns how many tokens were computed for it."""
        tokens = 0
        while (
            (queue := self._queue())
            and not self.paused
            and self.rows < self.max_rows
            and (self._full is None or self.rows < self._full)
        ):
            self._full = None
            request = queue.popleft()
            try:
                admitted = self._admit(request)
            except (L2AError, MemoryError) as error:
                if (lane := self._lane_of(request)) is not None:
                    lane.remove(request)
                self._failed(request, self._ours(error))
                if not request.done:
                    queue.appendleft(request)
                continue
            if admitted is None:
                queue.appendleft(request)
                self._full = self.rows
                break
            tokens += admitted
        return tokens

    def _queue(self) -> deque[Request]:
        """Where the next one comes from. Who will be late gives way to those that can still be in time."""
        waiting, ends = self._waiting, self.clock() + self._service
        while waiting and waiting[0].started is None and (end := waiting[0].deadline) is not None and end <= ends:
            self._late.append(waiting.popleft())
            self._full = None  # what it waited for is nothing to the next one
        return waiting or self._late

    def _admit(self, request: Request) -> int | None:
        """Computes a request's tokens and says how many; None where it must wait for memory or for another graph."""
        lane = self._open(self._entry(request))
        if lane is None:
            return None
        self._free()  # what others needed does not count
        need, left = self._unwritten(lane, request) + self._scratch(lane, request), self.memory_left()
        if left is not None and need > left:
            if self.rows:
                return None
            raise OutOfMemoryError(
                f"request {request.number}: {need} bytes for its keys and values and to compute its prompt, of "
                f"which {left:g} are left; free some, shorten the prompt, or lower its limits"
            )
        least = len(lane.requests) + 1
        many = least if least <= lane.caches.rows else min(self.max_rows, 2 * least - 1)  # to grow seldom
        fits = left is None or lane.caches.growth(many, request.most_tokens) <= left
        lane.reserve(many if fits else least, request.most_tokens)
        held = self._held.get(request.number)
        if held is not None and isinstance(lane, Lane):
            lane.resume(request, self._held.pop(request.number))
            return 0
        outputs = lane.prefill(request, self._inputs(lane, [request]))
        if request.kept is None:
            request.kept = tuple(outputs["kept_groups"][0].tolist())
        self._chooser.remember(request, request.told, request.kept)
        if request.started is None:
            request.started = self.clock()
        self._take(request, outputs, 0)
        return request.length

    def _failed(self, request: Request, error: L2AError) -> None:
        """What becomes of the first that waits when it cannot run: it waits, is tried again, gets less, or ends."""
        short = isinstance(error, OutOfMemoryError)
        if short and self.rows:
            self._full = self.rows  # a row that ends makes room
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

    def _decode(self, lane: Lane | EngineLane) -> None:
        """One token of every row of a graph."""
        try:
            outputs = lane.decode(self._inputs(lane, lane.requests))
        except (SessionError, MemoryError) as error:
            self._stumbled(lane, self._ours(error))
            return
        lane.failures = 0
        for row, request in enumerate(lane.requests):
            if not request.done:
                self._take(request, outputs, row)

    def _free(self) -> None:
        """Graphs without rows give their caches back."""
        for lane in self._lanes.values():
            lane.free()

    def _unwritten(self, to: Lane | EngineLane | None = None, more: Request | None = None) -> int:
        """Bytes that keys and values of all rows may still take, and of one more in a lane."""
        return sum(lane.unwritten(more if lane is to else None) for lane in self._lanes.values())

    def _scratch(self, lane: Lane | EngineLane, request: Request) -> int:
        """Bytes that computing a request's tokens takes for a while: twice what one layer makes of them, at fp32.

        As measured, within a fifth from a thousand tokens on. Attention keeps no scores of all pairs of tokens.
        """
        if request.number in self._held or not isinstance(lane, Lane):
            return 0
        shape, tokens = self.bundle.shape, len(request.prompt) + len(request.written)
        return 2 * 4 * tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size)

    def _squeeze(self) -> None:
        """Interrupts the newest rows, where what all rows may still write does not fit any more."""
        if self.rows < 2 or self.clock() - self._looked < _LOOK:
            return
        self._looked, left = self.clock(), self.memory_left()
        while left is not None and len(self.running) > 1 and self._unwritten() > left:
            newest = max(self.running, key=lambda request: request.number)
            if (lane := self._lane_of(newest)) is not None:
                self._interrupt(lane, newest, keep=False)
            self._full = self.rows  # a row that ends makes room

    def _ours(self, error: L2AError | MemoryError) -> L2AError:
        """NumPy's lack of memory as one of ours."""
        return error if isinstance(error, L2AError) else session_error(self.folder, "run", error)

    def _stumbled(self, lane: Lane | EngineLane, error: L2AError) -> None:
        """A step that failed is run again: with a row less or a smaller budget where memory was short."""
        newest, short = max(lane.requests, key=lambda request: request.number), isinstance(error, OutOfMemoryError)
        if short and len(lane.requests) > 1:
            self._interrupt(lane, newest, keep=False)
            self._full = self.rows  # a row that ends makes room
            return
        lane.failures += 1
        if (short and self._lower(newest)) or (not short and lane.failures < _TRIES):
            return
        lane.failures = 0
        for request in lane.requests:
            self._end(request, error)

    def _interrupt(self, lane: Lane | EngineLane, request: Request, *, keep: bool) -> None:
        """Takes a request out of its row to the head of the queue, with its keys and values or without."""
        if keep and isinstance(lane, Lane):
            with suppress(MemoryError):  # without them it is computed again
                self._held[request.number] = lane.held(request)
        lane.remove(request)
        self._waiting.appendleft(request)

    def _end(self, request: Request, error: L2AError | None = None) -> None:
        forget: BaseException | None = error
        while forget is not None:  # its frames would keep graphs and caches alive for as long as the request is
            forget.__traceback__ = None
            forget = forget.__cause__ or forget.__context__
        request.reasoning.stage, request.error, request.ended = "done", error, self.clock()
        self._held.pop(request.number, None)

    def _retire(self) -> None:
        """Rows that are done leave."""
        for lane in self._lanes.values():
            for request in [request for request in lane.requests if request.done]:
                lane.remove(request)
        if not self.rows:
            self._full = None

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
            self.ended.append(request)
            if request.started is not None and request.ended is not None:
                self._service += _SLOW * (request.ended - request.started - self._service)


class Endless(Sampler):
    """Takes the most likely token that is no tag."""

    def __init__(self, tags: Tags) -> None:
        super().__init__(Sampling())
        self._tags = [tags.think, tags.end_think, tags.answer, tags.end_answer]

    def token(self, logits: Array) -> int:
        """One token from ``logits`` [vocabulary]."""
        logits = logits.copy()
        logits[self._tags] = -np.inf
        return super().token(logits)
