"""Artifact descriptions: the round trip, the published schema, and every way a folder can be broken."""

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from l2a_compress import ARTIFACT_FILE, ArtifactConfig, ArtifactError
from l2a_compress.artifact import describe_files
from strategies import EXAMPLE_ARTIFACT, artifacts


def schema(name: str) -> Any:
    return json.loads(resources.files("l2a_compress").joinpath("schemas", f"{name}.schema.json").read_text())


VALIDATOR = jsonschema.Draft202012Validator(schema("artifact"))
CONFIG = EXAMPLE_ARTIFACT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact folder with two files."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "gates.safetensors").write_bytes(b"gates")
    (tmp_path / "adapter" / "model.safetensors").write_bytes(b"adapter")
    dataclasses.replace(CONFIG, files=describe_files(tmp_path)).write(tmp_path)
    return tmp_path


@given(artifacts)
def test_json_round_trip_is_exact_and_keeps_the_schema(config: ArtifactConfig) -> None:
    data = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert ArtifactConfig.from_json(data) == config
    VALIDATOR.validate(data)


def test_published_schemas_are_schemas() -> None:
    for name in ("artifact", "report"):
        jsonschema.Draft202012Validator.check_schema(schema(name))


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": 0},
        {"base": {"name": "x", "family": "y", "path": None}},
        {"shape": {}},
        {"shape": None},
        {"gates": []},
        {"seed": -1},
        {"seed": 1.5},
        {"versions": {"torch": 2}},
        {"prices": {"mean": [[0.5]]}},
        {"prices": {"mean": [[1.5, 0.0]]}},
        {"prices": {"mean": [["0.5", 0.0]]}},
        {"files": {"../x": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"/x": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"a\\b": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"artifact.json": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"x": {"sha256": "0" * 63, "size": 0}}},
        {"files": {"x": {"sha256": "0" * 64, "size": -1}}},
        {"files": {"x": {"sha256": "0" * 64}}},
        {"surprise": 1},
    ],
)
def test_what_the_schema_refuses_the_reader_refuses_by_name(change: dict[str, Any]) -> None:
    data = json.loads(json.dumps(CONFIG.to_json())) | change
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ArtifactError, match=next(iter(change))):
        ArtifactConfig.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"loss": float("nan")}},
        {"prices": {"mean": [[0.5, 1.0], [0.25, 2.0]]}},
        {"prices": {"mean": [[0.5, True]]}},
        {"gates": {1: 2}},
        {"training": {"when": {1, 2}}},
        {"files": {"a/../b": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"c:x": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"a//b": {"sha256": "0" * 64, "size": 0}}},
    ],
)
def test_the_reader_refuses_more_than_a_schema_can_say(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)


def test_tuples_become_lists_so_that_the_round_trip_is_exact() -> None:
    assert dataclasses.replace(CONFIG, gates={"dims": (1, 2)}).gates == {"dims": [1, 2]}


def test_a_good_folder_loads(folder: Path) -> None:
    config = ArtifactConfig.load(folder)
    assert sorted(config.files) == ["adapter/model.safetensors", "gates.safetensors"]
    assert dataclasses.replace(config, files={}) == CONFIG


def break_missing_folder(folder: Path) -> Path:
    return folder / "nowhere"


def break_no_artifact(folder: Path) -> Path:
    (folder / ARTIFACT_FILE).unlink()
    return folder


def break_half_json(folder: Path) -> Path:
    text = (folder / ARTIFACT_FILE).read_text()
    (folder / ARTIFACT_FILE).write_text(text[: len(text) // 2])
    return folder


def break_not_text(folder: Path) -> Path:
    (folder / ARTIFACT_FILE).write_bytes(b"\xff\xfe\0")
    return folder


def break_foreign_json(folder: Path) -> Path:
    (folder / ARTIFACT_FILE).write_text('{"model_type": "llama"}')
    return folder


def break_missing_file(folder: Path) -> Path:
    (folder / "gates.safetensors").unlink()
    return folder


def break_size(folder: Path) -> Path:
    (folder / "gates.safetensors").write_bytes(b"gate")
    return folder


def break_content(folder: Path) -> Path:
    (folder / "gates.safetensors").write_bytes(b"Gates")
    return folder


def break_link(folder: Path) -> Path:
    outside = folder.parent / f"{folder.name}-outside"
    (folder / "gates.safetensors").rename(outside)
    (folder / "gates.safetensors").symlink_to(outside)
    return folder


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_missing_folder, "nowhere: no such folder"),
        (break_no_artifact, "not an artifact: it holds no artifact.json"),
        (break_half_json, r"artifact\.json: not JSON"),
        (break_not_text, r"artifact\.json: not JSON"),
        (break_foreign_json, r"artifact\.json: ArtifactConfig: unknown key 'model_type'"),
        (break_missing_file, r"gates\.safetensors: the file is missing"),
        (break_size, r"gates\.safetensors: has 4 bytes instead of 5"),
        (break_content, r"gates\.safetensors: is corrupt: its SHA-256"),
        (break_link, r"gates\.safetensors: leaves the artifact folder"),
    ],
)
def test_a_broken_folder_is_one_clear_error(folder: Path, damage: Any, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        ArtifactConfig.load(damage(folder))


POINT = {
    "budget": 0.6,
    "contract": "cap",
    "accuracy": 0.9,
    "accuracy_low": 0.88,
    "accuracy_high": 0.92,
    "layer_sparsity": 0.33,
    "head_sparsity": 0.1,
    "think_tokens": 12.5,
    "cost": 0.59,
    "over_budget": 0,
    "n": 100,
    "seed": 0,
}
REPORT = {
    "schema_version": 1,
    "model": {"name": "embedded"},
    "dense": {"accuracy": 0.98, "accuracy_low": 0.97, "accuracy_high": 0.99, "n": 100},
    "points": [POINT | {"seconds_per_token": 0.01}],
    "baselines": [POINT | {"name": "uniform"}],
}


def test_the_report_schema_accepts_a_report_and_refuses_percentages() -> None:
    validator = jsonschema.Draft202012Validator(schema("report"))
    validator.validate(REPORT)
    for change in ({"accuracy": 90.0}, {"contract": "soft"}, {"over_budget": 0.1}, {"budget": 0}):
        assert not validator.is_valid(REPORT | {"points": [POINT | change]})
    for name in POINT:
        short = {key: value for key, value in POINT.items() if key != name}
        assert not validator.is_valid(REPORT | {"points": [short]})
    assert not validator.is_valid(REPORT | {"baselines": [POINT]})
