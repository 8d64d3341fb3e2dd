"""Continuous batching says what PyTorch says, whatever else is in the batch, and refuses what it cannot run."""

from __future__ import annotations

import ctypes
import math
import random
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch

from l2a_compress._cli import main
from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import BudgetError, BundleError, ConfigError
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.limits import Contract, limits_of
from l2a_compress.modeling.generation import GenerationConfig, generate
from l2a_compress.runtime.caches import Caches
from l2a_compress.runtime.engine import Engine, Runs
from l2a_compress.runtime.lane import Lane
from l2a_compress.runtime.request import Limits, Request
from l2a_compress.runtime.runtime import Runtime
from l2a_compress.runtime.sampling import Sampler, Sampling
from l2a_compress.training.store import load_artifact
from toy_models import new_artifact, prompts

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.45)
LIMITS = Limits(max_think_tokens=9, max_answer_tokens=4, tau_threshold=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, bundle) that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    artifact = new_artifact(folder)
    export(artifact, folder / "bundle", ExportOptions(budgets=()))
    return artifact, folder / "bundle"


@pytest.fixture
def engine(made: tuple[Path, Path]) -> Engine:
    return Engine(made[1], max_rows=3, threads=1)


def texts(count: int) -> list[list[int]]:
    """Prompts of several lengths."""
    ids, mask = prompts(count, 12, seed=3)
    return [row[held.bool()].tolist() for row, held in zip(ids, mask, strict=True)]


def finish(engine: Engine) -> None:
    for _ in range(500):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("requests do not end")


def written(request: Request) -> tuple[list[int], list[int], str]:
    return request.reasoning.think, request.reasoning.answer, request.reasoning.stopped_by


def test_each_request_is_what_pytorch_generates_alone(made: tuple[Path, Path], engine: Engine) -> None:
    loaded = load_artifact(made[0])
    asked = [Budget(compute=BUDGETS[row % 6], think_tokens=(None, 5)[row % 2]) for row in range(16)]
    requests = engine.submit(texts(16), asked, limits=LIMITS)
    finish(engine)
    config = GenerationConfig(max_think_tokens=9, max_answer_tokens=4, tau_threshold=0.5)
    stopped = set()
    for request in requests:
        (expected,) = generate(
            loaded.gated,
            engine.tags,
            torch.tensor([request.prompt]),
            torch.ones(1, len(request.prompt), dtype=torch.long),
            budgets=[request.budget],
            config=config,
        )
        assert written(request) == (expected.think, expected.answer, expected.stopped_by)
        assert expected.allocation is not None
        assert request.kept == tuple(len(groups) for groups in expected.allocation.groups)
        assert len(request.reasoning.think) <= (request.budget.think_tokens or 9)
        assert request.reasoning.answer
        stopped.add(request.reasoning.stopped_by)
    assert len(stopped) > 1


def test_the_order_and_company_of_requests_change_nothing(made: tuple[Path, Path]) -> None:
    sampling = [Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=row) for row in range(8)]
    found = []
    for rows, order in ((1, range(8)), (3, range(8)), (8, reversed(range(8)))):
        engine = Engine(made[1], max_rows=rows, threads=1)
        requests = {}
        for row in order:  # some come while others run
            budget = Budget(compute=BUDGETS[row % 6])
            (requests[row],) = engine.submit([texts(8)[row]], [budget], limits=LIMITS, sampling=sampling[row])
            engine.step()
        finish(engine)
        found.append([written(requests[row]) for row in range(8)])
    assert found[0] == found[1] == found[2]


def test_a_request_has_written_every_token(engine: Engine) -> None:
    requests = engine.submit(texts(5), [None] * 5, limits=LIMITS)
    finish(engine)
    tags = engine.tags
    for request in requests:
        think, answer, _ = written(request)
        assert request.written == [*think, tags.end_think, tags.answer, *answer, tags.end_answer]
        assert request.done


def test_a_request_that_is_cancelled_makes_room(engine: Engine) -> None:
    first = engine.submit(texts(4), [None] * 4, limits=LIMITS)  # three rows: the last one waits
    engine.step()
    engine.cancel(first[0])
    engine.cancel(first[3])
    (later,) = engine.submit([texts(1)[0]], [None], limits=LIMITS)
    finish(engine)
    assert len(first[0].written) < len(later.written)
    assert first[3].written == []
    assert written(later)[1]


