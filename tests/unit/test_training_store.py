"""Artifacts on disk: what is loaded is what was saved, and everything that is not whole is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import l2a_compress
from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ArtifactConfig, describe_files
from l2a_compress.budget import Budget
from l2a_compress.errors import ArtifactError, ConfigError, StorageError
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.run import build
from l2a_compress.training.store import load_artifact, save_artifact
from toy_models import FAMILIES, GROUPS, LAYERS, prompts, save_base, scramble, tiny_recipe


def new_artifact(folder: Path, family: str = "qwen3", *, rank: int = 2) -> tuple[GatedModel, Recipe, Path]:
    """A model with random gates and adapters on a base model in ``folder``, and the artifact made of it."""
    recipe = tiny_recipe(save_base(folder / "base", family), adapter={"rank": rank})
    model, tokenizer = load_base(recipe.model.name, attention=recipe.model.attention)
    digest = digest_of(model)
    gated = GatedModel.wrap(model, recipe.gates, recipe.adapter)
    gated.think_id = tokenizer.convert_tokens_to_ids("<think>")
    scramble(gated)
    gated.prices = ((0.3, 2.0), (0.6, 0.5), (1.0, -1.5))
    save_artifact(gated.eval(), tokenizer, recipe, folder / "artifact", base_digest=digest, metrics={"steps": 1})
    return gated, recipe, folder / "artifact"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[GatedModel, Recipe, Path]:
    """One artifact that tests only read."""
    return new_artifact(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made: tuple[GatedModel, Recipe, Path], tmp_path: Path) -> Path:
    """One that a test may damage."""
    shutil.copytree(made[2], tmp_path / "artifact")
    return tmp_path / "artifact"


def rewrite(folder: Path, **changes: object) -> None:
    """Puts other values into ``artifact.json``, with checksums that are right."""
    path = folder / "artifact.json"
    data = json.loads(path.read_text()) | {"files": describe_files(folder)} | changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_loaded_runs_as_what_was_saved(family: str, rank: int, tmp_path: Path) -> None:
    gated, recipe, folder = new_artifact(tmp_path, family, rank=rank)
    loaded = load_artifact(folder)
    assert loaded.recipe == recipe
    assert loaded.config.base["family"] == family
    assert (loaded.gated.gate_config, loaded.gated.adapter_config) == (recipe.gates, recipe.adapter)
    assert loaded.gated.prices == gated.prices
    assert not loaded.gated.training
    ids, mask = prompts(8)
    budgets = [Budget(compute=0.3 + 0.1 * row, think_tokens=row) for row in range(8)]
    for contract in ("cap", "mean"):
        found = loaded.gated.allocate(ids, mask, budgets, contract=contract)
        assert found == gated.allocate(ids, mask, budgets, contract=contract)
        with gated.forced(found), loaded.gated.forced(found):
            expected = gated.logits(gated(ids, mask).hidden)
            assert torch.equal(loaded.gated.logits(loaded.gated(ids, mask).hidden), expected)
    text = "how many ? <think>"
    assert loaded.tokenizer(text)["input_ids"] == load_base(recipe.model.name)[1](text)["input_ids"]


@torch.no_grad()
def test_the_adapter_is_one_that_peft_loads(made: tuple[GatedModel, Recipe, Path]) -> None:
    gated, recipe, folder = made
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, attn_implementation="eager")
    ids, mask = prompts(padded=False)
    untouched = base(ids, attention_mask=mask).logits
    plain = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = plain(ids, attention_mask=mask).logits
    with gated.forced([Allocation.dense(LAYERS, GROUPS)]):
        expected = gated.logits(gated(ids, mask).hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - untouched).abs().max() > 0.1


def test_the_description_follows_the_published_schema(made: tuple[GatedModel, Recipe, Path]) -> None:
    schema = json.loads((Path(l2a_compress.__file__).parent / "schemas" / "artifact.schema.json").read_text())
    described = json.loads((made[2] / "artifact.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(described, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**described, "shape": {}}, schema)
    files = {path.relative_to(made[2]).as_posix() for path in made[2].rglob("*") if path.is_file()}
    assert {*described["files"]} == files - {"artifact.json"}
    assert {"gates.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
    assert not {path.suffix for path in made[2].rglob("*")} & {".bin", ".pt", ".pkl", ".pth"}
    assert described["versions"]["l2a-compress"] == l2a_compress.__version__


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "gates.safetensors"), "gates.safetensors: is corrupt"),
        (
            lambda folder: flip(folder / "adapter" / "adapter_model.safetensors"),
            "adapter_model.safetensors: is corrupt",
        ),
        (lambda folder: (folder / "gates.safetensors").write_bytes(b""), "gates.safetensors: has 0 bytes instead of"),
        (lambda folder: (folder / "gates.safetensors").unlink(), "gates.safetensors: the file is missing"),
        (lambda folder: (folder / "artifact.json").unlink(), "holds no artifact.json"),
        (lambda folder: (folder / "artifact.json").write_text("{"), "artifact.json: not JSON"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_what_is_not_whole_is_refused(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(copy)


def test_gates_of_other_names_or_shapes_are_refused(copy: Path) -> None:
    path = copy / "gates.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "allocator.layer_gates.outer"
    path.write_bytes(safetensors.torch.save({**tensors, name: torch.zeros(5, 8, 2)}))
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"allocator.layer_gates.outer has shape \(5, 8, 2\), not \(5, 8, 1\)"):
        load_artifact(copy)
    path.write_bytes(safetensors.torch.save({key: value for key, value in tensors.items() if key != name}))
    rewrite(copy)
    with pytest.raises(ArtifactError, match="tensors of other names"):
        load_artifact(copy)


def test_a_gates_file_that_is_no_safetensors_is_refused(copy: Path) -> None:
    (copy / "gates.safetensors").write_bytes(b"not a tensor file")
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"gates.safetensors"):
        load_artifact(copy)


@pytest.mark.parametrize(("section", "value"), [("gates", {"stems": 1}), ("adapter", {"ranks": 1})])
def test_settings_that_are_not_known_are_refused(copy: Path, section: str, value: dict[str, int]) -> None:
    rewrite(copy, **{section: value})
    with pytest.raises(ArtifactError, match=section):
        load_artifact(copy)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"seed": 0, "hidden_size": 40}, {"seed": 0, "num_hidden_layers": 5}])
def test_another_base_model_is_refused(
    made: tuple[GatedModel, Recipe, Path], tmp_path: Path, changes: dict[str, int]
) -> None:
    other = save_base(tmp_path / "other", **changes)
    with pytest.raises(ArtifactError, match="was trained on another base model"):
        load_artifact(made[2], base=str(other))


def test_a_base_model_that_has_moved_can_be_given(made: tuple[GatedModel, Recipe, Path], tmp_path: Path) -> None:
    _, recipe, folder = made
    shutil.copytree(recipe.model.name, tmp_path / "moved")
    data = json.loads((folder / "artifact.json").read_text())
    shutil.copytree(folder, tmp_path / "artifact")
    training = {**data["training"], "model": {**data["training"]["model"], "name": str(tmp_path / "gone")}}
    rewrite(tmp_path / "artifact", training=training)
    base = {**data["base"], "path": None}
    rewrite(tmp_path / "artifact", training=training, base=base)
    with pytest.raises(ConfigError, match=r"gone.* cannot be loaded.*--base"):
        load_artifact(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact", base=str(tmp_path / "moved")).gated.shape.num_layers == LAYERS
    rewrite(tmp_path / "artifact", base=base | {"path": str(tmp_path / "moved")})  # where it was, noted absolutely
    assert load_artifact(tmp_path / "artifact").gated.shape.num_layers == LAYERS


def test_the_place_of_a_base_model_is_noted_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    recipe = tiny_recipe(Path("base"))
    gated, tokenizer, digest = build(recipe)
    config = save_artifact(gated, tokenizer, recipe, tmp_path / "artifact", base_digest=digest, metrics={})
    assert config.base["path"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_artifact(tmp_path / "artifact").recipe == recipe


def test_an_artifact_is_replaced_only_when_asked(made: tuple[GatedModel, Recipe, Path], copy: Path) -> None:
    gated, recipe, _ = made
    tokenizer = load_base(recipe.model.name)[1]
    with pytest.raises(StorageError, match="exists and is not empty"):
        save_artifact(gated, tokenizer, recipe, copy, base_digest="0" * 64, metrics={})
    (copy / "stray.txt").write_text("")
    save_artifact(gated, tokenizer, recipe, copy, base_digest="0" * 64, metrics={"steps": 2}, force=True)
    assert ArtifactConfig.load(copy).metrics == {"steps": 2}
    assert not (copy / "stray.txt").exists()


def test_a_failed_save_leaves_nothing(
    made: tuple[GatedModel, Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, recipe, _ = made

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    tokenizer = load_base(recipe.model.name)[1]
    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"artifact.*No space left.*free some space"):
        save_artifact(gated, tokenizer, recipe, tmp_path / "artifact", base_digest="0" * 64, metrics={})
    assert list(tmp_path.iterdir()) == []


def test_gates_of_another_form_survive(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        save_base(tmp_path / "base"),
        gates={"mode": "inline", "heads": False, "tokens": False, "summary": "mean", "min_groups": 2},
    )
    model, tokenizer = load_base(recipe.model.name)
    digest = digest_of(model)
    gated = GatedModel.wrap(model, recipe.gates, recipe.adapter)
    save_artifact(gated, tokenizer, recipe, tmp_path / "artifact", base_digest=digest, metrics={})
    loaded = load_artifact(tmp_path / "artifact")
    assert loaded.gated.gate_config == recipe.gates != GateConfig()
    assert loaded.gated.prices == ()
