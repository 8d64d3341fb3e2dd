"""Benchmarks measure what they say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import frontier
import numpy as np
import pytest
import real_llm
import stale
from onnx_quality import until_the_end

from l2a_compress.training.recipe import Recipe


def test_what_stands_behind_the_end_of_an_answer_is_not_scored() -> None:
    written = np.array([[5, 6, 9, 9, 5], [5, 6, 7, 8, 5], [9, 5, 3, 5, 9], [4, 3, 9, 4, 4]])
    assert until_the_end(written, (9, 3)).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]


def test_settings_that_training_does_not_depend_on_are_no_difference() -> None:
    told = ["optim.threads=2", "evaluation.problems=7", "optim.steps=3", 'model.name="/b/base"']
    recipes = Recipe.named("mini", ['model.name="/a/base"']), Recipe.named("mini", told)
    assert stale.differences(*map(stale.trained_settings, recipes)) == ["optim.steps: was 1000, now is 3"]
    assert stale.differences({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_what_was_made_with_other_settings_or_by_other_code_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, count = tmp_path / "bundle", 0

    def make() -> None:
        nonlocal count
        count += 1
        folder.mkdir()

    for expected, settings in ((1, {"a": 1}), (1, {"a": 1}), (2, {"a": 2})):
        assert stale.made(folder, settings, make) == folder
        assert count == expected
    monkeypatch.setattr(stale, "CODE", ("tests",))
    stale.made(folder, {"a": 2}, make)
    assert count == 3
    folder.with_name("bundle.made.json").unlink()
    stale.made(folder, {"a": 2}, make)
    assert count == 4


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of a run ``l2a`` that is trained, and ``l2a-long``, that is not."""

    def asked_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
        return {"name": name, "problems": options.problems}

    monkeypatch.setattr(real_llm, "asked_of", asked_of)
    (tmp_path / "m" / "l2a" / "artifact").mkdir(parents=True)
    return argparse.Namespace(model="m", work=tmp_path, problems=250, again=False, out=tmp_path / "record.json")


@pytest.mark.parametrize(
    ("noted", "again", "todo"),
    [
        ({"problems": 250}, False, []),
        ({"problems": 250}, True, ["l2a"]),
        ({"problems": 500}, False, ["l2a"]),
        (None, False, ["l2a"]),
    ],
)
def test_what_was_measured_with_other_settings_is_measured_anew(
    asked: argparse.Namespace,
    noted: dict[str, int] | None,
    again: bool,
    todo: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked.again = again
    found = {"measured": {} if noted is None else {"l2a": {"name": "l2a", **noted}}}
    assert real_llm.to_measure("measured", json.loads(json.dumps(found)), ["l2a"], asked) == todo
    assert ("measured anew" in capsys.readouterr().out) is bool(todo)


def test_a_record_of_other_settings_that_cannot_be_measured_anew_is_refused(asked: argparse.Namespace) -> None:
    found = {"measured": {"l2a-long": {"name": "l2a-long", "problems": 500}}}
    with pytest.raises(SystemExit, match=r"l2a-long \(problems: was 500, now is 250\).*--out"):
        real_llm.to_measure("measured", found, ["l2a-long"], asked)


def _record(steps: int, problems: int) -> dict[str, Any]:
    reports = {"capped": {"settings": {"problems": problems}}}
    return {"name": "main", "settings": [f"optim.steps={steps}", "optim.threads=1"], "reports": reports}


def test_reports_of_other_settings_are_not_kept_beside_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    asked, record = ["optim.steps=3", "optim.threads=2"], _record(3, 9)
    assert frontier.kept_reports(record, asked, 9, whole=False) == record["reports"]
    for other, told in ((_record(4, 9), "optim.steps=4"), (_record(3, 8), "problems: was 8, now is 9")):
        assert frontier.kept_reports(other, asked, 9, whole=True) == {}
        assert told in capsys.readouterr().out
        with pytest.raises(SystemExit, match="measure all of its parts"):
            frontier.kept_reports(other, asked, 9, whole=False)
