"""What an engine does when its budget, its memory or its sessions change under it, and who steers it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l2a_compress._cli import main
from l2a_compress._machine import held_bytes, peak_bytes, peak_of, processor
from l2a_compress.budget import Budget
from l2a_compress.bundle import describe_bundle
from l2a_compress.errors import BudgetError, BundleError, ConfigError, OutOfMemoryError, SessionError
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.reasoning import Reasoning
from l2a_compress.runtime import Answer, Limits, Policy, Runtime, Sampling, Server, Tier
from l2a_compress.runtime.chooser import widths_of
from l2a_compress.runtime.costs import CostTable, cached_path, cost_table, keep, measure
from l2a_compress.runtime.decoder import GraphDecoder, session_error
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.request import Request
from l2a_compress.runtime.sampling import Sampler
from l2a_compress.runtime.server import Stream
from toy_models import new_artifact
from toy_runtime import LIMITS, Clock, Told, finish, table, texts

ROOT = Path(__file__).parents[2]
TEXT = "Ann has 3 apples."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an ``If`` graph and variants, that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    export(new_artifact(folder), folder / "bundle", ExportOptions(budgets=(1.0, 0.7, 0.45), calibration=4))
    return folder / "bundle"


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ``If`` graph writes no keys and values of layers that it skips."""
    folder = tmp_path_factory.mktemp("lean")
    export(new_artifact(folder), folder / "bundle", ExportOptions(budgets=(), whole_cache=False))
    return folder / "bundle"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "cache"))


def test_no_thread_spins_behind_a_run(made: Path) -> None:
    decoder = GraphDecoder(made / "b1.onnx", threads=2)
    decoder.start(4, 300)
    ids = np.full((4, 256), 5)
    spent = []
    for _ in range(5):
        decoder.step(ids, np.ones_like(ids))
        began = time.process_time()
        time.sleep(0.01)
        spent.append(time.process_time() - began)
    assert min(spent) < 2e-3


def alone(
    folder: Path, prompt: list[int], kept_at: Callable[[int], Budget], engine: Engine, limits: Limits = LIMITS
) -> list[int]:
    """Greedy text of one prompt by the ``If`` graph itself, under the budget of each token."""
    decoder = GraphDecoder(folder / "if.onnx", threads=1)
    router = GraphDecoder(folder / "router.onnx", threads=1)
    decoder.start(1, len(prompt) + 80)
    reasoning = Reasoning(engine.tags, cap=limits.max_think_tokens, max_answer=limits.max_answer_tokens)
    written: list[int] = []
    while reasoning.stage != "done":
        told = engine._chooser.told(kept_at(len(written)))
        decision = {
            "budget": np.array([told.features], dtype=np.float32),
            "limits": np.array([told.limits], dtype=np.int64),
            "price": np.array([told.price], dtype=np.float32),
        }
        ids = np.array([prompt], dtype=np.int64)
        kept = router.step(ids, np.ones_like(ids), **decision)["kept_groups"]
        fed = ids if not written else np.array([[written[-1]]], dtype=np.int64)
        mask = np.ones((1, len(prompt) + len(written)), dtype=np.int64)
        logits = decoder.step(fed, mask, **decision, allocation=kept)["logits"][0, 0]
        if reasoning.begins_answer:
            logits = logits.copy()
            logits[engine.tags.end_answer] = -np.inf
        written.append(reasoning.advance(int(logits.argmax())))
    return written


def written_under(engine: Engine, plans: list[Callable[[int], Budget]]) -> list[list[int]]:
    """The texts of a prompt for each plan, which says the budget of each token."""
    requests = engine.submit(texts(len(plans)), [plan(0) for plan in plans], limits=LIMITS)

    def change(_: int) -> None:
        for request, plan in zip(requests, plans, strict=True):
            engine.set_budget(request, plan(len(request.written)))

    finish(engine, change)
    return [request.written for request in requests]


