"""The controller: what the signals of a machine and the queue make of the budgets of requests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from l2a_compress.budget import Budget
from l2a_compress.errors import BundleError, OutOfMemoryError
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.runtime import Limits, Policy, Tier
from l2a_compress.runtime.chooser import Serve
from l2a_compress.runtime.controller import Controller
from l2a_compress.runtime.costs import measure
from l2a_compress.runtime.decoder import Array, GraphDecoder
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.request import Request
from toy_models import new_artifact
from toy_runtime import LIMITS, Clock, Told, finish, steered, table, texts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an ``If`` graph and variants, that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    export(new_artifact(folder), folder / "bundle", ExportOptions(budgets=(1.0, 0.7, 0.45), calibration=4))
    return folder / "bundle"


def test_a_squeeze_lowers_the_budget_at_once_and_dwell_raises_it_by_steps(made: Path) -> None:
    policy = Policy(dwell_seconds=2.0, pressures=("pressure.cpu_some",))
    controller, told, clock = steered(made, policy)
    limits = Limits(max_think_tokens=60, tau_threshold=None)
    auto, fixed = controller.engine.submit(texts(2), [None] * 2, limits=limits, tiers=["default", None])
    seen = []
    for tick in range(60):
        told.values["pressure.cpu_some"] = 0.9 if 10 <= tick < 20 else 0.0
        clock.now += 0.2
        controller.update()
        controller.engine.step()
        seen.append(auto.budget.compute)
    assert seen[:10] == [1.0] * 10
    assert seen[10:20] == [0.45] * 10
    assert 0.7 in seen
    assert seen[-1] == 1.0
    assert seen == sorted(seen[:10]) + sorted(seen[10:])  # it only rises after the squeeze
    assert controller.switches <= 4  # down, the cap on heads, and two steps up
    assert fixed.budget == Budget()
    assert controller.readings["pressure.cpu_some"].value == 0.0


def test_caps_that_come_and_go_do_not_flap(made: Path) -> None:
    controller, told, clock = steered(made, Policy(dwell_seconds=5.0, pressures=("pressure.cpu_some",)))
    for tick in range(300):  # a minute
        told.values["pressure.cpu_some"] = 0.5 if tick % 2 else 0.0
        clock.now += 0.2
        controller.update()
    assert 1 <= controller.switches <= 30


def test_memory_that_is_short_pauses_admission_and_patience_ends(made: Path) -> None:
    controller, told, clock = steered(made, Policy(patience_seconds=3.0))
    engine = controller.engine
    told.values["host.memory_available"] = 0.0
    # What the loaded graph holds is counted as free for another one: 1e6 of the largest, of which 0.45e6 are needed.
    assert controller.budget().compute < 1.0
    controller.table = table(1.0)
    controller._tiers.clear()
    told.values["host.memory_available"] = -1e6
    for seconds in (None, 1.0):  # whoever is late while it waits is not forgotten either
        (request,) = engine.submit(texts(1), [None], tiers=["default"], seconds=seconds)
        for _ in range(20):
            clock.now += 0.2
            controller.update()
            engine.step()
        assert isinstance(request.error, OutOfMemoryError)
        assert "no memory for 3 s" in str(request.error)
    told.values["host.memory_available"] = 1e9
    (request,) = engine.submit(texts(1), [None], limits=LIMITS, tiers=["default"])
    clock.now += 1.0
    controller.update()
    finish(engine)
    assert request.error is None


def test_as_many_rows_run_as_memory_has_room_for(made: Path) -> None:
    controller, _, clock = steered(made, Policy(patience_seconds=3.0))
    engine, (text,) = controller.engine, texts(1)
    controller.table = table(1.0)
    room = 1e6 + 2.5 * 10 * (len(text) + controller._new)  # for two rows, by the table
    controller._values = lambda: {"host.memory_available": room}  # type: ignore[method-assign]
    requests = engine.submit([text] * 4, [None] * 4, limits=LIMITS, tiers=["default"] * 4)
    for rows in range(3):
        controller.update(force=True)
        assert (engine.rows, engine.paused) == (rows, rows == 2)
        engine.max_rows = rows + 1
        engine.step()
        engine.max_rows = 4
    for _ in range(40):
        clock.now += 0.1
        controller.update()
        engine.step()
    assert [(request.done, request.error) for request in requests] == [(True, None)] * 4


def test_who_was_interrupted_comes_back_though_nobody_may_begin(made: Path) -> None:
    controller, told, clock = steered(made, Policy(patience_seconds=3.0))
    engine = controller.engine
    first, second = engine.submit(texts(2), [None] * 2, limits=LIMITS, tiers=["default"] * 2)
    engine.step()
    told.values["host.memory_available"] = -1e9
    (third,) = engine.submit(texts(1), [None], limits=LIMITS, tiers=["default"])
    controller.update()
    clock.now += 2.0
    engine._scheduler.preempt(second, keep=False)
    clock.now += 2.0
    controller.update()
    assert engine.paused
    assert (first.error, second.error, type(third.error)) == (None, None, OutOfMemoryError)
    engine.step()
    assert engine.running == [first, second]


def test_stale_readings_decide_nothing(made: Path) -> None:
    controller, told, clock = steered(made, Policy(stale_seconds=5.0, pressures=("pressure.cpu_some",)))
    told.values["pressure.cpu_some"] = 0.9
    for ahead, last in ((1.0, "pressure"), (10.0, "dwell")):
        clock.now = time.monotonic() + ahead  # readings are made on the clock of the system
        controller.update(force=True)
        assert controller.decision is not None
        assert controller.decision.terms[-1].name == last


def test_a_tier_that_was_idle_is_decided_anew(made: Path) -> None:
    policy = Policy(pressures=("pressure.cpu_some",), tiers={"batch": Tier()})
    controller, told, clock = steered(made, policy)
    told.values["pressure.cpu_some"] = 0.0
    assert controller.budget("batch").compute == 1.0
    told.values["pressure.cpu_some"] = 0.9
    clock.now += 0.05
    assert controller.budget("batch").compute == 1.0
    clock.now += 60.0
    assert controller.budget("batch").compute == 0.45


def test_a_slow_gate_does_not_make_decisions_nest(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, told, clock = steered(made, Policy(pressures=("pressure.cpu_some",)))
    engine, calls = controller.engine, []
    requests = engine.submit(texts(3), [None] * 3, limits=LIMITS, tiers=["default"] * 3)

    def slow(request: Request, budget: Budget) -> None:
        calls.append(request)
        clock.now += 1.0

    monkeypatch.setattr(engine, "set_budget", slow)
    told.values["pressure.cpu_some"] = 0.9
    controller.update()
    assert calls == requests


def test_a_notice_ages(made: Path) -> None:
    controller, told, clock = steered(made, Policy(stale_seconds=1e9))
    clock.now = time.monotonic()
    told.values["spot.seconds_left"] = 30.0
    controller.update(force=True)
    clock.now = controller.readings["spot.seconds_left"].at + 12.0
    assert controller._values()["spot.seconds_left"] == 18.0
    clock.now += 100.0
    assert controller._values()["spot.seconds_left"] == 0.0


def test_a_deadline_and_a_queue_shorten_the_reasoning(made: Path) -> None:
    controller, _, clock = steered(made, Policy(target_seconds=2.0))
    engine = controller.engine
    (urgent,) = engine.submit(texts(1), [None], tiers=["default"], seconds=0.5)
    clock.now += 0.2
    controller.update()
    decision = controller.decision
    assert decision is not None
    assert decision.binding.name == "time"
    assert urgent.budget.compute == 0.45
    cap = engine.bundle.gates["think_reference"] // 2
    assert urgent.budget.think_tokens == cap
    engine.step()
    clock.now += 9.0
    controller.update()
    assert urgent.budget == Budget(compute=0.45, think_tokens=cap)  # it has been told: it stays
    engine.cancel(urgent)
    engine.submit(texts(40), [None] * 40, tiers=["default"] * 40)
    clock.now += 0.2
    controller.update()
    assert controller.decision is not None
    assert controller.decision.binding.name == "queue"


def test_who_cannot_be_in_time_any_more_holds_nobody_down(made: Path) -> None:
    controller, _, clock = steered(made, Policy(dwell_seconds=0.0, target_seconds=1e6))
    engine = controller.engine
    engine.max_rows = 1
    limits = Limits(max_think_tokens=60, tau_threshold=None)
    running, waiting, late = (
        engine.submit(texts(1), [None], limits=limits, tiers=["default"], seconds=seconds)[0]
        for seconds in (0.5, None, 9.0)
    )
    engine.step()
    controller.update(force=True)
    assert controller.budget().compute == 0.45
    clock.now += 2.0  # its time is over
    controller.update(force=True)
    assert (running.done, controller.budget().compute) == (False, 1.0)
    engine._scheduler.waiting.remove(late)
    engine._scheduler.late.append(late)
    clock.now += 6.9
    controller.update(force=True)
    assert controller.budget().compute == 1.0
    engine.cancel(running)
    assert waiting in engine.waiting


def test_a_running_request_that_even_the_least_does_not_help_holds_nobody_down(made: Path) -> None:
    controller, _, clock = steered(made, Policy(dwell_seconds=0.0, target_seconds=1e6))
    engine = controller.engine
    limits = Limits(max_think_tokens=60, tau_threshold=None)
    least = controller.table.steps[-1]
    running, other = (engine.submit(texts(1), [None], limits=limits, tiers=["default"])[0] for _ in range(2))
    engine.step()
    needs = least.seconds(controller._rest(running, controller._work([])))
    for left, budget in ((1.1 * needs, 0.45), (0.9 * needs, 1.0)):
        running.deadline = clock.now + left
        controller.update(force=True)
        assert controller.budget().compute == budget
        clock.now += 1.0
    for request in (running, other):
        engine.cancel(request)


def test_who_was_interrupted_does_not_count_as_one_that_waits_for_its_first_token(made: Path) -> None:
    controller, _, clock = steered(made, Policy())
    engine = controller.engine
    (running,) = engine.submit(texts(1), [None], limits=Limits(max_think_tokens=60, tau_threshold=None))
    engine.step()
    clock.now += 30.0
    engine.submit(texts(1), [None], limits=LIMITS)
    clock.now += 1.0
    engine._scheduler.preempt(running, keep=False)
    assert controller.signals.read()["queue.oldest_seconds"].value == pytest.approx(1.0)


def test_who_is_late_gives_way_to_those_that_can_be_in_time(made: Path) -> None:
    clock = Clock()
    engine = Engine(made, max_rows=1, threads=1, clock=clock)
    first, second, third = (engine.submit(texts(1), [None], limits=LIMITS, seconds=1.0)[0] for _ in range(3))
    (free,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    clock.now += 2.0
    (fresh,) = engine.submit(texts(1), [None], limits=LIMITS, seconds=1.0)
    engine.cancel(third)
    order = []
    finish(engine, lambda _: order.extend(r for r in engine.running if r not in order))
    assert order == [first, free, fresh, second]  # the first one had begun
    assert not engine.hopeless
    assert second.reasoning.answer
    assert second.error is None
    assert not third.written
    # By what the last one took, one of the next two can be in time.
    engine = Engine(made, max_rows=1, threads=1, clock=clock)
    (slow,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    clock.now += 10.0
    finish(engine)
    assert slow.done
    assert engine._scheduler.service == pytest.approx(1.0)
    hopeless, hopeful = (engine.submit(texts(1), [None], limits=LIMITS, seconds=seconds)[0] for seconds in (0.9, 1.1))
    order = []
    finish(engine, lambda _: order.extend(r for r in engine.running if r not in order))
    assert order == [hopeful, hopeless]


def test_the_service_sees_that_others_take_the_machine(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, _, clock = steered(made, Policy())
    engine = controller.engine
    engine.submit(texts(1), [None], limits=Limits(max_think_tokens=60, tau_threshold=None))
    step = GraphDecoder.step

    def slow(self: GraphDecoder, tokens: Array, mask: Array, **inputs: Any) -> Any:
        clock.now += 0.02  # the table says 0.01
        return step(self, tokens, mask, **inputs)

    monkeypatch.setattr(GraphDecoder, "step", slow)
    for _ in range(12):
        engine.step()
    controller.update(force=True)
    contention = controller.readings["service.contention"].value
    assert contention == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("serve", ["if", "variants"])
def test_long_contexts_are_not_others(made: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    clock, others = Clock(), [1.0]
    step = GraphDecoder.step

    def timed(self: GraphDecoder, tokens: Array, mask: Array, **inputs: Any) -> Any:
        clock.now += others[0] * (0.01 * tokens.size + 1e-4 * int(mask.sum()))
        return step(self, tokens, mask, **inputs)

    monkeypatch.setattr(GraphDecoder, "step", timed)
    monkeypatch.setattr("l2a_compress.runtime.costs.peak_of", lambda _: 1)
    engine = Engine(made, max_rows=2, threads=1, clock=clock, serve=serve)
    controller = Controller(engine, measure(engine, rounds=1))

    def contention() -> float | None:
        for _ in range(12):
            engine.step()
        return controller.signals.read()["service.contention"].value

    long = [*[5] * 400, engine.tags.think]
    engine.submit([long], [None], limits=Limits(max_think_tokens=60, tau_threshold=None))
    assert contention() == pytest.approx(0.0, abs=0.05)
    engine.submit(texts(1), [None], limits=Limits(max_think_tokens=60, tau_threshold=None))
    assert contention() == pytest.approx(0.0, abs=0.05)
    others[0] = 2.0
    clock.now += 2.0
    assert contention() == pytest.approx(0.5, abs=0.05)


def test_a_bundle_without_a_router_is_not_steered(made: Path) -> None:
    engine = Engine(made, threads=1)
    graphs = tuple(graph for graph in engine.bundle.graphs if graph.kind != "router")
    object.__setattr__(engine.bundle, "graphs", graphs)
    with pytest.raises(BundleError, match="router"):
        Controller(engine, table(1.0))
    (request,) = engine.submit(texts(1), [None])
    engine.step()
    with pytest.raises(BundleError, match="router"):
        engine.set_budget(request, Budget(compute=0.5))


def test_a_queue_that_is_long_is_no_lack_of_memory(made: Path) -> None:
    controller, told, clock = steered(made, Policy(patience_seconds=3.0))
    engine = controller.engine
    requests = engine.submit(texts(3), [None] * 3, limits=LIMITS, tiers=["default"] * 3)
    clock.now += 10.0  # all that while they wait for a row
    told.values["host.memory_available"] = -1e9
    controller.update(force=True)
    assert engine.paused
    assert [request.error for request in requests] == [None] * 3
    clock.now += 2.0
    controller.update(force=True)
    assert requests[0].error is None
    clock.now += 2.0
    controller.update(force=True)
    assert isinstance(requests[0].error, OutOfMemoryError)
    told.values["host.memory_available"] = 1e9
    clock.now += 1.0
    controller.update(force=True)
    told.values["host.memory_available"] = -1e9
    clock.now += 1.0
    controller.update(force=True)  # the next shortage begins anew
    assert requests[1].error is None


def test_what_is_only_reserved_is_not_free(made: Path) -> None:
    controller, told, _ = steered(made, Policy(memories=("host.memory_available", "gpu.memory_free")))
    engine = controller.engine
    engine.submit(texts(1), [None], limits=Limits(max_think_tokens=400, tau_threshold=None))
    engine.step()
    (lane,) = engine.lanes
    told.values["host.memory_available"] = 5e6
    controller.update(force=True)
    controller.readings["gpu.memory_free"] = controller.readings["host.memory_available"]
    found = controller._values()
    (request,) = engine.running
    assert found["host.memory_available"] == 5e6 + 1e6 + request.length * lane.caches.token_bytes
    assert found["gpu.memory_free"] == 5e6 + 1e6


def test_a_graph_that_is_not_loaded_holds_no_memory(made: Path) -> None:
    clock, told = Clock(), Told()
    engine = Engine(made, max_rows=4, threads=1, clock=clock, serve="variants")
    controller = Controller(engine, table(1.0, 0.7, 0.45, serve="variants"), Policy(memory_reserve_bytes=0.0), [told])
    told.values["host.memory_available"] = 0.5e6
    assert controller.budget().compute == 0.45  # nothing is loaded whose memory would be free
    engine.submit(texts(1), [Budget(compute=0.7)], limits=LIMITS)
    engine.step()
    assert engine.loaded_budgets == {0.7}
    clock.now += 1.0
    controller.update(force=True)
    decision = controller.decision
    assert decision is not None
    assert {term.name: term.budget for term in decision.terms}["memory"] == 1.0


def test_who_has_waited_is_told_its_cap_like_any_other(made: Path) -> None:
    clock = Clock()
    engine = Engine(made, max_rows=2, max_graphs=1, threads=1, clock=clock, serve="variants")
    (first,) = engine.submit(texts(1), [None], limits=Limits(max_think_tokens=60, tau_threshold=None))
    engine.step()
    (second,) = engine.submit(texts(1), [Budget(compute=0.45)], limits=LIMITS, seconds=1.0)
    engine.step()  # its graph is chosen, and cannot be loaded
    assert second.kept is not None
    assert second.started is None
    clock.now += 5.0
    (third,) = engine.submit(texts(1), [None], limits=LIMITS)
    engine.step()
    assert len(engine.hopeless) == 1
    assert third in engine.running
    assert not first.done
