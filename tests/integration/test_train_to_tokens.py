"""From a recipe to tokens: train, artifact, load, allocate, generate, by library and by command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from l2a_compress._cli import main
from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ArtifactConfig
from l2a_compress.budget import Budget
from l2a_compress.errors import StorageError
from l2a_compress.modeling.generation import GenerationConfig, generate
from l2a_compress.modeling.tags import read_tags
from l2a_compress.training.calibration import calibration_prompts
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import train
from l2a_compress.training.store import LoadedArtifact, load_artifact
from toy_models import FAMILIES, LAYERS, save_base, tiny_recipe

BUDGETS = [Budget(compute=1.0), Budget(compute=0.7, think_tokens=5), Budget(compute=0.4, layers=3, think_tokens=0)]


def check(loaded: LoadedArtifact) -> None:
    """Allocates for real prompts under several budgets and generates."""
    gated, tags = loaded.gated, read_tags(loaded.tokenizer)
    ((ids, mask),) = calibration_prompts(loaded.recipe, loaded.tokenizer, 3)
    found = gated.allocate(ids, mask, BUDGETS)
    assert all(gated.cost.fits(allocation, budget) for allocation, budget in zip(found, BUDGETS, strict=True))
    assert len(found[0].layers) == LAYERS
    assert len(found[2].layers) <= 3
    config = GenerationConfig(max_think_tokens=8, max_answer_tokens=4)
    rows = generate(gated, tags, ids, mask, budgets=BUDGETS, config=config)
    assert [row.allocation for row in rows] == found
    assert all(1 <= len(row.answer) <= 4 for row in rows)
    assert [len(row.think) <= most for row, most in zip(rows, (8, 5, 0), strict=True)] == [True] * 3
    assert all(isinstance(loaded.tokenizer.decode(row.answer), str) for row in rows)
    assert gated.prices
    priced = gated.allocate(ids, mask, [Budget(compute=0.7)] * 3, contract="mean")
    assert all(isinstance(allocation, Allocation) for allocation in priced)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_recipe_to_tokens(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    recipe = tiny_recipe(base, optim={"steps": 3, "save_steps": 3})
    folder = train(recipe, tmp_path / "run", quiet=True)
    assert folder == tmp_path / "run" / "artifact"
    loaded = load_artifact(folder)
    assert loaded.recipe == recipe
    assert loaded.config.base["family"] == family
    assert loaded.config.metrics["steps"] == 3
    check(loaded)


def test_plain_text_trains_without_any_reasoning(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"how many does Ann have ? {number} 1 2 3 4 5 6 7 8 9 ." for number in range(40)))
    data = {"source": str(text), "kind": "text", "heldout_share": 0.1, "calibration_share": 0.3, "subset": None}
    recipe = tiny_recipe(base, data=data, optim={"steps": 2, "save_steps": 2})
    loaded = load_artifact(train(recipe, tmp_path / "run", quiet=True))
    assert loaded.config.metrics["last"]["tokens"] == 0
    assert loaded.config.metrics["last"]["ce"] > 0


@pytest.mark.parametrize("method", ["uniform", "oracle", "fixed_budget"])
def test_a_static_model_is_fine_tuned_for_one_allocation(method: str, tmp_path: Path) -> None:
    base, static = save_base(tmp_path / "base"), {"method": method, "compute": 0.6}
    if method == "fixed_budget":
        train(tiny_recipe(base, optim={"steps": 1, "save_steps": 1}), tmp_path / "gated", quiet=True)
        static["artifact"] = str(tmp_path / "gated" / "artifact")
    plan = {"explore": 0.5, "settle": 0.5, "noise_start": 4.0}  # of what there is nothing to explore
    steps = {"steps": 4, "save_steps": 4, "log_steps": 1}
    recipe = tiny_recipe(base, static=static, annealing=plan, optim=steps, draws={"contract": "both"})
    loaded = load_artifact(train(recipe, tmp_path / "run", quiet=True))
    said = loaded.config.metrics["static"]
    allocation, gated = Allocation.from_json(said["allocation"]), loaded.gated
    ((ids, mask),) = calibration_prompts(loaded.recipe, loaded.tokenizer, 3)
    assert gated.allocate(ids, mask, [Budget(compute=said["budget"])] * 3) == [allocation] * 3
    assert gated.cost.fraction(allocation) == pytest.approx(said["budget"], abs=1e-4)
    assert 0.5 <= said["budget"] < 0.8
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert [row["cost"] for row in log if "loss" in row] == [pytest.approx(said["budget"], abs=1e-3)] * 4
    command = ["compress", "evaluate", "--artifact", str(tmp_path / "run" / "artifact"), "--problems", "2", "--quiet"]
    assert main([*command, "--baselines", "none"]) == 0
    points = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())["points"]
    assert [(point["name"], point["budget"]) for point in points] == [("l2a", said["budget"])]


def test_a_run_replaces_nothing_that_is_not_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(save_base(tmp_path / "base"))
    for name in ("artifact", "checkpoints"):
        theirs = tmp_path / name / name / "theirs"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("mine")
        with pytest.raises(StorageError, match=f"{name}: is of something else than a run"):
            train(recipe, tmp_path / name, resume=False, force=True, quiet=True)
        assert theirs.read_text() == "mine"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be made"):
            train(recipe, out, quiet=True)
    assert main(["compress", "train", "--static-compute", "0.6", "--out", str(tmp_path / "none")]) == 2
    assert "--static" in capsys.readouterr().err


def test_inline_gates_and_switched_off_terms(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        save_base(tmp_path / "base"),
        gates={"mode": "inline"},
        objective={"without": ["kl", "heads"]},
        optim={"steps": 2, "save_steps": 2},
        evaluation={"calibration": 4},
    )
    loaded = load_artifact(train(recipe, tmp_path / "run", quiet=True))
    assert (loaded.gated.gate_config.mode, loaded.gated.gate_config.heads) == ("inline", False)
    assert "kl" not in loaded.config.metrics["last"]
    check(loaded)


def toml_recipe(folder: Path) -> Path:
    """A recipe as a user writes it, with a base model of its own."""
    base = save_base(folder / "base")
    path = folder / "tiny.toml"
    path.write_text(
        f"""