def test_a_budget_that_changes_acts_from_the_next_token_on(made: Path) -> None:
    engine = Engine(made, max_rows=4, threads=1)
    plans = [lambda step, row=row: Budget(compute=(1.0, 0.45, 0.8, 1.0)[(step // 3 + row) % 4]) for row in range(6)]
    expected = [alone(made, prompt, plan, engine) for prompt, plan in zip(texts(6), plans, strict=True)]
    assert written_under(engine, plans) == expected
    steady = engine.submit(texts(6), [Budget(compute=0.45)] * 6, limits=LIMITS)
    finish(engine)
    assert [request.written for request in steady] != expected


def test_gates_that_read_no_prompt_are_asked_once_for_each_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(
        new_artifact(tmp_path, summary="none", demand=False),
        tmp_path / "bundle",
        ExportOptions(budgets=(1.0, 0.45), calibration=4),
    )
    engine = Engine(tmp_path / "bundle", max_rows=4, threads=1)
    plans = [
        lambda step, row=row: Budget(compute=(0.45, 0.8)[(step // 3 + row) % 2] if step > 1 else 1.0)
        for row in range(6)
    ]
    expected = [alone(engine.folder, prompt, plan, engine) for prompt, plan in zip(texts(6), plans, strict=True)]
    asked = []

    def step(decoder: GraphDecoder, ids: np.ndarray, mask: np.ndarray, **more: np.ndarray) -> Any:
        if decoder is engine._chooser.router:
            asked.append((ids.tolist(), float(more["budget"][0, 0])))
        return whole(decoder, ids, mask, **more)

    whole = GraphDecoder.step
    monkeypatch.setattr(GraphDecoder, "step", step)
    assert written_under(engine, plans) == expected
    assert sorted(budget for _, budget in asked) == pytest.approx([0.45, 0.8])
    assert all(ids == [[engine.tags.think]] for ids, _ in asked)


def test_a_lean_graph_computes_again_what_a_higher_budget_needs(lean: Path) -> None:
    engine = Engine(lean, max_rows=2, threads=1)
    low, high = Budget(compute=0.45), Budget()
    requests = engine.submit(texts(4), [low] * 4, limits=LIMITS)

    def rise(step: int) -> None:
        if step == 4:
            for request in requests:
                engine.set_budget(request, high)

    finish(engine, rise)
    compared = 0
    for request, prompt in zip(requests, texts(4), strict=True):
        # What was written stays; what follows is what the dense model says after it.
        if len(request.written) < 5:
            continue
        kept = request.written[: 5 if request.number < 2 else 0]
        decoder = GraphDecoder(lean / "if.onnx", threads=1)
        decoder.start(1, 64)
        ids = np.array([prompt + kept], dtype=np.int64)
        told = engine._chooser.told(high)
        outputs = decoder.step(
            ids,
            np.ones_like(ids),
            budget=np.array([told.features], dtype=np.float32),
            limits=np.array([told.limits], dtype=np.int64),
            price=np.array([told.price], dtype=np.float32),
            allocation=np.full((1, 6), 2, dtype=np.int64),
        )
        assert request.kept == (2,) * 6
        if len(request.written) > len(kept) and request.reasoning.think[len(kept) : len(kept) + 1]:
            assert request.written[len(kept)] == int(outputs["logits"][0, 0].argmax())
            compared += 1
    assert compared >= 2


def test_a_budget_that_cannot_be_leaves_the_old_one(made: Path) -> None:
    engine = Engine(made, threads=1)
    (request,) = engine.submit(texts(1), [Budget(compute=0.7)], limits=LIMITS)
    engine.step()
    with pytest.raises(BudgetError, match="always-on"):
        engine.set_budget(request, Budget(compute=0.01))
    assert request.budget == Budget(compute=0.7)
    engine.set_budget(request, Budget(think_tokens=2))
    finish(engine)
    assert len(request.reasoning.think) == 2
    engine.set_budget(request, Budget())  # it is done: nothing happens
    assert request.budget.think_tokens == 2


def test_a_cap_on_reasoning_that_is_raised_makes_room(made: Path) -> None:
    engine = Engine(made, max_rows=2, threads=1)
    limits, small, large = Limits(max_think_tokens=40, tau_threshold=None), Budget(think_tokens=4), Budget()
    requests = engine.submit(texts(2), [small] * 2, limits=limits)
    engine.step()
    for request in requests:
        engine.set_budget(request, large)
    finish(engine)
    for request in requests:
        plan = alone(made, request.prompt, lambda written: small if written < 2 else large, engine, limits)
        assert request.written == plan
        assert len(request.reasoning.think) > 4


def test_variants_say_what_their_own_graphs_say_and_only_those_in_use_are_loaded(made: Path) -> None:
    engine = Engine(made, max_rows=4, threads=1, serve="variants")
    assert engine.graphs == []
    assert engine.ladder == (1.0, 0.7, 0.45)
    for variant in engine.bundle.variants:
        assert variant.allocation is not None
        requests = engine.submit(texts(5), [Budget(compute=variant.cost)] * 5, limits=LIMITS)
        finish(engine)
        assert engine.graphs == [variant.name]
        for request in requests:
            assert request.allocation(2) == variant.allocation
        if variant.budget == 1.0:  # the others are told their budget's share of the ladder at <think>
            other = Engine(made, max_rows=1, threads=1)
            for request, prompt in zip(requests, texts(5), strict=True):
                (same,) = other.submit([prompt], [Budget()], limits=LIMITS)
                same.kept = request.kept
                finish(other)
                assert same.written == request.written
    with pytest.raises(BudgetError, match="no variant"):
        engine.submit(texts(1), [Budget(layers=1)])


def test_no_more_variants_are_loaded_than_may_be(made: Path) -> None:
    for most in (1, 2):
        engine = Engine(made, max_rows=4, threads=1, serve="variants", max_graphs=most)
        budgets = [Budget(compute=BUDGETS[row % 3]) for row in range(9)]
        requests = engine.submit(texts(9), budgets, limits=LIMITS)
        seen = []
        finish(engine, lambda _, engine=engine, seen=seen: seen.append(len(engine.graphs)))
        assert max(seen) == most
        assert [request.error for request in requests] == [None] * 9
        for request, budget in zip(requests, budgets, strict=True):
            assert request.budget == budget


def test_a_request_moves_between_variants(made: Path) -> None:
    engine = Engine(made, max_rows=4, threads=1, serve="variants")
    requests = engine.submit(texts(4), [None] * 4, limits=LIMITS)
    seen: set[str] = set()

    def move(step: int) -> None:
        seen.update(engine.graphs)
        if step in (2, 5):
            for request in requests:
                engine.set_budget(request, Budget(compute=0.45 if step == 2 else 1.0))

    finish(engine, move)
    assert len(seen) == 2
    assert all(request.reasoning.answer and request.error is None for request in requests)
    # A cache that moved down is the cache that the smaller graph goes on with.
    first = Engine(made, max_rows=1, threads=1, serve="variants")
    (one,) = first.submit(texts(1), [None], limits=LIMITS)
    for _ in range(2):
        first.step()
    (lane,) = first.lanes
    held = lane.held(one)
    first.set_budget(one, Budget(compute=0.45))
    first.step()
    (lane,) = first.lanes
    assert lane.entry.budget == 0.45
    for name, values in lane.held(one).items():
        groups, tokens = values.shape[0], held[name].shape[1]
        np.testing.assert_array_equal(values[:, :tokens], held[name][:groups])
    assert set(lane.held(one)) < set(held)


class Faulty:
    """A session that fails when it is told to."""

    def __init__(self, session: Any, fails: Callable[[], Exception | None]) -> None:
        self._session, self._fails = session, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        error = self._fails()
        try:
            if error is not None:
                raise error
        finally:
            del error  # or it and this frame would keep one another
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What the next runs of any session fail with, from the first on; they succeed where it is empty."""
    planned: list[Exception | None] = []
    old = GraphDecoder.__init__

    def init(self: GraphDecoder, *args: Any, **options: Any) -> None:
        old(self, *args, **options)
        self.session = Faulty(self.session, lambda: planned.pop(0) if planned else None)

    monkeypatch.setattr(GraphDecoder, "__init__", init)
    return planned


SHORT = RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer")
BROKEN = RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running node")


def test_a_run_that_fails_is_tried_again_and_changes_no_text(made: Path, faults: list[Exception | None]) -> None:
    engine = Engine(made, max_rows=3, threads=1)
    first = engine.submit(texts(5), [None] * 5, limits=LIMITS)
    finish(engine)
    for planned in ([BROKEN], [None] * 3 + [BROKEN, BROKEN], [None] * 3 + [SHORT], [None, SHORT]):
        faults[:] = planned
        again = engine.submit(texts(5), [None] * 5, limits=LIMITS)
        finish(engine)
        assert not faults
        assert [request.error for request in again] == [None] * 5
        assert [request.written for request in again] == [request.written for request in first]


def test_of_a_batch_that_fails_for_good_a_row_ends_where_it_fails_alone(
    made: Path, faults: list[Exception | None]
) -> None:
    engine = Engine(made, max_rows=3, threads=1)
    first = engine.submit(texts(3), [None] * 3, limits=LIMITS)
    finish(engine)
    again = engine.submit(texts(3), [None] * 3, limits=LIMITS)
    engine.step()
    faults[:] = [BROKEN] * 3 + [None, BROKEN, SHORT]  # together three times, then each alone
    finish(engine)
    assert not faults
    assert [type(request.error) for request in again] == [type(None), SessionError, type(None)]
    for old, new in zip(first, again, strict=True):
        assert new.written == (old.written[: len(new.written)] if new.error else old.written)


def test_a_request_that_is_interrupted_before_its_last_token_takes_no_other_with_it(
    made: Path, faults: list[Exception | None]
) -> None:
    engine = Engine(made, max_rows=2, threads=1)
    limits = Limits(max_think_tokens=0, max_answer_tokens=1)
    requests = engine.submit(texts(6), [None] * 6, limits=limits)
    for number in range(12):  # at every place once
        faults[:] = [None] * number + [SHORT]
        finish(engine)
        faults.clear()
        assert all(request.done and request.error is None for request in requests)
        assert all(len(request.reasoning.answer) == 1 for request in requests)
        requests = engine.submit(texts(6), [None] * 6, limits=limits)


def test_memory_that_is_short_means_a_smaller_budget_and_then_one_error(
    made: Path, faults: list[Exception | None]
) -> None:
    engine = Engine(made, max_rows=1, threads=1)
    faults[:] = [SHORT, SHORT]
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    finish(engine)
    assert request.error is None
    assert request.budget == request.ceiling == Budget(compute=0.45)  # nobody raises it again
    faults[:] = [SHORT] * 9
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    finish(engine)
    assert isinstance(request.error, OutOfMemoryError)
    assert isinstance(request.error, MemoryError)
    assert "if.onnx: not enough memory to run it" in str(request.error)
    faults[:] = [BROKEN] * 3
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    finish(engine)
    assert type(request.error) is SessionError
    assert "cannot run it" in str(request.error)
    faults.clear()
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    finish(engine)
    assert request.error is None


def test_a_variant_that_does_not_load_is_replaced_by_a_smaller_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = GraphDecoder.__init__

    def init(self: GraphDecoder, path: Path, **options: Any) -> None:
        if path.name == "b1.onnx":
            raise SessionError(f"{path}: onnxruntime cannot load it")
        old(self, path, **options)

    monkeypatch.setattr(GraphDecoder, "__init__", init)
    engine = Engine(made, max_rows=2, threads=1, serve="variants")
    requests = engine.submit(texts(3), [None] * 3, limits=LIMITS)
    finish(engine)
    assert [request.budget.compute for request in requests] == [0.7] * 3
    assert [request.error for request in requests] == [None] * 3


def within(folder: Path, total: list[float], **settings: Any) -> Engine:
    """An engine whose keys and values are all that takes memory."""

    def left() -> float:
        return total[0] - made.resident_bytes

    made = Engine(folder, threads=1, memory_left=left, **settings)
    return made


def test_a_request_waits_for_memory_and_is_refused_where_none_can_come(made: Path) -> None:
    total = [math.inf]
    engine = within(made, total, max_rows=3)
    first = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    (lane,) = engine.lanes
    total[0] = 1.8 * first[0].most_tokens * lane.caches.token_bytes
    more = engine.submit(texts(1) * 2, [None] * 2, limits=LIMITS)
    engine.step()
    assert engine.rows == 1
    finish(engine)
    assert [request.error for request in first + more] == [None] * 3
    total[0] = 100.0
    requests = engine.submit(texts(2), [None] * 2, limits=LIMITS)
    finish(engine)
    for request in requests:
        assert isinstance(request.error, OutOfMemoryError)
        assert "bytes for its keys and values" in str(request.error)


def test_memory_is_looked_at_where_a_row_fits_into_what_is_reserved(made: Path) -> None:
    total = [math.inf]
    engine = within(made, total, max_rows=3)
    limits = Limits(max_think_tokens=30, max_answer_tokens=4, tau_threshold=None)
    first = engine.submit(texts(1) * 2, [None] * 2, limits=limits)
    engine.step()
    (lane,) = engine.lanes
    whole = first[0].most_tokens * lane.caches.token_bytes
    assert lane.caches.rows == 3
    assert engine.resident_bytes == sum(request.length for request in first) * lane.caches.token_bytes < whole
    total[0] = 2.5 * whole
    (third,) = engine.submit(texts(1), [None], limits=limits)
    engine.step()
    assert engine.rows == 2
    total[0] = math.inf
    engine.cancel(third)
    engine._scheduler._looked, total[0] = -math.inf, 1.8 * whole  # others take what was left
    engine.step()
    assert engine.running == first[:1]
    finish(engine)
    assert [request.error for request in first] == [None] * 2
    assert first[0].written == first[1].written


def test_what_a_long_prompt_is_computed_in_must_be_left(made: Path) -> None:
    engine = within(made, [math.inf], max_rows=1)
    long = [*[5] * 400, engine.tags.think]
    (request,) = engine.submit([long], [None], limits=LIMITS)
    (lane,) = engine.lanes
    caches, work = request.most_tokens * lane.caches.token_bytes, engine._scheduler.scratch(lane, request)
    assert work > 401 * engine.bundle.shape.intermediate_size * 4
    for left, error in ((caches + work / 2, OutOfMemoryError), (caches + work, type(None))):
        engine._scheduler.memory_left = partial(float, left)
        (request,) = engine.submit([long], [Budget(compute=0.45)], limits=LIMITS)
        finish(engine)
        assert isinstance(request.error, error)


def test_caches_end_with_their_rows(made: Path) -> None:
    engine = Engine(made, max_rows=4, max_graphs=2, threads=1, serve="variants")
    engine.submit(texts(4), [Budget(compute=0.45)] * 4, limits=LIMITS)
    finish(engine)
    assert engine.resident_bytes == 0
    assert [lane.caches.rows for lane in engine.lanes] == [0]
    long, short = Limits(max_think_tokens=300), Limits(max_think_tokens=1)
    (request,) = engine.submit(texts(1), [Budget(compute=0.45)], limits=long)
    engine.step()
    engine.cancel(request)
    engine.submit(texts(1), [None], limits=short)
    engine.step()
    assert [lane.caches.rows for lane in engine.lanes] == [0, 1]
    (request,) = engine.submit(texts(1), [Budget(compute=0.45)], limits=short)
    engine.step()
    (lane,) = (lane for lane in engine.lanes if request in lane.requests)
    assert lane.caches.capacity == request.most_tokens


def test_what_is_cancelled_last_gives_its_memory_back_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    monkeypatch.setattr("l2a_compress.runtime.engine.give_back", lambda: returned.append(1))
    engine = Engine(made, max_rows=2, threads=1)
    first, second = engine.submit(texts(2), [None] * 2, limits=LIMITS)
    engine.step()
    (lane,) = engine.lanes
    engine.cancel(first)
    assert (engine.running, lane.caches.rows, returned) == ([second], 2, [])  # the other one needs its own
    engine.cancel(second)
    assert (engine.rows, engine.resident_bytes, lane.caches.rows, returned) == (0, 0, 0, [1])
    engine.cancel(second)
    (waits,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.cancel(waits)
    assert returned == [1]  # nothing has run
    # While a step goes on, too: whoever is asked whether a text ends may cancel it.
    requests = engine.submit(texts(2), [None] * 2, limits=LIMITS, stops=lambda request: bool(engine.cancel(request)))
    finish(engine)
    assert [len(request.written) for request in requests] == [1, 1]
    assert (engine.rows, engine.resident_bytes) == (0, 0)
    (again,) = engine.submit(texts(1), [None], limits=LIMITS)
    finish(engine)
    assert again.written


def test_an_engine_whose_work_ended_by_itself_gives_its_memory_back_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[int] = []
    monkeypatch.setattr("l2a_compress.runtime.engine.give_back", lambda: returned.append(1))
    engine = Engine(made, max_rows=2, threads=1)
    engine.submit(texts(3), [None] * 3, limits=LIMITS)
    finish(engine)
    assert (engine.rows, returned) == (0, [1])
    engine.step()  # nothing more has run
    assert returned == [1]


def test_what_drawing_tokens_takes_is_no_work_of_the_model(made: Path) -> None:
    clock = Clock()

    class Slow(Sampler):
        def token(self, logits: Any) -> int:
            clock.now += 1.0
            return super().token(logits)

    engine = Engine(made, max_rows=2, threads=1, clock=clock)
    for request in engine.submit(texts(2), [None] * 2, limits=LIMITS):
        request.sampler = Slow(Sampling())
    engine.step()
    assert clock.now >= 2.0
    assert engine.steps[-1].rows == 2
    assert engine.steps[-1].seconds == 0.0


def test_an_answer_says_whether_it_ended_by_itself(made: Path) -> None:
    runtime = Runtime.open(made, max_rows=1, threads=1)
    first, second = runtime.submit([TEXT] * 2, [None] * 2, limits=LIMITS)
    runtime.step()
    for request in (first, second):  # one in the middle, one that has not begun
        runtime.engine.cancel(request)
        assert not runtime.answer(request).finished
    assert runtime.answer(second).think_tokens == 0
    assert runtime.generate([TEXT], limits=LIMITS)[0].finished


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_server_says_that_it_does_not_run_in_a_forked_process(made: Path) -> None:
    with Server(Runtime.open(made, max_rows=1, threads=1)) as server:
        child = os.fork()
        if not child:
            try:
                server.stream(TEXT)
            except SessionError as error:
                os._exit(0 if "behind the fork" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_a_row_more_needs_no_more_memory_than_it_takes(made: Path) -> None:
    left = [math.inf]
    engine = Engine(made, max_rows=8, threads=1, memory_left=lambda: left[0])
    engine.submit(texts(1) * 3, [None] * 3, limits=LIMITS)
    engine.step()
    (lane,) = engine.lanes
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    left[0] = lane.caches.growth(4, request.most_tokens) + engine._scheduler.scratch(lane, request)
    assert left[0] < lane.caches.growth(7, request.most_tokens)
    engine.step()
    assert engine.rows == 4


def test_who_waits_for_memory_is_tried_again(made: Path) -> None:
    left, now = [math.inf], [0.0]
    engine = Engine(made, max_rows=3, threads=1, memory_left=lambda: left[0], clock=lambda: now[0])
    limits = Limits(max_think_tokens=60, tau_threshold=None)
    engine.submit(texts(1), [None], limits=limits)
    engine.step()
    left[0] = 0.0
    second, third = engine.submit(texts(1) * 2, [None] * 2, limits=limits)
    engine.step()
    left[0] = math.inf
    engine.step()
    assert engine.rows == 1
    engine.cancel(second)
    engine.step()
    assert third in engine.running
    engine._scheduler.preempt(third, keep=False)
    engine._scheduler.crowded()
    engine.step()
    assert engine.rows == 1
    now[0] += 2.0
    engine.step()
    assert third in engine.running


def test_a_cap_that_is_raised_counts_what_caches_take_to_grow(made: Path) -> None:
    left, now = [math.inf], [0.0]
    engine = Engine(made, max_rows=2, threads=1, memory_left=lambda: left[0], clock=lambda: now[0])
    first, second = engine.submit(texts(1) * 2, [Budget(think_tokens=4)] * 2, limits=Limits(max_think_tokens=400))
    engine.step()
    (lane,) = engine.lanes
    left[0], now[0] = 2.0 * first.most_tokens * lane.caches.token_bytes, 1.0
    engine.step()
    assert engine.rows == 2
    engine.set_budget(first, Budget())
    now[0] = 2.0
    engine.step()
    assert engine.running == [first]
    engine.cancel(second)


def test_caches_grow_for_a_raised_cap_only_into_memory_that_is_left(made: Path) -> None:
    left, now = [math.inf], [0.0]
    engine = Engine(made, max_rows=1, threads=1, memory_left=lambda: left[0], clock=lambda: now[0])
    limits = Limits(max_think_tokens=400, tau_threshold=None)
    (request,) = engine.submit(texts(1), [Budget(think_tokens=4)], limits=limits)
    engine.step()
    (lane,) = engine.lanes
    before = lane.caches.capacity
    engine.set_budget(request, Budget())
    left[0] = 0.0
    while engine.busy:
        engine.step()
        assert lane.caches.capacity <= before
    assert isinstance(request.error, OutOfMemoryError)
    assert len(request.prompt + request.written) >= before  # what there was room for


def test_who_is_interrupted_gives_its_memory_back(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2a_compress.runtime.pages._has_huge_pages", lambda: False)
    left, now = [math.inf], [0.0]
    engine = Engine(made, max_rows=3, threads=1, memory_left=lambda: left[0], clock=lambda: now[0])
    expected = engine.submit(texts(3), [None] * 3, limits=LIMITS)
    finish(engine)
    requests = engine.submit(texts(3), [None] * 3, limits=LIMITS)
    engine.step()
    (lane,) = engine.lanes
    assert engine.resident_bytes == sum(request.length for request in requests) * lane.caches.token_bytes
    left[0], now[0] = float(lane.caches.unwritten([requests[0].most_tokens])), 1.0
    engine.step()
    assert engine.running == [requests[0]]
    assert engine.resident_bytes == requests[0].length * lane.caches.token_bytes
    left[0] = math.inf
    finish(engine)
    assert [request.written for request in requests] == [request.written for request in expected]


def test_a_step_that_failed_keeps_no_graph(made: Path, faults: list[Exception | None]) -> None:
    engine = Engine(made, max_rows=1, threads=1, serve="variants")
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    faults[:] = [RuntimeError(str(SHORT))]  # which nobody else keeps
    gone = weakref.ref(next(iter(engine.lanes)))
    gc.disable()
    try:
        engine.step()  # memory is short
        engine.step()  # another graph takes the place
        assert engine.graphs != [engine.bundle.variants[0].name]
        assert gone() is None
    finally:
        gc.enable()
    finish(engine)
    assert request.error is None


def test_who_is_cancelled_while_rows_run_alone_is_not_run(made: Path, faults: list[Exception | None]) -> None:
    engine = Engine(made, max_rows=2, threads=1)
    others: list[Request] = []

    def stops(request: Request) -> bool:
        for other in others:
            engine.cancel(other)
        return bool(others)

    first = engine.submit(texts(1), [None], limits=LIMITS, stops=stops)
    second = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    others[:] = second
    written = len(second[0].written)
    faults[:] = [BROKEN] * 3
    for _ in range(3):
        engine.step()
    assert first[0].done
    assert second[0].done
    assert len(second[0].written) == written
    assert not engine.rows


def test_variants_share_what_memory_is_left(made: Path) -> None:
    left = [math.inf]
    limits = Limits(max_think_tokens=60, tau_threshold=None)
    engine = Engine(made, max_rows=2, max_graphs=2, threads=1, serve="variants", memory_left=lambda: left[0])
    large, small = engine.submit(texts(1) * 2, [None, Budget(compute=0.45)], limits=limits)
    engine.step()
    lane = engine.lanes.of(small)
    assert lane is not None
    engine._stumbled(lane, lane.requests, OutOfMemoryError("no room"))
    assert (small.ceiling, list(engine.waiting), engine.running) == (Budget(compute=0.45), [small], [large])
    left[0] = 0.0
    engine.set_budget(large, Budget(compute=0.7))
    assert not engine._scheduler.held  # no room for a copy
    engine._scheduler.held[large.number] = {}
    engine._failed(large, OutOfMemoryError("no room"))
    assert (large.error, engine._scheduler.held) == (None, {})
    left[0] = math.inf
    engine.step()
    engine.cancel(large)
    engine.step()
    assert all(other.requests or not other.caches.rows for other in engine.lanes)
    assert engine.running == [small]


def test_a_request_that_brings_its_keys_and_values_has_computed_nothing(made: Path) -> None:
    engine = Engine(made, max_rows=1, max_graphs=2, threads=1, serve="variants")
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    engine.set_budget(request, Budget(compute=0.45))
    engine.step()
    assert [step.prompt_tokens for step in engine.steps] == [len(request.prompt), 0]
    assert request.kept == widths_of(engine.bundle.variants[-1])


def test_keys_and_values_that_cannot_be_kept_are_computed_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(made, max_rows=1, max_graphs=2, threads=1, serve="variants")
    (request,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("l2a_compress.runtime.lane.Lane.held", full)
    engine.set_budget(request, Budget(compute=0.45))
    engine.step()
    assert [step.prompt_tokens for step in engine.steps] == [len(request.prompt), len(request.prompt) + 2]
    finish(engine)
    assert request.error is None


@pytest.mark.parametrize(
    "place", ["lane.Lane.prefill", "lane.Lane.decode", "sampling.Sampler.token", "caches.Caches.take"]
)
def test_no_lack_of_memory_of_numpy_leaves_a_step(made: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    engine = Engine(made, max_rows=2, max_graphs=2, threads=1, serve="variants")
    requests = engine.submit(texts(4), [None] * 4, limits=LIMITS)
    owner, name = place.rpartition(".")[::2]
    target = f"l2a_compress.runtime.{owner}"
    module, kind = target.rpartition(".")[::2]
    whole, calls = getattr(getattr(sys.modules[module], kind), name), [0]

    def sometimes(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 5 == 2:
            raise MemoryError("no room")
        return whole(*args)

    monkeypatch.setattr(f"{target}.{name}", sometimes)
    finish(engine, lambda step: engine.set_budget(requests[0], Budget(compute=(1.0, 0.45)[step % 2])))
    assert all(request.done for request in requests)
    for request in requests:
        assert request.error is None or isinstance(request.error, OutOfMemoryError)


def test_a_router_that_breaks_a_cap_is_not_followed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(made, threads=1, serve="variants")
    whole, middle, small = engine.bundle.variants
    same = tuple(dataclasses.replace(entry, budget=1.0) for entry in (whole, middle, small))
    graphs = (*same, *(graph for graph in engine.bundle.graphs if graph.kind != "variant"))
    engine.bundle = engine._chooser.bundle = engine.lanes.bundle = dataclasses.replace(engine.bundle, graphs=graphs)
    kept = np.array([widths_of(small)])
    answer = {"variant": np.array([0]), "kept_groups": kept}
    monkeypatch.setattr(engine._chooser, "_route", lambda *_: answer)
    most = len(middle.allocation.layers) if middle.allocation else 0
    (request,) = engine.submit(texts(1), [Budget(layers=most)], limits=LIMITS)
    engine.step()
    assert request.kept == widths_of(small)
    answer["variant"] = np.array([1])
    (request,) = engine.submit(texts(1), [Budget(layers=most)], limits=LIMITS)
    finish(engine)
    assert request.kept == widths_of(middle)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_end_their_request_alone(
    made: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    engine = Engine(made, max_rows=2, threads=1)
    sampling = Sampling(temperature=temperature)
    good, bad = engine.submit(texts(2), [None] * 2, limits=LIMITS, sampling=sampling)
    engine.step()
    step = GraphDecoder.step

    def broken(self: GraphDecoder, *args: Any, **inputs: Any) -> Any:
        outputs = dict(step(self, *args, **inputs))
        outputs["logits"] = outputs["logits"].copy()
        outputs["logits"][1, 0, 3] = np.nan
        return outputs

    monkeypatch.setattr(GraphDecoder, "step", broken)
    engine.step()
    monkeypatch.undo()
    finish(engine)
    assert isinstance(bad.error, SessionError)
    assert "not numbers" in str(bad.error)
    assert good.error is None
    assert good.reasoning.answer


def test_words_of_a_name_are_no_lack_of_memory() -> None:
    where = Path("/data/memory/alloc/if.onnx")
    for text, short in (
        ("Got invalid dimensions for input: allocation", False),
        (f"Load model from {where} failed: Protobuf parsing failed", False),
        ("std::bad_alloc", True),
        ("Failed to allocate memory for requested buffer of size 64", True),
        ("CUDA failure 2: out of memory", True),
    ):
        error = session_error(where, "run", RuntimeError(text))
        assert isinstance(error, OutOfMemoryError) == short, text
    assert isinstance(session_error(where, "run", MemoryError()), OutOfMemoryError)


def test_an_answer_ends_before_a_text_that_stops_it(made: Path) -> None:
    runtime = Runtime.open(made, threads=1)
    limits = Limits(max_think_tokens=3, max_answer_tokens=12)
    (whole,) = runtime.generate([TEXT], limits=limits)
    words = whole.answer.split()
    assert len(words) > 4
    stop = words[3]
    place = f" {whole.answer} ".index(f" {stop} ")
    stopping = Limits(max_think_tokens=3, max_answer_tokens=12, stop=(stop, "no such text"))
    *pieces, answer = runtime.stream(TEXT, limits=stopping)
    assert isinstance(answer, Answer)
    assert answer.answer == whole.answer[:place].strip()
    text = "".join(map(str, pieces))
    assert text.rpartition("<answer>")[2].strip() == answer.answer
    assert answer.think == whole.think
    for bad in ("text", ("",)):
        with pytest.raises(ConfigError, match="stop"):
            Limits(stop=bad)  # type: ignore[arg-type]


def test_the_cost_table_is_measured_once(made: Path) -> None:
    engine = Engine(made, max_rows=2, threads=1)
    said: list[str] = []
    found = cost_table(engine, progress=said.append)
    assert (len(said), engine.resident_bytes) == (1, 0)
    assert cached_path(engine).is_file()
    assert cost_table(engine, progress=said.append) == found
    assert len(said) == 1
    assert [step.budget for step in found.steps] == list(engine.ladder)
    assert found.steps[0].layers == 6
    assert [step.heads for step in found.steps] == sorted((step.heads for step in found.steps), reverse=True)
    assert all(step.memory_bytes > 1e6 for step in found.steps)
    assert cached_path(Engine(made, max_rows=3, threads=1)) != cached_path(engine)
    cached_path(engine).write_text("{")
    assert cost_table(engine, progress=said.append).device == found.device
    assert len(said) == 2
    kept = cached_path(engine)
    engine.provider = "cuda"
    assert cached_path(engine) != kept
    engine.provider = "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime.__version__", "0.1")
        assert cached_path(engine) != kept
    (request,) = engine.submit(texts(1), [None])
    with pytest.raises(ConfigError, match="measure before"):
        measure(engine)
    engine.cancel(request)


def test_costs_are_of_rows_with_different_texts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine(made, max_rows=3, threads=1), list[list[int]]()
    submit = engine.submit

    def noted(prompts: Any, *args: Any, **more: Any) -> Any:
        asked[:] = prompts
        return submit(prompts, *args, **more)

    monkeypatch.setattr(engine, "submit", noted)
    monkeypatch.setattr("l2a_compress.runtime.costs._peak", lambda *_: (1.0, True))
    measure(engine, rounds=1)
    rows = [prompt for prompt in asked if len(prompt) == len(asked[0])]
    assert len(rows) == len({tuple(prompt) for prompt in rows}) == 3
    assert all(0 < token < engine.bundle.shape.vocab_size for prompt in rows for token in prompt)


def test_costs_that_not_all_rows_were_measured_for_are_not_kept(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2a_compress.runtime.costs._peak", lambda *_: (1.0, True))
    engine = Engine(made, max_rows=4, threads=1)
    reserve = engine._scheduler.reserve
    for roomy in (0, 10):  # rows that are admitted before others take the memory: at the start, or in the middle
        asked = itertools.count()

        def short(lane: Any, request: Request, most: int, asked: Any = asked, roomy: int = roomy) -> bool:
            return (engine.rows < 2 or next(asked) < roomy) and reserve(lane, request, most)

        monkeypatch.setattr(engine._scheduler, "reserve", short)
        found = measure(engine, rounds=1)
        assert (found.rows, found.alone) == (2, False)
        assert next(asked) > roomy
    monkeypatch.setattr(engine._scheduler, "reserve", reserve)
    engine._scheduler.memory_left = lambda: 0.0
    with pytest.raises(OutOfMemoryError):
        measure(engine, rounds=1)


def test_between_two_steps_the_if_graph_spends_its_budget_and_a_variant_the_smaller_step() -> None:
    found = table(1.0, 0.5)
    high, low = found.steps[0], found.steps[1]
    middle = (high.budget + low.budget) / 2
    costs = [each.step_seconds(2) for each in (high, low)]
    assert found.serve == "if"
    assert found.step_seconds(middle, 2, 0) == pytest.approx(sum(costs) / 2)
    assert [found.step_seconds(each.budget, 2, 0) for each in (high, low)] == pytest.approx(costs)
    assert found.step_seconds(0.01, 2, 0) == pytest.approx(found.steps[-1].step_seconds(2))
    assert dataclasses.replace(found, serve="variants").step_seconds(middle, 2, 0) == pytest.approx(costs[1])


def test_the_processor_and_memory_of_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/cpuinfo": tmp_path / "cpuinfo", "/proc/self/status": tmp_path / "status"}
    monkeypatch.setattr("l2a_compress._machine.Path", lambda name: files[name])
    names = []
    for part in ("0xd0c", "0xd4f"):
        files["/proc/cpuinfo"].write_text(f"processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n" * 2)
        names.append(processor())
    assert names[0] == f"{platform.machine()} implementer 0x41 part 0xd0c"
    assert names[0] != names[1]
    files["/proc/cpuinfo"].write_text("model name\t: EPYC\nmodel name\t: EPYC\n")
    assert processor() == "EPYC"
    files["/proc/self/status"].write_text("Name:\tpython\nVmRSS:\t  10 kB\n")  # as of gVisor
    assert (held_bytes(), peak_bytes()) == (10240, None)


def test_who_has_no_home_measures_and_keeps_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("L2A_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(none))
    monkeypatch.setattr("l2a_compress.runtime.costs.measure", lambda _: table(1.0))
    assert cost_table(Engine(made, threads=1)) == table(1.0)
    assert "set L2A_CACHE to one" in caplog.text


def test_no_second_model_is_loaded_where_memory_is_short(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def killed(code: str) -> int:
        asked.append(code)
        raise OutOfMemoryError("killed by signal 9")

    monkeypatch.setattr("l2a_compress.runtime.costs.peak_of", killed)
    left = [1e6]
    engine = Engine(made, max_rows=1, threads=1, memory_left=lambda: left[0])
    own = peak_bytes()
    assert own is not None
    for bytes_left, times in ((1e6, 0), (1e15, 1)):
        left[0] = bytes_left
        found = measure(engine, rounds=1)
        assert len(asked) == times
        assert all(step.memory_bytes >= own for step in found.steps)
        keep(engine, found)
        assert not cached_path(engine).exists()  # not for other days


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_measures_memory_is_the_first_to_go() -> None:
    code = "assert open('/proc/self/oom_score_adj').read().strip() == '1000'"
    assert (peak_of(code) or 0) > 1e6


def test_a_cost_table_that_cannot_be_kept_is_used(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("l2a_compress.runtime.costs.measure", lambda _: table(1.0))
    assert cost_table(Engine(made, threads=1)) == table(1.0)
    assert "not kept" in caplog.text
    assert "L2A_CACHE" in caplog.text


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise SystemExit('no such graph')", SessionError, "failed: no such graph"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", OutOfMemoryError, "killed by signal 9"),
    ],
)
def test_a_process_that_measures_memory_and_fails_is_one_error(code: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        peak_of(code)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": []}, "at least one"), ({"extra": 1}, "extra"), ({"steps": [{"budget": 1.0}]}, "missing")],
)
def test_a_bad_cost_table_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = table(1.0).to_json()
    assert CostTable.from_json(data) == table(1.0)
    with pytest.raises(ConfigError, match=message):
        CostTable.from_json(data | change)
    data["steps"][0]["decode_seconds"] = float("nan")
    with pytest.raises(ConfigError, match=r"steps\[0\].decode_seconds"):
        CostTable.from_json(data)
    (tmp_path / "costs.json").write_text("[")
    with pytest.raises(ConfigError, match="l2a bench"):
        CostTable.load(tmp_path / "costs.json")


def test_auto_is_the_least_of_what_is_asked_and_allowed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2a_compress.runtime.runtime.cost_table", lambda *_, **__: table(1.0, 0.7, 0.45))
    told = Told()
    policy = Policy.from_json({"pressures": ["pressure.cpu_some"], "tiers": {"flex": {"ceiling": 0.7}}})
    runtime = Runtime.open(made, threads=1, policy=policy, sources=[told])
    told.values["pressure.cpu_some"] = 0.0
    (answer,) = runtime.generate([TEXT], "auto", limits=LIMITS)
    assert answer == runtime.generate([TEXT], limits=LIMITS)[0]
    (answer,) = runtime.generate([TEXT], "auto", limits=LIMITS, tier="flex")
    assert answer.budget.compute == 0.7
    assert answer.cost <= 0.7
    with pytest.raises(ConfigError, match="tier 'vip'"):
        runtime.generate([TEXT], "auto", tier="vip")
    with pytest.raises(ConfigError, match='"auto"'):
        runtime.generate([TEXT], "most")  # type: ignore[arg-type]
    (request,) = runtime.submit([TEXT], [None], limits=LIMITS)
    runtime.step()
    runtime.set_budget(request, "auto", tier="flex")
    assert request.budget.compute == 0.7
    runtime.set_budget(request, Budget(compute=0.8))
    assert (request.budget.compute, request.tier) == (0.8, None)
    with pytest.raises(BudgetError):
        runtime.set_budget(request, Budget(compute=0.01))
    assert request.budget.compute == 0.8


def test_a_budget_that_cannot_be_found_leaves_the_others_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2a_compress.runtime.runtime.cost_table", lambda *_, **__: table(1.0, 0.7))
    runtime = Runtime.open(made, threads=1, sources=())
    room = runtime.engine.bundle.positions
    limits, small = Limits(max_think_tokens=room, max_answer_tokens=2, tau_threshold=None), Budget(think_tokens=2)
    (other,) = runtime.submit([TEXT], ["auto"], limits=LIMITS)
    (request,) = runtime.submit([TEXT], [small], limits=limits)
    with pytest.raises(ConfigError, match="positions of the bundle"):
        runtime.set_budget(request, "auto")
    assert (request.ceiling, request.budget, request.tier) == (small, small, None)
    request.ceiling, request.tier = Budget(), "default"  # as if it could not be seen at first
    monkeypatch.setattr(runtime.controller, "_seconds", 0.0)
    while not (other.done and request.done):
        runtime.step()
    assert (other.error, request.error) == (None, None)
    assert len(request.reasoning.think) <= 2


def test_many_callers_share_a_server(made: Path) -> None:
    limits = Limits(max_think_tokens=6, max_answer_tokens=3)
    runtime = Runtime.open(made, max_rows=3, threads=1)
    asked = [(f"{name} has {count} apples.", Budget(compute=compute)) for name, count, compute in CALLERS]
    expected = [runtime.generate([text], budget, limits=limits)[0] for text, budget in asked]
    found: dict[int, Answer] = {}
    with Server(runtime) as server:

        def call(number: int) -> None:
            text, budget = asked[number]
            *pieces, answer = server.stream(text, budget, limits=limits)
            assert isinstance(answer, Answer)
            assert "</think>" in "".join(map(str, pieces))
            found[number] = answer

        threads = [threading.Thread(target=call, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        async def together() -> list[Answer]:
            async def one(text: str, budget: Budget) -> Answer:
                items = [item async for item in server.stream(text, budget, limits=limits)]
                assert isinstance(items[-1], Answer)
                return items[-1]

            return await asyncio.gather(*(one(text, budget) for text, budget in asked))

        assert asyncio.run(together()) == expected
        with pytest.raises(BudgetError):
            server.stream("x", Budget(compute=0.01))
        stream = server.stream(TEXT, limits=Limits(max_think_tokens=400, tau_threshold=None))
        stream.set_budget(Budget(compute=0.5))
        assert stream.request.budget.compute == 0.5
        stream.cancel()
        assert stream.answer().think_tokens < 400
    assert [found[number] for number in range(len(asked))] == expected
    with pytest.raises(SessionError, match="closed"):
        server.stream(TEXT)


CALLERS = (("Ann", 3, 1.0), ("Bob", 4, 0.6), ("Ann", 5, 0.45), ("Bob", 2, 0.8), ("Ann", 7, 1.0))


def test_a_server_tells_what_went_wrong(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.open(made, threads=1)
    with Server(runtime) as server:
        monkeypatch.setattr(runtime.engine, "step", lambda: 1 / 0)
        with pytest.raises(SessionError, match="division by zero"):
            server.stream(TEXT).answer()
        monkeypatch.undo()
        assert server.stream(TEXT, limits=LIMITS).answer().answer
        waiting = server.stream(TEXT, limits=Limits(max_think_tokens=400, tau_threshold=None))
    assert waiting.answer().think_tokens < 400  # closed: what was written


def test_an_action_that_fails_as_a_wait_does_is_its_own_error(made: Path) -> None:
    def late() -> None:
        raise TimeoutError("its own")

    with Server(Runtime.open(made, threads=1)) as server:
        with pytest.raises(TimeoutError, match="its own"):
            server.call(late)
        assert server.call(lambda: 7) == 7


def test_a_text_that_cannot_be_told_ends_its_request_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.open(made, threads=1)
    text, broken = runtime.text, []

    def breaks(request: Request) -> str:
        return str(1 / 0) if request in broken else text(request)

    monkeypatch.setattr(runtime, "text", breaks)
    with Server(runtime) as server:
        stream = server.call(
            lambda: (broken.append((new := server._submit(TEXT, None, tier="default")()).request), new)[1]
        )
        with pytest.raises(SessionError, match="cannot be told: division by zero"):
            stream.answer()
        assert server.stream(TEXT, limits=LIMITS).answer().answer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_died(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Runtime.open(made, threads=1))
    stream = server.stream(TEXT, limits=Limits(max_think_tokens=400, tau_threshold=None))

    def dies(*_: Any) -> None:
        raise SystemExit("the thread is gone")

    monkeypatch.setattr(server.runtime.engine, "step", dies)
    with pytest.raises(SessionError, match="thread has ended"):
        stream.answer()
    server._thread.join(10)
    assert not server.alive
    stream._items.clear()  # as if not even that could be told
    monkeypatch.setattr("l2a_compress.runtime.server._ALIVE", 0.01)
    with pytest.raises(SessionError, match="thread has ended"):
        list(stream)
    with pytest.raises(SessionError, match="closed"):
        server.stream(TEXT)


def test_a_task_that_is_cancelled_leaves_no_request(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.open(made, max_rows=4, threads=1)
    limits, step = Limits(max_think_tokens=400, tau_threshold=None), runtime.engine.step
    (whole,) = runtime.generate([TEXT], limits=limits)
    monkeypatch.setattr(runtime.engine, "step", lambda: (time.sleep(0.02), step())[1])

    async def read(stream: Stream, seconds: float) -> None:
        async for _ in stream:
            await asyncio.sleep(seconds)

    async def both(server: Server) -> list[Stream]:
        streams = [await server.astream(TEXT, limits=limits) for _ in range(3)]
        with pytest.raises(BudgetError):
            await streams[2].aset_budget(Budget(compute=0.01))
        tasks = [asyncio.create_task(read(stream, wait)) for stream, wait in zip(streams, (0, 60), strict=False)]
        await asyncio.sleep(0.1)  # one waits for a piece, the other does something with one
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async for _ in streams[2]:
            break
        return streams

    assert whole.think_tokens > 50  # which takes far longer than the pause in between
    with Server(runtime) as server:
        first, second, third = asyncio.run(both(server))
        assert first.answer().think_tokens < whole.think_tokens
        assert second.answer().think_tokens < whole.think_tokens
        assert not third.request.done  # who left its loop may come back
        asyncio.run(third.acancel())
        assert third.answer().think_tokens < whole.think_tokens


def test_a_stream_keeps_its_tier(made: Path) -> None:
    policy = Policy(tiers={"default": Tier(), "flex": Tier(ceiling=0.5)})
    with Server(Runtime.open(made, threads=1, policy=policy, sources=())) as server:
        stream = server.stream(TEXT, "auto", tier="flex")
        stream.set_budget("auto")
        assert stream.request.tier == "flex"
        assert stream.answer().budget.compute <= 0.5


def test_the_example_service_answers(made: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = subprocess.Popen([sys.executable, str(ROOT / "examples" / "service.py"), str(made), str(port)])
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        for body, told in (({"prompt": TEXT}, "budget"), ({"prompt": TEXT, "budget": 0.5}, "budget 0.5")):
            *text, last = ask(port, body).strip().splitlines()
            assert "</think>" in "".join(text)
            assert told in last
        for bad in ({"prompt": TEXT, "budget": 7}, {"budget": 0.5}, {"prompt": 3}):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(port, bad)
    finally:
        service.kill()
        service.wait()


def ask(port: int, body: dict[str, Any]) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", data=json.dumps(body).encode(), timeout=60) as answer:
        return str(answer.read().decode())


def test_two_hundred_failures_end_no_process_and_lose_no_request(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, injected = random.Random(0), [0]
    old_init, old_step = GraphDecoder.__init__, GraphDecoder.step

    def fail(chance: float, what: str) -> None:
        if injected[0] < 200 and draw.random() < chance:
            injected[0] += 1
            short = draw.random() < 0.5
            kind = OutOfMemoryError if short else SessionError
            raise kind(f"injected: cannot {what}")

    def init(self: GraphDecoder, *args: Any, **options: Any) -> None:
        fail(0.3, "load")
        old_init(self, *args, **options)

    def step(self: GraphDecoder, *args: Any, **inputs: Any) -> Any:
        fail(0.08, "run")
        return old_step(self, *args, **inputs)

    monkeypatch.setattr(GraphDecoder, "step", step)
    ends = {"answers": 0, "errors": 0}
    engines = [Engine(made, max_rows=4, threads=1)]
    monkeypatch.setattr(GraphDecoder, "__init__", init)
    engines.append(Engine(made, max_rows=4, threads=1, serve="variants"))
    while injected[0] < 200:
        for engine in engines:
            requests = engine.submit(texts(12), [Budget(compute=BUDGETS[row % 3]) for row in range(12)], limits=LIMITS)
            finish(engine, lambda step, engine=engine, requests=requests: step == 3 and change(engine, requests))
            for request in requests:
                assert request.done
                assert (request.error is None) == bool(request.reasoning.answer) or isinstance(
                    request.error, SessionError
                )
                ends["errors" if request.error else "answers"] += 1
            assert engine.rows == 0
            assert not engine._scheduler.held
    assert injected[0] == 200
    assert ends["answers"] > 5 * ends["errors"] > 0
    for engine in engines:  # and then all is as before
        requests = engine.submit(texts(4), [None] * 4, limits=LIMITS)
        finish(engine)
        assert [request.error for request in requests] == [None] * 4


BUDGETS = (1.0, 0.7, 0.45)


def change(engine: Engine, requests: list[Request]) -> None:
    for request in requests[::2]:
        with contextlib.suppress(SessionError):
            engine.set_budget(request, Budget(compute=0.6))


def test_the_runtime_imports_fast_and_without_torch(made: Path, tmp_path: Path) -> None:
    # Beside the libraries it stands on, in processor time: how fast this machine is, and how loaded, is not the matter.
    code = (
        "import sys, time; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnx_ir')))\n"
        "start = time.process_time()\nimport numpy, onnxruntime, tokenizers\n"
        "libraries = time.process_time()\nfrom l2a_compress.runtime import Runtime\n"
        "print((time.process_time() - libraries) / (libraries - start))\n"
        "print(*{'asyncio', 'urllib.request', 'pandas'} & set(sys.modules))\n"
        f"print(Runtime.open({str(made)!r}, threads=1).generate([{TEXT!r}])[0].layers)"
    )
    # Compiled once, as where Python may write its bytecode.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    found = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
        ).stdout.splitlines()
        for _ in range(4)
    ]
    assert found[0][1:] == ["", "6"]
    assert min(float(ratio) for ratio, *_ in found[1:]) < 0.75


def test_a_tokenizer_that_is_none_is_one_error(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made, folder)
    (folder / "tokenizer.json").write_text("{}")
    data = json.loads((folder / "manifest.json").read_text())
    data["files"] = describe_bundle(folder)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"tokenizer\.json: .*export it again"):
        Runtime.open(folder)
    (folder / "if.onnx").write_bytes(b"no graph")
    data["files"] = describe_bundle(folder)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(SessionError, match=r"if\.onnx: onnxruntime cannot load it"):
        Runtime.open(folder)


def test_the_commands_select_and_bench(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "costs.json"
    common = ["--threads", "1", "--max-rows", "2"]
    assert main(["bench", str(made), *common, "--rounds", "1", "--out", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert len(CostTable.load(out).steps) == 3
    assert main(["select", str(made), *common]) == 0
    told = capsys.readouterr()
    assert "measuring" not in told.err  # by bench, before
    assert "host.memory_available" in told.out
    assert "term policy" in told.out
    policy = tmp_path / "policy.toml"
    policy.write_text("[tiers.flex]\nceiling = 0.7\n")
    command = ["run", str(made), TEXT, "--budget", "auto", "--tier", "flex", "--policy", str(policy), "--stats"]
    assert main([*command, "--max-think-tokens", "4"]) == 0
    stats = capsys.readouterr().out
    assert re.search(r"budget 0\.(7|45).* \((policy: ceiling 0\.7|pressure: .*|dwell: .*)\): cost 0\.", stats)
    same = ["--threads", "1", "--contract", "mean"]
    assert main(["bench", str(made), *same, "--max-rows", "1", "--rounds", "1"]) == 0
    assert main(["run", str(made), TEXT, *same, "--budget", "auto", "--max-think-tokens", "4"]) == 0
    assert "measuring" not in capsys.readouterr().err
    for bad, message in (
        (["bench", str(made), "--engine", "rust"], "engine must be one of python, native"),
        (["run", str(made), TEXT, "--budget", "most"], "--budget"),
        (["run", str(made), TEXT, "--budget", "auto", "--layers", "3"], "--layers"),
        (["run", str(made), TEXT, "--serve", "all"], "serve"),
        (["select", str(made), "--spot", "moon"], "--spot"),
        (["select", str(made), "--interval", "0"], "--interval"),
        (["select", str(made), "--interval", "1e20"], "--interval"),
        (["bench", str(made), "--threads", "-1"], "threads must be at least 0"),
        (["bench", str(made), "--rounds", "0"], "--rounds"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["select", str(made), *common, "--watch"]) == 130
