"""Runs by generation: rows do not depend on their batch, and a point says what its rows did."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError, DataError
from l2a_compress.evaluation import points
from l2a_compress.evaluation.baselines import BASELINES, Context, baseline_runs, known_baselines
from l2a_compress.evaluation.frontier import evaluating
from l2a_compress.evaluation.points import Bench, allocate, dense_run, measure, point_of
from l2a_compress.evaluation.prompts import held_out, plan_batches
from l2a_compress.evaluation.values import THINK_BIN, Measured, Point, Row, Run
from l2a_compress.evaluation.workers import measure_runs
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.generation import generate
from l2a_compress.modeling.importance import drop_losses
from l2a_compress.modeling.search import greedy_path
from l2a_compress.modeling.tags import read_tags
from l2a_compress.reasoning import Tags
from l2a_compress.training.collate import Collator, left_padded
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.encode import encode
from toy_data import word_tokenizer
from toy_evaluation import THINK, new_bench
from toy_models import GROUPS, LAYERS, new_gated, prompts, random_allocations


@pytest.fixture(scope="module")
def bench() -> Bench:
    return new_bench()


def point(bench: Bench, run: Run, measured: Measured | None = None) -> Point:
    return point_of(run, measured or measure(bench, run), bench.gated.cost, metric="accuracy", seed=0)


def mixed(bench: Bench) -> Run:
    """A run whose problems have different allocations."""
    allocations = tuple(random_allocations(len(bench.problems)))
    return Run(name="l2a", budget=Budget(compute=0.9), contract="cap", allocations=allocations)


def test_the_problems_are_held_out_and_end_in_think(bench: Bench) -> None:
    think = read_tags(bench.tokenizer).think
    assert {problem.prompt[-1] for problem in bench.problems} == {think}
    assert {problem.tag("difficulty") for problem in bench.problems} >= {"easy", "hard"}
    assert len({problem.prompt for problem in bench.problems}) == 9


def test_evaluation_fuses_attention_and_leaves_the_model_as_it_was() -> None:
    gated, (ids, mask) = new_gated(), prompts()
    gated.model.set_attn_implementation("eager")
    gated.train()
    with torch.no_grad(), pytest.raises(KeyError), evaluating(gated):
        assert (gated.model.config._attn_implementation, gated.training) == ("sdpa", False)
        fused = gated(ids, mask).hidden
        raise KeyError
    assert (gated.model.config._attn_implementation, gated.training) == ("eager", True)
    with torch.no_grad():
        plain = gated.eval()(ids, mask).hidden
    torch.testing.assert_close(fused[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)


def test_batched_rows_equal_rows_run_alone(bench: Bench) -> None:
    run = mixed(bench)
    assert len(set(run.allocations)) > 5
    together = measure(bench, run).rows
    alone = measure(dataclasses.replace(bench, batch_size=1), run).rows
    assert together == alone


def test_rows_that_are_lost_are_run_again_to_the_same_end(bench: Bench) -> None:
    run, wide = mixed(bench), dataclasses.replace(bench.generation, max_think_tokens=40)
    short, long = (
        dataclasses.replace(
            bench, generation=wide, problems=[dataclasses.replace(problem, length=length) for problem in bench.problems]
        )
        for length in (1, 1000)
    )
    told: list[int] = []
    rows = measure(short, run, lambda label, count: told.append(count)).rows
    assert sum(told) == 9
    assert max(row.think or 0 for row in rows) > 9  # what the first try allows
    assert rows == measure(long, run).rows


def test_references_are_not_tried_on_where_no_row_writes_its_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tried = dataclasses.replace(dense_run(bench), style=None), []

    def counting(gated: GatedModel, tags: Tags, ids: torch.Tensor, *rest: object, **options: object) -> list[None]:
        tried.append(len(ids))
        return [None] * len(ids)

    rows = measure(bench, run).rows
    monkeypatch.setattr(points, "confirm", counting)
    assert measure(bench, run).rows == rows
    assert len(bench.problems) > 2 * bench.batch_size
    assert tried == [bench.batch_size] * len({style for problem in bench.problems for style in problem.drafts})


def test_rows_keep_the_order_of_the_problems(bench: Bench) -> None:
    run = mixed(bench)
    rows = measure(bench, run).rows
    assert tuple(row.allocation for row in rows) == run.allocations
    assert [row.difficulty for row in rows] == [problem.tag("difficulty") for problem in bench.problems]


def test_workers_give_the_same_rows(bench: Bench) -> None:
    runs, told = [dense_run(bench), mixed(bench)], []
    forked = measure_runs(bench, runs, lambda label, count: told.append((label, count)), workers=2)
    here = measure_runs(bench, runs, lambda label, count: None, workers=1)
    assert [one.rows for one in forked] == [one.rows for one in here]
    assert sorted(told) == [("cap 0.9", 9), ("dense", 9)]


def test_right_answers_are_counted(bench: Bench) -> None:
    run = dense_run(bench)
    tags, text = read_tags(bench.tokenizer), bench.tokenizer
    problems, right = [], 0
    for row, problem in enumerate(bench.problems):
        ids, mask = left_padded([problem.prompt], 0, torch.device("cpu"))
        opening = [[text.convert_tokens_to_ids("long")]]
        (output,) = generate(bench.gated, tags, ids, mask, config=bench.generation, openings=opening, teacher=True)
        written = str(text.decode(output.answer, skip_special_tokens=True))
        right += row < 4 and bool(written)
        answer = written if row < 4 else "no such answer"
        problems.append(dataclasses.replace(problem, example=dataclasses.replace(problem.example, answer=answer)))
    found = point(bench, run, measure(dataclasses.replace(bench, problems=problems), run))
    assert 3 <= right <= 4
    assert found.accuracy == right / 9
    assert found.accuracy_low < right / 9 < found.accuracy_high
    assert sum(part.n for part in found.by_difficulty.values()) == 9
    assert sum(part.n * part.accuracy for part in found.by_family.values()) == pytest.approx(right)


def test_the_dense_run_is_the_frozen_model_with_its_style(bench: Bench) -> None:
    long, short = dense_run(bench), dense_run(bench, "dense_short")
    assert (long.style, short.style) == ("long", "short")
    found = point(bench, long)
    assert (found.cost, found.layer_sparsity, found.over_budget, found.dropped_layers) == (1.0, 0.0, 0, ())
    before = measure(bench, long).rows
    with torch.no_grad():
        for parameter in bench.gated.adapter_parameters.values():
            parameter.add_(1.0)
    try:
        assert measure(bench, long).rows == before
    finally:
        with torch.no_grad():
            for parameter in bench.gated.adapter_parameters.values():
                parameter.sub_(1.0)


def test_styles_are_asked_for_where_a_problem_names_them(bench: Bench) -> None:
    mixed = [
        dataclasses.replace(problem, example=dataclasses.replace(problem.example, names_style=at % 3 > 0), drafts={})
        for at, problem in enumerate(bench.problems)
    ]
    bench = dataclasses.replace(bench, problems=mixed)
    run = dense_run(bench)
    assert run.style == "long"
    assert measure(bench, run).rows == measure(dataclasses.replace(bench, batch_size=1), run).rows


@pytest.mark.parametrize("contract", ["cap", "mean"])
def test_the_gates_allocate_per_problem(bench: Bench, contract: str) -> None:
    run = allocate(bench, Budget(compute=0.6), contract)  # type: ignore[arg-type]
    prompt = bench.problems[5].prompt
    ids, mask = left_padded([prompt], 0, torch.device("cpu"))
    alone = bench.gated.allocate(ids, mask, [run.budget], contract=contract)  # type: ignore[arg-type]
    assert run.allocations[5] == alone[0]
    found = point(bench, run)
    assert found.over_budget == 0
    assert found.distinct_allocations == len(set(run.allocations)) > 1
    if contract == "cap":
        assert found.mean_error is None
    else:
        assert found.mean_error == pytest.approx(found.cost - 0.6)


def test_over_budget_counts_the_rows_that_cost_too_much(bench: Bench) -> None:
    run = mixed(bench)
    costs = sorted(bench.gated.cost.fraction(allocation) for allocation in run.allocations)
    tight = dataclasses.replace(run, budget=Budget(compute=costs[4]))
    expected = sum(value > costs[4] for value in costs)
    assert 0 < expected < 5
    rows = measure(bench, run)
    assert point(bench, tight, rows).over_budget == expected
    assert point(bench, dataclasses.replace(tight, contract="mean"), rows).over_budget == 0


def test_a_think_cap_holds_and_breaking_it_counts(bench: Bench) -> None:
    run = allocate(bench, Budget(think_tokens=3), "cap")
    rows = measure(bench, run)
    found = point(bench, run, rows)
    assert max(row.think or 0 for row in rows.rows) <= 3
    assert (found.think_cap, found.over_budget) == (3, 0)
    longer = dataclasses.replace(rows, rows=tuple(dataclasses.replace(row, think=4) for row in rows.rows))
    assert point(bench, run, longer).over_budget == 9


def test_heat_is_the_share_of_inputs_per_layer() -> None:
    whole, none = (0, 1), ()
    first = Allocation(num_groups=GROUPS, groups=(whole, whole, none, (1,), none, whole))
    second = Allocation(num_groups=GROUPS, groups=(whole, none, none, whole, none, whole))
    rows = tuple(
        Row(trials=1, hits=1, allocation=a, difficulty=d, think=THINK_BIN * k)
        for a, d, k in [(first, "easy", 0), (second, "easy", 1), (second, "hard", 3)]
    )
    run = Run(name="l2a", budget=Budget(), contract="cap", allocations=tuple(row.allocation for row in rows))
    cost = new_gated().cost
    found = point_of(run, Measured(rows=rows, wall=1, cpu=1, tokens=10), cost, metric="accuracy", seed=0)
    assert list(found.heat) == ["easy", "hard"]
    assert found.heat["easy"].layers == (1.0, 0.5, 0.0, 1.0, 0.0, 1.0)
    assert found.heat["easy"].groups == (1.0, 0.5, 0.0, 0.75, 0.0, 1.0)
    assert found.heat["hard"].layers == (1.0, 0.0, 0.0, 1.0, 0.0, 1.0)
    assert found.think_histogram == (1, 1, 0, 1)
    assert found.layer_sparsity == pytest.approx((2 + 3 + 3) / 3 / LAYERS)
    assert found.head_sparsity == pytest.approx((1 / 8 + 0 + 0) / 3)
    assert (found.wall_ms_per_token, found.distinct_allocations) == (100.0, 2)
    assert Point.from_json(found.to_json()) == found


def test_batches_share_layers_and_hold_every_row_once() -> None:
    kinds = random_allocations(3)
    allocations = [kinds[row % 3] for row in range(30)]
    batches = plan_batches(allocations, [(row, 5) for row in range(30)], 8)
    assert sorted(row for batch in batches for row in batch) == list(range(30))
    assert max(map(len, batches)) == 8
    assert sum(len({allocations[row].layers for row in batch}) == 1 for batch in batches) >= 3
    assert [len(batch) for batch in plan_batches(random_allocations(20), [(1, 1)] * 20, 8)] != [1] * 20


def test_baselines_drop_gated_layers_only(bench: Bench) -> None:
    context = Context(bench.gated, list)
    context.influence = [0.0, 0.5, 0.1, 0.4, 0.2, 0.3]  # the stem's is lowest
    assert BASELINES["uniform"](context, 4 / 6).layers == (0, 1, 3, 5)
    assert BASELINES["uniform"](context, 0.1).layers == (0,)
    assert BASELINES["block_influence"](context, 4 / 6).layers == (0, 1, 3, 5)
    assert BASELINES["block_influence"](context, 0.5).layers == (0, 1, 3)


@pytest.mark.parametrize("name", ["uniform", "block_influence", "oracle"])
def test_baselines_are_measured_at_the_realized_costs_or_slightly_above(bench: Bench, name: str) -> None:
    costs = [1.0, 5 / 6, 0.8, 0.5]
    runs = baseline_runs(bench, Context(bench.gated, lambda: batches(bench)), [name], costs)
    found = point(bench, runs[-1])
    assert (found.name, found.contract, found.over_budget) == (name, "static", 0)
    assert found.dropped_layers == tuple(sorted(set(range(6)) - set(runs[-1].allocations[0].layers)))
    assert found.budget == found.cost
    assert 0.5 - 0.006 <= found.cost < 0.6
    assert all(run.budget.compute < 1 for run in runs)
    assert len({run.allocations[0] for run in runs}) == len(runs) >= 2


def batches(bench: Bench) -> list[dict[str, torch.Tensor]]:
    """The problems as calibration batches."""
    encoded = [encode(problem.example, bench.tokenizer, "short") for problem in bench.problems]
    return [Collator.of(bench.tokenizer)(encoded)]


def test_the_oracle_is_searched_on_the_frozen_model(bench: Bench) -> None:
    gated, known = bench.gated, batches(bench)
    for value in gated.adapter_parameters.values():
        assert value.any()  # adapters would show
    context = Context(gated, lambda: known)
    with gated.teacher():
        _, importance = drop_losses(gated, known)
        path = greedy_path(gated, known, importance)
    for cost in (0.8, 0.6):
        assert BASELINES["oracle"](context, cost) in path
        assert (
            cost - 0.006 <= gated.cost.fraction(BASELINES["oracle"](context, cost)) < cost + 0.12
        )  # a layer with one group


def test_early_exit_spends_less_the_surer_it_may_be(bench: Bench) -> None:
    runs = baseline_runs(bench, Context(bench.gated, list), ["early_exit"], [])
    never = measure(bench, dataclasses.replace(runs[0], exit_entropy=0.0))
    assert {row.cost for row in never.rows} == {1.0}
    dense = measure(bench, dense_run(bench))
    assert [dataclasses.replace(row, cost=None) for row in never.rows] == list(dense.rows)
    always = point(bench, dataclasses.replace(runs[0], exit_entropy=100.0))
    assert always.cost == pytest.approx(1 / LAYERS)
    assert always.layer_sparsity == pytest.approx(1 - 1 / LAYERS)
    after = measure(bench, dense_run(bench))  # the hooks are gone
    assert [row.cost for row in after.rows] == [None] * len(bench.problems)


def test_a_think_cap_alone_is_the_dense_model_cut_off(bench: Bench) -> None:
    (run,) = baseline_runs(bench, Context(bench.gated, list), ["think_cap"], [], [3])
    found = point(bench, run)
    assert (found.name, found.think_cap, found.cost) == ("think_cap", 3, 1.0)
    assert found.think_tokens is not None
    assert found.think_tokens <= 3


def test_a_fixed_budget_runs_the_usual_allocation_of_the_gates_for_all(bench: Bench) -> None:
    context = Context(bench.gated, lambda: batches(bench))
    (run,) = baseline_runs(bench, context, ["fixed_budget"], [0.5])
    ids, mask = batches(bench)[0]["input_ids"], batches(bench)[0]["prompt_mask"]
    chosen = bench.gated.allocate(ids, mask, [Budget(compute=0.5)] * len(ids))
    assert chosen.count(run.allocations[0]) == max(chosen.count(one) for one in chosen)
    assert not run.teacher


def test_a_baseline_is_the_frozen_model_without_gates(bench: Bench) -> None:
    (run,) = baseline_runs(bench, Context(bench.gated, list), ["uniform"], [0.5])
    before = measure(bench, run).rows
    other = dataclasses.replace(bench, gated=new_gated(trained=False))
    assert measure(other, run).rows == before  # untrained adapters and gates change nothing


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'magic' is not known; choose from block_influence, early_exit, .*"):
        known_baselines(["uniform", "magic"])


def test_problems_that_do_not_fit() -> None:
    data = DataConfig(max_length=8)
    with pytest.raises(DataError, match="too long for max_length = 8, with a tag"):
        held_out(data, word_tokenizer(), metric="nll", count=3, seed=0)


def test_the_caps_of_generation_hold(bench: Bench) -> None:
    rows = measure(bench, mixed(bench)).rows
    assert max(row.think or 0 for row in rows) <= THINK
    assert {row.stopped_by for row in rows} <= {"model", "cap", "tau"}
    assert max(row.answer for row in rows) <= 3
