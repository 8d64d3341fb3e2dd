"""``l2a compress evaluate`` on an artifact on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from l2a_compress._cli import main
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.recipe import EvalConfig, Recipe
from l2a_compress.training.store import load_artifact, save_artifact
from toy_data import word_tokenizer, write_jsonl
from toy_models import new_gated, save_base, tiny_recipe


def saved_artifact(folder: Path) -> Path:
    """A tiny artifact with random gates beside its base model."""
    base = save_base(folder / "base")
    evaluation = {"problems": 5, "max_think_tokens": 6, "budgets": [1.0, 0.6]}
    recipe: Recipe = tiny_recipe(base, data={"subset": "easy", "max_length": 200}, evaluation=evaluation)
    model, tokenizer = load_base(str(base), attention="eager")
    digest = digest_of(model)
    gated = new_gated(model=model, rank=2, think_reference=96)
    gated.prices = [(0.3, 0.0), (1.0, -1.0)]
    save_artifact(gated, tokenizer, recipe, folder / "artifact", base_digest=digest, metrics={})
    return folder / "artifact"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_artifact(tmp_path_factory.mktemp("saved"))


def evaluate(*arguments: object) -> int:
    return main(["compress", "evaluate", *map(str, arguments), "--quiet", "--threads", "1"])


def test_the_recipe_decides_what_is_not_said(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-a", artifact) == 0
    folder = artifact.parent / "evaluation"  # where export looks for it
    report = json.loads((folder / "report.json").read_text())
    assert [(p["contract"], p["budget"]) for p in report["points"]] == [
        (c, b) for c in EvalConfig().contracts for b in (1.0, 0.6)
    ]
    assert report["baselines"] == []
    told = capsys.readouterr()
    assert "L2A cap 0.6" in told.out
    assert str(folder / "report.html") in told.out
    assert "replaced" not in told.err
    assert not (artifact / "evaluation").exists()


def test_an_evaluation_that_is_there_is_replaced_and_that_is_said(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--contract", "cap", "--budgets", "1.0", "--think-shares", "0.1", "--out", tmp_path]
    (tmp_path / "notes.txt").write_text("mine")
    assert evaluate("-a", artifact, *flags, "--problems", 2) == 0
    assert "replaced" not in capsys.readouterr().err
    assert evaluate("-a", artifact, *flags, "--problems", 3) == 0
    assert f"{tmp_path}: the evaluation that is there will be replaced" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["dense"]["n"] == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_flags_override_the_recipe(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--budgets", "0.8,0.5", "--contract", "cap", "--problems", 3, "--baselines", "uniform,block_influence"]
    assert evaluate("-a", artifact, *flags, "--seed", 4, "--think-shares", "0.1", "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert [(p["contract"], p["budget"], p["n"], p["seed"]) for p in report["points"]] == [
        ("cap", 0.8, 3, 4),
        ("cap", 0.5, 3, 4),
    ]
    assert [p["think_cap"] for p in report["think_points"]] == [6]  # no more than is written at all
    assert {p["name"] for p in report["baselines"]} == {"uniform", "block_influence"}


def test_a_file_of_ones_own(artifact: Path, tmp_path: Path) -> None:
    rows = [{"q": f"{n} + 1 = ?", "t": f"{n} + 1", "answer": str(n + 1)} for n in range(4)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    flags = ["--data", path, "--kind", "reasoning", "--columns", "prompt=q,trace=t", "--contract", "cap"]
    assert evaluate("-a", artifact, *flags, "--out", tmp_path / "out", "--baselines", "block_influence") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dense"]["n"] == 4  # all of the file
    assert report["dense_short"] is None
    asked = DataConfig.from_json(report["data"])
    assert (asked.source, asked.heldout_share) == (str(path), 1.0)
    room = load_artifact(artifact).gated.model.config.max_position_embeddings - 6 - 16
    assert asked.max_length == max(200, room)
    assert evaluate("-a", artifact, *flags, "--out", tmp_path / "nll", "--metric", "nll") == 0
    assert json.loads((tmp_path / "nll" / "report.json").read_text())["data"]["max_length"] == 200  # the recipe's


def test_a_split_of_a_folder_is_measured_and_that_of_training_is_told(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        rows = [{"prompt": f"{n} + 1 = ?", "trace": f"{n} + 1", "answer": str(n + 1)} for n in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    mine = tmp_path / "artifact"
    shutil.copytree(artifact, mine)
    config = ArtifactConfig.load(mine)
    data = config.training["data"] | {"source": str(folder), "kind": "reasoning", "subset": None}
    dataclasses.replace(config, training=config.training | {"data": data}).write(mine)
    flags = ["--data", folder, "--contract", "cap", "--budgets", "1.0", "--out", tmp_path / "out"]
    for more, count, told in (([], 5, True), (["--split", "test"], 3, False)):
        assert evaluate("-a", mine, *flags, *more) == 0
        assert json.loads((tmp_path / "out" / "report.json").read_text())["dense"]["n"] == count
        assert ("was trained on this split of it" in capsys.readouterr().err) == told


def test_nll(artifact: Path, tmp_path: Path) -> None:
    assert evaluate("-a", artifact, "--metric", "nll", "--contract", "cap", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == "agreement"
    assert all(point["kl"] > 0 for point in report["points"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--budgets", "1.5"], "1.5"),
        (["--budgets", "high"], "--budgets 'high': expected numbers"),
        (["--contract", "best"], "'best'"),
        (["--baselines", "magic"], "'magic'"),
        (["--baselines", "early_exit", "--metric", "nll"], "'early_exit' is about generated tokens"),
        (["--think-shares", "0.5", "--metric", "nll"], "leave --think-shares out"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--kind", "poem", "--data", "x.jsonl"], "poem"),
        (["--think-shares", "2"], "think shares 2.0: must lie in [0, 1]"),
        (["--kind", "gsm8k"], "--kind 'gsm8k' says what of --data is read; give --data"),
        (["--columns", "prompt=q"], "--columns 'prompt=q' says what"),
        (["--split", "test"], "--split 'test' says what"),
        (["--metric", "speed"], "speed"),
        (["--device", "abacus"], "--device 'abacus'"),
    ],
)
def test_a_wrong_flag_is_one_line(
    artifact: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("-a", artifact, *flags) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ")
    assert said in err[-1]


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-a", tmp_path / "none") == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_tokenizer_of_the_artifact_is_the_tasks(artifact: Path) -> None:
    assert (artifact / "tokenizer").is_dir()
    assert len(word_tokenizer()) == json.loads((artifact / "artifact.json").read_text())["shape"]["vocab_size"]