[model]
name = {json.dumps(str(base))}
attention = "eager"
[data]
subset = "easy"
[gates]
stem_layers = 1
hidden = 8
[adapter]
rank = 2
[optim]
steps = 50
batch_size = 8
log_steps = 1
[evaluation]
calibration = 8
"""
    )
    return path


def test_the_command_line_trains_the_same_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml_recipe(tmp_path)
    options = [
        "--recipe",
        str(path),
        "--set",
        "optim.steps=2",
        "--set",
        "gates.budget_dim=4",
        "--no-evaluate",
        "--quiet",
    ]
    assert main(["compress", "train", "--out", str(tmp_path / "cli"), *options]) == 0
    recipe = Recipe.named(str(path), ["optim.steps=2", "gates.budget_dim=4"])
    train(recipe, tmp_path / "library", quiet=True)
    capsys.readouterr()
    for name in ("gates.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cli" / "artifact" / name).read_bytes() == (
            tmp_path / "library" / "artifact" / name
        ).read_bytes()
    assert main(["compress", "inspect", str(tmp_path / "cli" / "artifact")]) == 0
    assert "qwen3" in capsys.readouterr().out
    loaded = load_artifact(tmp_path / "cli" / "artifact")
    assert (loaded.recipe, loaded.gated.gate_config.budget_dim) == (recipe, 4)
    check(loaded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "optim.step=2"], r"[optim] has no setting 'step'"),
        (["--without", "everything"], "unknown term"),
        (["--model", "no/such/folder"], "cannot be loaded"),
        (["--set", "model.name=gpt2-like"], "cannot be loaded"),
        (["--steps", "0"], "optim.steps must be at least 1"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    path = toml_recipe(tmp_path)
    assert main(["compress", "train", "--recipe", str(path), "--out", str(tmp_path / "run"), "--quiet", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run" / "artifact").exists()


def test_training_changes_what_the_model_does_and_its_base_not_at_all(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    loaded = load_artifact(train(tiny_recipe(base), tmp_path / "run", quiet=True))
    assert (base / "model.safetensors").read_bytes() == before
    ((ids, mask),) = calibration_prompts(loaded.recipe, loaded.tokenizer, 3)
    with torch.no_grad():
        dense = loaded.gated(ids, mask).hidden
        with loaded.gated.teacher():
            assert not torch.equal(loaded.gated(ids, mask).hidden, dense)
    assert ArtifactConfig.load(tmp_path / "run" / "artifact").base["digest"] == loaded.config.base["digest"]