def test_what_cannot_run_is_refused_at_once(engine: Engine) -> None:
    think = engine.tags.think
    for prompt, message in (
        ([5, 10**6, think], "token id 1000000"),
        ([5, -1, think], "token id -1"),
        ([5, 6], "must end in <think>"),
        ([], "must end in <think>"),
        ([5] * 4000 + [think], "positions of the bundle"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit([[5, think], prompt], [None, None])
    with pytest.raises(BudgetError, match="always-on"):
        engine.submit([[5, think]], [Budget(compute=0.01)])
    for limits in ({"max_think_tokens": -1}, {"max_answer_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(limits))):
            Limits(**limits)
    assert not engine.busy


def test_a_bundle_without_an_if_graph_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    export(made[0], tmp_path / "bundle", ExportOptions(budgets=(1.0,), calibration=4, if_graph=False))
    with pytest.raises(BundleError, match="--if-graph"):
        Engine(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="max_rows"):
        Engine(made[1], max_rows=0)


def test_text_comes_whole_and_in_pieces(made: tuple[Path, Path]) -> None:
    runtime = Runtime.open(made[1], threads=1)
    prompts = ["Ann has 3 apples.", "Bob has 5 pears and eats 2."]
    budgets = [Budget(compute=1.0), Budget(compute=0.6)]
    together = runtime.generate(prompts, budgets, limits=LIMITS)
    for prompt, budget, expected in zip(prompts, budgets, together, strict=True):
        *pieces, answer = runtime.stream(prompt, budget, limits=LIMITS)
        assert answer == expected
        assert expected.cost <= budget.compute
        text = "".join(map(str, pieces))
        assert text.count("</think>") == text.count("<answer>") == text.count("</answer>") == 1
        assert text.index("</think>") < text.index("<answer>")
    with pytest.raises(ConfigError, match="think or answer tag"):
        runtime.encode("a <think> b")
    assert runtime.encode("Ann")[-1] == runtime.engine.tags.think


def test_the_command_answers_and_tells_what_ran(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(made[1]), "Ann has 3 apples.", "--budget", "0.6", "--max-think-tokens", "5", "--stats"]
    assert main(command) == 0
    *text, stats = capsys.readouterr().out.strip().splitlines()
    assert "</answer>" in "".join(text)
    (expected,) = Runtime.open(made[1]).generate(
        ["Ann has 3 apples."], Budget(compute=0.6), limits=Limits(max_think_tokens=5, max_answer_tokens=64)
    )
    assert f"cost {expected.cost:.3f}, {expected.layers} of 6 layers" in stats
    assert f"{expected.think_tokens} think tokens, ended by {expected.stopped_by}" in stats
    assert f"and {expected.answer_tokens} of the answer; first token" in stats
    drawn = ["--temperature", "0.9", "--top-k", "5", "--top-p", "0.9", "--seed", "3", "--stop", "7", "--threads", "1"]
    assert main([*command, *drawn]) == 0
    (expected,) = Runtime.open(made[1], threads=1).generate(
        ["Ann has 3 apples."],
        Budget(compute=0.6),
        limits=Limits(max_think_tokens=5, max_answer_tokens=64, stop=("7",)),
        sampling=Sampling(temperature=0.9, top_k=5, top_p=0.9, seed=3),
    )
    assert f"and {expected.answer_tokens} of the answer; first token" in capsys.readouterr().out
    assert main([*command[:3], "--budget", "1.5"]) == 2
    assert "budget.compute" in capsys.readouterr().err
    assert main(["run", str(made[0]), "x"]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_the_command_takes_a_contract(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    limits = Limits(max_think_tokens=5, max_answer_tokens=64)
    told = set()
    for contract in get_args(Contract):
        options = ["--contract", contract, "--budget", "0.6", "--max-think-tokens", "5", "--stats"]
        assert main(["run", str(made[1]), "Ann has 3 apples.", *options]) == 0
        stats = capsys.readouterr().out.strip().splitlines()[-1]
        runtime = Runtime.open(made[1], contract=contract)
        (expected,) = runtime.generate(["Ann has 3 apples."], Budget(compute=0.6), limits=limits)
        assert f"cost {expected.cost:.3f}, {expected.layers} of 6 layers, {expected.heads} of" in stats
        told.add(stats.partition("; ")[0])
    assert len(told) == 2
    assert main(["run", str(made[1]), "Ann", "--contract", "most"]) == 2
    assert "--contract must be one of cap, mean, found 'most'" in capsys.readouterr().err


def test_a_stream_nobody_listens_to_ends(made: tuple[Path, Path]) -> None:
    runtime = Runtime.open(made[1], threads=1)
    stream = runtime.stream("Ann has 3 apples.", limits=LIMITS)
    next(stream)
    stream.close()
    assert not runtime.engine.busy
    dropped = runtime.stream("Ann has 3 apples.", limits=LIMITS)
    assert runtime.engine.busy
    del dropped  # before its first piece
    assert not runtime.engine.busy


def test_prompts_are_refused_together(made: tuple[Path, Path]) -> None:
    runtime = Runtime.open(made[1], threads=1)
    with pytest.raises(ConfigError, match="positions"):
        runtime.generate(["Ann", "Ann " * 3000])
    with pytest.raises(ConfigError, match="1 budgets for 2 prompts"):
        runtime.generate(["Ann", "Bob"], [Budget()])
    with pytest.raises(ConfigError, match="a list of texts"):
        runtime.generate("Ann")
    assert not runtime.engine.busy


def test_a_contract_that_there_is_not_is_refused(made: tuple[Path, Path]) -> None:
    for engine in get_args(Runs):
        with pytest.raises(ConfigError, match="contract must be one of cap, mean, found 'Cap'"):
            Engine(made[1], contract="Cap", engine=engine)  # type: ignore[arg-type]
    bundle = Bundle.load(made[1])
    with pytest.raises(ConfigError, match="contract must be one of cap, mean"):
        limits_of(Budget(), bundle.cost, 1, contract="Cap")  # type: ignore[arg-type]


def test_what_a_device_reads_is_bound_again_before_each_run(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    bind = ort.IOBinding.bind_ortvalue_input

    def noted(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
        bound.append(name)
        bind(binding, name, value)

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", noted)
    found = []
    for device in (False, True):
        engine = Engine(made[1], max_rows=2, threads=1)
        (lane,) = engine.lanes
        assert isinstance(lane, Lane)
        monkeypatch.setattr(lane._decoder, "_copied", device)
        requests = engine.submit([[3, 5, engine.tags.think]] * 2, [None] * 2, limits=Limits(max_think_tokens=3))
        bound.clear()
        engine.step()
        engine.step()
        past = len(lane.caches.inputs)
        # Two prompts, the first step of both together, and where a device reads before each of the four runs.
        assert len(bound) == past * (3 + 4 * device)
        while engine.busy:
            engine.step()
        found.append([request.written for request in requests])
    assert found[0] == found[1]


def test_caches_keep_what_they_hold_while_they_grow() -> None:
    caches = Caches({"past_key_values.0.key": (2, 4, "tensor(float)")})
    assert caches.token_bytes == 32
    caches.reserve(2, 8)
    first = caches.view(1, 1)["past_key_values.0.key"]
    assert first.shape == (1, 2, 8, 4)
    values = np.arange(2 * 8 * 4, dtype=np.float32).reshape(1, 2, 8, 4)
    first[:] = values
    caches.reserve(2, 9, [0, 8])
    assert caches.capacity == 12  # by half
    np.testing.assert_array_equal(caches.view(1, 1)["past_key_values.0.key"][:, :, :8], values)
    caches.move(1, 0, 5)
    np.testing.assert_array_equal(caches.view(0, 1)["past_key_values.0.key"][:, :, :5], values[:, :, :5])
    caches.reserve(1, 4)
    assert (caches.rows, caches.capacity) == (2, 12)


def resident() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_caches_take_what_was_written_and_give_it_back() -> None:
    size = 1 << 20
    names = ("past_key_values.0.key", "past_key_values.1.key")
    caches = Caches(dict.fromkeys(names, (1, 16, "tensor(float)")))
    before = resident()
    caches.reserve(4, size // 16)  # 4 MB for each row and layer
    assert (caches.resident_bytes, caches.unwritten([])) == (0, 0)
    assert resident() - before < 3 << 20
    caches.view(0, 1)[names[0]][:] = 1.0
    caches.view(3, 1)[names[0]][:] = 1.0
    caches.mark(0, size // 16)
    assert 8 << 20 <= caches.resident_bytes <= 12 << 20
    caches.reserve(4, size // 16 + 1, [100])
    assert caches.view(0, 1)[names[0]][0, 0, :101, 0].tolist() == [1.0] * 100 + [0.0]
    assert 100 * caches.token_bytes <= caches.resident_bytes <= 4 << 20
    assert resident() - before < 5 << 20  # neither rows that nobody has, nor layers that nobody wrote
    caches.clear()
    assert (caches.rows, caches.resident_bytes, resident() - before < 3 << 20) == (0, 0, True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("capacity", [2000, 100_000])
def test_short_rows_of_long_buffers_count_by_the_pages_that_they_begin(capacity: int) -> None:
    caches = Caches({f"past_key_values.{layer}.key": (3, 16, "tensor(float)") for layer in range(30)})
    caches.reserve(4, capacity)
    for lengths in ([0, 20], [20, 20], [40, 20, 0, 5]):
        wanted, held, before = caches.unwritten(lengths), caches.resident_bytes, resident()
        for row, tokens in enumerate(lengths):
            caches.mark(row, tokens)
            for view in caches.view(row, 1).values():
                view[0, :, :tokens] = 1.0
        assert caches.resident_bytes - held == wanted
        assert wanted == pytest.approx(resident() - before, abs=2 << 20)  # 64 token bytes each: 0.3 MB at most
    assert caches.unwritten([40, 20, 0, 5]) == 0
    assert caches.unwritten([40] * 5) > caches.resident_bytes  # in buffers of their own


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_no_huge_pages_are_left_what_is_held_is_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2a_compress.runtime.pages._has_huge_pages", lambda: True)
    set_thp_disable, library = 41, ctypes.CDLL(None)
    assert library.prctl(set_thp_disable, 1, 0, 0, 0) == 0
    try:
        caches = Caches({f"past_key_values.{layer}.key": (3, 16, "tensor(float)") for layer in range(30)})
        caches.reserve(4, 2000)
        before = resident()
        for row in range(4):
            caches.mark(row, 20)
            for view in caches.view(row, 1).values():
                view[0, :, :20] = 1.0
        held = caches.resident_bytes
        assert held == pytest.approx(resident() - before, abs=1 << 20)
        assert held < 3 << 20
        assert caches.unwritten([2000] * 4) >= 30 * 4 * 3 * 2000 * 64 - held  # all of the rest, though pages are begun
    finally:
        library.prctl(set_thp_disable, 0, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("layers", "capacity"), [(30, 100), (30, 2000), (8, 40_000)])
def test_what_rows_of_before_hold_is_given_back_and_what_rows_hold_is_not(layers: int, capacity: int) -> None:
    caches = Caches({f"past_key_values.{layer}.key": (3, 16, "tensor(float)") for layer in range(layers)})
    caches.reserve(4, capacity)
    for row in (0, 1, 3):
        caches.mark(row, capacity)
        for view in caches.view(row, 1).values():
            view[:] = 7.0
    held, before = caches.resident_bytes, resident()
    caches.trim([capacity, 20])
    given = before - resident()
    assert given > 0
    assert given == pytest.approx(held - caches.resident_bytes, abs=layers * 5 << 12)  # pages that are not whole
    for view in caches.view(0, 2).values():
        assert (view[0] == 7.0).all()
        assert (view[1, :, :20] == 7.0).all()
    assert caches.unwritten([capacity, 20]) == 0
    caches.trim([])
    assert caches.resident_bytes == 0
    assert not any(view.any() for view in caches.view(0, 4).values())


def test_sampling_follows_its_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    counts = np.bincount([sampler.token(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=4 * math.sqrt(0.25 / 20_000))
    for settings, allowed in (({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.81}, {0, 1, 2})):
        sampler = Sampler(Sampling(temperature=1.0, **settings))
        assert {sampler.token(logits) for _ in range(500)} == allowed
    assert Sampler(Sampling()).token(logits[::-1].copy()) == 3
    draw = random.Random(0)
    for _ in range(50):
        rows = np.array([draw.gauss(0, 5) for _ in range(30)])
        again = [Sampler(Sampling(temperature=0.7, seed=4)).token(rows) for _ in range(3)]
        assert len(set(again)) == 1


def drawn(logits: np.ndarray[Any, Any], settings: Sampling, uniform: float) -> int:
    """A token by all of the vocabulary in order, as it is defined."""
    scaled = logits.astype(np.float64) / settings.temperature
    order = np.argsort(-scaled, kind="stable")[: settings.top_k or None]
    chances = np.exp(scaled[order] - scaled.max())
    chances /= chances.sum()
    if settings.top_p < 1:
        chances = chances[: int(np.searchsorted(chances.cumsum(), settings.top_p)) + 1]
        chances /= chances.sum()
    return int(order[min(int(np.searchsorted(chances.cumsum(), uniform, side="right")), len(chances) - 1)])


@pytest.mark.parametrize("top_k", [0, 1, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.01])
def test_a_draw_that_does_not_sort_the_vocabulary_is_the_same(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(0)
    for temperature in (0.3, 1.0, 50.0):  # the last needs more than is sorted at first
        settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
        sampler, uniforms = Sampler(settings), np.random.default_rng(7)
        for number, size in enumerate((7, 300, 6000) * 8):
            logits = 3 * rng.normal(size=size).astype(np.float32)
            logits = np.round(logits) if number % 2 else logits  # with many that are equal
            assert sampler.token(logits) == drawn(logits, settings, uniforms.random())


def test_where_the_largest_logit_is_infinite_it_is_drawn() -> None:
    common = np.array([1, 2, 1.5, 0], dtype=np.float32)
    for temperature in (1e-308, 1e-310):
        sampler = Sampler(Sampling(temperature=temperature))
        assert sampler.token(common) == 1
    sampler, other = (Sampler(Sampling(temperature=1.0, seed=2)) for _ in range(2))
    assert sampler.token(np.array([0, np.inf, 1, -np.inf], dtype=np.float32)) == 1
    other.token(common)
    assert [sampler.token(common) for _ in range(9)] == [other.token(common) for _ in range(9)]  # it was a draw


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}],
)
def test_bad_sampling_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
