"""One number for a request's work: which splits are kept, how they are measured, noted and asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import toy_models
from l2a_compress._cli import main
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import ArtifactError, BudgetError, BundleError, ConfigError
from l2a_compress.evaluation.split import measure_split
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.split import Split, SplitPoint
from l2a_compress.training.store import load_artifact, note_metric
from test_evaluation_cli import saved_artifact
from toy_evaluation import new_artifact


def point(work: float, accuracy: float, compute: float = 0.5, tokens: int | None = None) -> SplitPoint:
    return SplitPoint(compute=compute, think_tokens=tokens, work=work, accuracy=accuracy)


def test_what_another_beats_is_not_kept() -> None:
    cheap, middle, dear = point(0.2, 0.6), point(0.4, 0.8), point(1.0, 0.9)
    beaten = [point(0.3, 0.6), point(0.4, 0.7), point(0.9, 0.8)]
    assert Split.best_of([dear, *beaten, middle, cheap]).points == (cheap, middle, dear)
    assert Split.best_of([]).points == ()


def test_the_most_accurate_that_is_within_the_work_is_asked_for() -> None:
    split = Split.best_of([point(0.2, 0.6, 0.4, 31), point(0.4, 0.8, 0.8, 31), point(1.0, 0.9, 1.0)])
    assert split.at(0.4).budget == Budget(compute=0.8, think_tokens=31)
    assert split.at(0.99).budget == Budget(compute=0.8, think_tokens=31)
    assert split.at(1.0).budget == Budget()
    with pytest.raises(BudgetError, match=r"work 0.1: the least that was measured is 0\.200"):
        split.at(0.1)
    with pytest.raises(BudgetError, match="none"):
        Split(()).at(0.5)


def test_a_split_survives_json() -> None:
    split = Split.best_of([point(0.2, 0.6, 0.4, 31), point(1.0, 0.9, 1.0)])
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split


GOOD = {"compute": 0.5, "think_tokens": None, "work": 0.5, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "must be a list"),
        ([{**GOOD, "compute": 2.0}], "compute"),
        ([{**GOOD, "think_tokens": -1}], "think_tokens"),
        ([{**GOOD, "work": "half"}], "work"),
        ([{"compute": 0.5}], "accuracy"),
        ([{**GOOD, "more": 1}], "more"),
    ],
)
def test_what_is_no_split_is_refused(data: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Split.from_json(data)
    with pytest.raises(BundleError, match="quality"):
        Split.from_json(data, where="quality", error=BundleError)


def test_every_pair_is_measured_on_problems_that_are_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def held_out(*args: Any, split: str, **more: Any) -> Any:
        asked.append(split)
        return original(*args, split=split, **more)

    from l2a_compress.evaluation import frontier

    original = frontier.held_out
    monkeypatch.setattr(frontier, "held_out", held_out)
    artifact = new_artifact()
    reference = artifact.gated.gate_config.think_reference
    found = measure_split(artifact, computes=(0.5, 1.0), think_shares=(0.05, 1.0), problems=6)
    assert asked == ["calibration"]
    cap = round(0.05 * reference)
    assert [(p.budget, p.think_cap) for p in found.points] == [(1.0, None), (1.0, cap), (0.5, None), (0.5, cap)]
    for one in found.points:
        assert one.work is not None
        assert 0 < one.work <= one.tokens / one.n
        if one.distinct_allocations == 1:
            assert one.work == pytest.approx(one.cost * one.tokens / one.n, rel=1e-3)
    assert found.dense.work == pytest.approx(found.dense.tokens / found.dense.n)
    whole = found.dense.work
    assert found.split.points
    assert {p.work for p in found.split.points} <= {round((p.work or 0) / whole, 5) for p in found.points}


@pytest.mark.parametrize("more", [{"computes": ()}, {"think_shares": ()}, {"problems": 0}, {"think_shares": (1.5,)}])
def test_a_split_of_nothing_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        measure_split(new_artifact(), **{"computes": (1.0,), "think_shares": (1.0,), **more})


def test_the_command_notes_the_split_and_evaluation_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = saved_artifact(tmp_path)
    quiet = ["--quiet", "--threads", "1"]
    assert main(["compress", "evaluate", "-a", str(artifact), "--work", "0.5", *quiet]) != 0
    assert "measure one with l2a compress split" in capsys.readouterr().err
    flags = ["--budgets", "1,0.6", "--think-shares", "1,0.03", "--problems", "4"]
    assert main(["compress", "split", "-a", str(artifact), *flags, *quiet]) == 0
    assert "calibration examples" in capsys.readouterr().out
    split = ArtifactConfig.load(artifact).split  # the folder is still whole
    assert split is not None
    assert load_artifact(artifact).config.split == split
    least = split.points[0]
    out = tmp_path / "out"
    work = str(least.work)
    assert main(["compress", "evaluate", "-a", str(artifact), "--work", work, "--out", str(out), *quiet]) == 0
    (measured,) = json.loads((out / "report.json").read_text())["split_points"]
    assert (measured["budget"], measured["think_cap"]) == (least.compute, least.think_tokens)
    assert main(["compress", "evaluate", "-a", str(artifact), "--work", "0.0001", *quiet]) != 0
    assert "ask for more" in capsys.readouterr().err


def test_a_bundle_is_asked_by_the_number_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, bundle = toy_models.new_artifact(tmp_path), tmp_path / "bundle"
    split = Split.best_of([point(0.2, 0.6, 0.6, 4), point(1.0, 0.9, 1.0)])
    export(artifact, tmp_path / "without", ExportOptions(budgets=(1.0,), calibration=4))
    note_metric(artifact, "split", split.to_json())
    export(artifact, bundle, ExportOptions(budgets=(1.0, 0.6), calibration=4))
    assert Bundle.load(bundle).split == split
    run = ["--threads", "1", "--stats", "--max-answer-tokens", "2"]
    assert main(["run", str(bundle), "Tom has 3 apples.", "--work", "0.5", *run]) == 0
    assert "budget 0.6, think_tokens <= 4" in capsys.readouterr().out
    for flags, message in (
        (["--work", "0.5", "--layers", "3"], "leave out --budget, --layers and --heads"),
        (["--work", "0.1"], "the least that was measured is 0.200"),
    ):
        assert main(["run", str(bundle), "Tom", *flags, *run]) != 0
        assert message in capsys.readouterr().err
    assert main(["run", str(tmp_path / "without"), "Tom", "--work", "0.5", *run]) != 0
    assert "notes no split of work" in capsys.readouterr().err
