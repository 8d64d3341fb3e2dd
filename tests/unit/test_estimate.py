"""Estimates: figures computed by hand, what can be read, and every error."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mutations import write_bundle

from l2a_compress import (
    Allocation,
    ArtifactError,
    Budget,
    BudgetError,
    BundleError,
    ConfigError,
    CostModel,
    DeviceProfile,
    L2AError,
    ModelShape,
    UnsupportedModelError,
)
from l2a_compress._cli import main
from l2a_compress.artifact import describe_files
from l2a_compress.bundle import MANIFEST_FILE
from l2a_compress.embedded import MODEL_DIR
from l2a_compress.estimate import FAMILIES, Estimate, Source, estimate, read_source, recommend, shape_of_config, spread
from strategies import EXAMPLE_ARTIFACT, computes, shapes

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
SMALL = ModelShape(
    num_layers=4,
    hidden_size=8,
    intermediate_size=16,
    num_heads=4,
    num_groups=2,
    head_dim=2,
    vocab_size=10,
    tied=False,
)
# A layer of SMALL has 3 * 8 * 16 = 384 weights of its MLP, and q 64, k 32, v 32, o 64 = 192 of attention.
LAYER, HEAD = 384 + 192, 80
TOY = DeviceProfile(
    name="toy",
    kind="gpu",
    memory_bytes=5000,
    memory_bandwidth=1000.0,
    peak_flops={"fp32": 1000.0, "fp16": 4000.0},
    source="nominal: a test",
)
TOY_TOML = """
name = "toy"
kind = "gpu"
memory_bytes = 5000
memory_bandwidth = 1000
source = "nominal: a test"
[peak_flops]
fp32 = 1000
fp16 = 4000
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder with its config alone."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.toml"
    path.write_text(TOY_TOML)
    return str(path)


def small(budgets: tuple[float, ...], **options: Any) -> tuple[Estimate, ...]:
    return estimate(Source(name="small", kind="model", shape=SMALL), TOY, budgets, **options)


def test_the_figures_are_those_computed_by_hand() -> None:
    dense, half = small((1.0, 0.5), context=3, batch=2)
    assert (len(dense.allocation.layers), dense.allocation.num_kept_groups) == (4, 8)
    assert half.allocation.layers == (0, 2)
    assert dense.weight_bytes == 2 * (4 * LAYER + 2 * HEAD) == 4928
    assert half.weight_bytes == 2 * (2 * LAYER + 2 * HEAD) == 2624
    # Per layer 2 groups of 2 numbers, a key and a value, of 2 bytes; 3 tokens of 2 sequences.
    assert dense.kv_bytes == 4 * 2 * 2 * 2 * 2 * 3 * 2 == 384
    assert half.kv_bytes == 192
    assert (dense.total_bytes, half.total_bytes) == (5312, 2816)
    assert (dense.fits, half.fits) == (False, True)
    # Decoding reads the layers, the output head and the caches at 1000 bytes a second, longer than it computes.
    assert dense.decode_seconds == pytest.approx((2 * (4 * LAYER + HEAD) + 384) / 1000) == pytest.approx(5.152)
    assert dense.tokens_per_second == pytest.approx(2 / 5.152)
    # A prefill computes: 3 tokens through the layers, 6 pairs of tokens in attention (4 heads of 2 numbers, twice a
    # multiply-add), one output head; of 2 sequences, at 4000 operations a second.
    flops = 3 * 2 * 4 * LAYER + 6 * 4 * (4 * 4 * 2) + 2 * HEAD
    assert dense.prefill_seconds == pytest.approx(2 * flops / 4000) == pytest.approx(7.376)


def test_a_format_that_the_device_lacks_is_computed_in_a_wider_one() -> None:
    many = small((1.0,), context=1, batch=1000, precision="int4")[0]
    flops = 1000 * (2 * 4 * LAYER + 4 * (4 * 4 * 2) + 2 * HEAD)
    moved = 0.625 * (4 * LAYER + HEAD) + 1000 * 4 * 2 * 2 * 2 * 4
    assert many.decode_seconds == pytest.approx(max(flops / 4000, moved / 1000)) == pytest.approx(flops / 4000)
    assert many.weight_bytes == 0.625 * (4 * LAYER + 2 * HEAD)


@pytest.mark.parametrize(("precision", "weight"), [("int8", 1.0), ("fp8", 1.0), ("int4", 0.5 + 2 / 128)])
def test_the_dialect_standard_quantizes_layers_alone(precision: str, weight: float) -> None:
    """Embedding, output head and caches have 16 bits there."""
    source = Source(name="small", kind="bundle", shape=SMALL, dialect="standard")
    device = dataclasses.replace(TOY, peak_flops={"fp32": 1e9})  # so that only what is read takes time
    row = estimate(source, device, (1.0,), precision=precision, context=3, batch=2)[0]
    assert row.weight_bytes == weight * 4 * LAYER + 2 * 2 * HEAD
    assert row.kv_bytes == 4 * 2 * 2 * 2 * 2 * 3 * 2
    assert row.decode_seconds == pytest.approx((weight * 4 * LAYER + 2 * HEAD + row.kv_bytes) / 1000)


def test_a_bundle_brings_its_dialect_and_positions(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest | {"dialect": "standard"}))
    source = read_source(tmp_path)
    assert (source.dialect, source.positions) == ("standard", 256)
    assert estimate(source, TOY, (1.0,)) == estimate(source, TOY, (1.0,), context=256)
    with pytest.raises(ConfigError, match="context 257: tiny has 256 positions; give no more"):
        estimate(source, TOY, (1.0,), context=257)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_kv_heads_are_as_many_as_heads(family: str) -> None:
    data = CONFIG | {"model_type": family, "num_key_value_heads": None, "head_dim": 2}
    assert shape_of_config(data) == dataclasses.replace(SMALL, num_groups=4)


def test_the_command_takes_the_dialect_that_is_meant(
    model: Path, toy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", "estimate", str(model), "--device", toy, "--budgets", "1", "--precision", "int8"]
    assert main([*command, "--dialect", "standard", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    source = Source(name="small", kind="model", shape=SMALL, dialect="standard")
    assert data["budgets"] == [estimate(source, TOY, (1.0,), precision="int8")[0].to_json()]
    assert (data["dialect"], data["context"]) == ("standard", 2048)
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*command, "--dialect", "standard"]) == 0
    assert "on toy: int8, standard, context 2048, batch 1" in capsys.readouterr().out
    (model / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 512
    for options, words in (
        (["--context", "513"], "context 513: small has 512 positions"),
        (["--dialect", "onnx"], "dialect must be one of ort, standard, found 'onnx'"),
        (["--precision", "fp8"], "precision fp8 is of the dialect standard"),
    ):
        assert main([*command, *options]) == 2
        assert words in capsys.readouterr().err


def test_memory_that_is_just_enough_fits() -> None:
    needed = small((1.0,), context=1)[0].total_bytes
    source = Source(name="small", kind="model", shape=SMALL)
    for memory, fits in ((needed, True), (needed - 1, False)):
        assert estimate(source, dataclasses.replace(TOY, memory_bytes=memory), (1.0,), context=1)[0].fits is fits


@given(shapes(), computes)
def test_spread_keeps_the_budget_and_takes_what_whole_layers_it_can(shape: ModelShape, compute: float) -> None:
    cost, budget = CostModel(shape=shape), Budget(compute=compute)
    one = Allocation.of_layers([0], shape.num_layers, shape.num_groups)
    if not cost.fits(one, budget):
        with pytest.raises(BudgetError, match="below one layer"):
            spread(shape, compute)
        return
    allocation = spread(shape, compute)
    assert cost.fits(allocation, budget)
    count = len(allocation.layers)
    if count < shape.num_layers:
        assert not cost.fits(Allocation.of_layers(range(count + 1), shape.num_layers, shape.num_groups), budget)
    gaps = {b - a for a, b in zip(allocation.layers, [*allocation.layers[1:], shape.num_layers], strict=True)}
    assert allocation.layers[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_a_bundle_is_estimated_by_its_variants_and_precision(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path)
    lesser = manifest["graphs"][2]["allocation"] | {"groups": [[0], [], [1]]}
    manifest["graphs"].append(manifest["graphs"][2] | {"name": "b0.5.less", "allocation": lesser})
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    source = read_source(tmp_path)
    assert (source.name, source.kind, source.precision) == ("tiny", "bundle", "fp32")
    assert [budget for budget, _ in source.variants] == [1.0, 0.5]
    rows = estimate(source, TOY, (1.0, 0.7, 0.5))
    assert [row.spread for row in rows] == [False, True, False]
    assert rows[2].allocation.groups == ((0, 1), (), (1,))  # the costlier of the two of this budget


def test_an_artifact_is_read(tmp_path: Path) -> None:
    (tmp_path / "gates.safetensors").write_bytes(b"gates")
    dataclasses.replace(EXAMPLE_ARTIFACT, files=describe_files(tmp_path)).write(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # the artifact goes first
    source = read_source(tmp_path)
    assert (source.name, source.kind, source.shape) == ("tiny", "artifact", EXAMPLE_ARTIFACT.shape)


def test_a_models_folder_and_its_config_are_the_same(model: Path) -> None:
    source = read_source(model)
    assert source == read_source(model / "config.json") == Source(name="small", kind="model", shape=SMALL)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "tie_word_embeddings"])
def test_what_llama_may_leave_out(key: str) -> None:
    found = shape_of_config({name: value for name, value in CONFIG.items() if name != key})
    assert found == (dataclasses.replace(SMALL, num_groups=4) if key == "num_key_value_heads" else SMALL)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_shapes_are_those_that_training_reads(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    families = pytest.importorskip("l2a_compress.modeling.families")
    assert families.FAMILIES == FAMILIES
    values = {key: value for key, value in CONFIG.items() if key != "model_type"} | {"tie_word_embeddings": True}
    for changes in ({}, values):
        config = transformers.AutoConfig.for_model(family, **changes)
        config.save_pretrained(tmp_path)
        assert read_source(tmp_path).shape == families.shape_of(config)


def test_the_embedded_model_is_read() -> None:
    assert read_source(MODEL_DIR).shape.num_layers == 12


def test_the_recommendation_fits_and_keeps_the_target() -> None:
    rows = small((1.0, 0.75, 0.5, 0.25), context=3, batch=2)
    assert [row.fits for row in rows] == [False, True, True, True]
    assert recommend(rows) == (0.75, 0.5, 0.25)
    assert recommend(rows, rows[2].decode_seconds) == (0.5, 0.25)
    assert recommend(rows, rows[3].decode_seconds / 2) == ()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        *(
            ({key: None}, ConfigError, f"config.json: key '{key}' is missing")
            for key in CONFIG
            if key.startswith("num_h") or key in ("hidden_size", "intermediate_size", "vocab_size")
        ),
        ({"num_attention_heads": None}, ConfigError, "key 'num_attention_heads' is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": ...}, ConfigError, "key 'num_key_value_heads' is missing"),
        ({"model_type": "mistral", "num_key_value_heads": ...}, ConfigError, "key 'num_key_value_heads' is missing"),
        ({"num_key_value_heads": None, "num_attention_heads": 10**9}, ConfigError, "num_groups must be at most 1024"),
        ({"num_hidden_layers": 10**9}, ConfigError, "num_layers must be at most 1024"),
        ({"max_position_embeddings": 0}, ConfigError, "max_position_embeddings must be at least 1"),
        ({"model_type": "qwen3"}, ConfigError, "key 'head_dim' is missing"),
        ({"hidden_size": "8"}, ConfigError, "hidden_size must be an integer, found '8'"),
        ({"vocab_size": 0}, ConfigError, "vocab_size must be at least 1"),
        ({"num_key_value_heads": 3}, ConfigError, "num_heads must be a multiple of num_groups"),
        ({"tie_word_embeddings": 1}, ConfigError, "tie_word_embeddings must be true or false"),
        ({"model_type": "gpt2"}, UnsupportedModelError, "model_type must be one of llama.*found 'gpt2'"),
        ({"model_type": None}, UnsupportedModelError, "model_type must be one of"),
        ({"model_type": ["llama"]}, UnsupportedModelError, "model_type must be one of"),
    ],
)
def test_a_bad_config_is_refused_by_its_key(
    change: dict[str, object], error: type[L2AError], match: str, model: Path
) -> None:
    config = {key: value for key, value in (CONFIG | change).items() if value is not ...}  # what is left out
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        read_source(model)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "\ud800"])
def test_a_config_that_is_no_object_is_refused_by_name(text: str, model: Path) -> None:
    (model / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=r"config\.json: (a model's config must be|not a JSON file)"):
        read_source(model)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest\.json, artifact\.json or config\.json"):
        read_source(tmp_path)
    with pytest.raises(ConfigError, match="none: no manifest"):
        read_source(tmp_path / "none")
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(ArtifactError):
        read_source(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"precision": "fp64"}, ConfigError, "precision must be one of fp32.*found 'fp64'"),
        ({"context": 0}, ConfigError, "context must be at least 1"),
        ({"batch": 0}, ConfigError, "batch must be at least 1"),
        ({"batch": 1.5}, ConfigError, "batch must be an integer"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[L2AError], match: str) -> None:
    with pytest.raises(error, match=match):
        small((1.0,), **options)


@pytest.mark.parametrize("budget", [0.0, 1.5, float("nan")])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"budget\.compute must be in"):
        small((budget,))


def test_the_command_prints_a_table(
    model: Path, toy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--context", "3", "--batch", "2", "--budgets", "1,0.75,0.5", "--target-ms", "3000"]
    assert main(["compress", "estimate", str(model), "--device", toy, *options]) == 0
    out = capsys.readouterr().out
    assert "small (model) on toy: fp16, context 3, batch 2" in out
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if "*  " in line and not line.startswith("*")
    }
    assert rows["1*"] == ["4", "8", "0.00493", "0.000384", "0.00531", "NO", "5152", "7376", "0.388"]
    assert rows["0.5*"][:3] == ["2", "4", "0.00262"]
    assert "predicted" in out
    assert "lower bounds" in out
    assert "evenly spread" in out
    assert "fp16 is computed in fp16 at 4e-09 T operations/s" in out
    assert "largest budget that fits: 0.75" in out
    assert "largest budget predicted within 3000 ms a token: 0.5" in out
    assert out.endswith("recommended ladder: 0.5\n")


def test_no_line_of_the_table_is_cut_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    large = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | large | {"vocab_size": 128256}))
    assert main(["compress", "estimate", str(tmp_path), "--device", "h200-sxm", "--batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert "weights" in out
    assert "prefill" in out
    rows = [line.split() for line in out.splitlines() if line.lstrip().startswith(("1*", "0."))]
    assert [len(row) for row in rows] == [10] * 5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--context", "1000000"], "recommended: none of these budgets fits the memory"),
        (["--context", "3", "--target-ms", "1"], "recommended: none of these budgets is predicted within 1 ms a token"),
        (["--context", "3"], "recommended ladder: 0.85, 0.7, 0.55, 0.4"),
    ],
)
def test_the_command_says_what_is_recommended(
    options: list[str], line: str, model: Path, toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "estimate", str(model), "--device", toy, *options]) == 0
    assert line in capsys.readouterr().out


def test_the_command_prints_json(tmp_path: Path, toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(json.dumps(write_bundle(folder)))
    options = ["--context", "3", "--target-ms", "60000", "--json"]
    assert main(["compress", "estimate", str(folder), "--device", toy, *options]) == 0
    data = json.loads(capsys.readouterr().out)
    source = read_source(folder)
    rows = estimate(source, TOY, (1.0, 0.5), precision="fp32", context=3)
    assert data["budgets"] == [row.to_json() for row in rows]
    assert [row["allocation"] for row in data["budgets"]] == ["variant", "variant"]
    assert data["budgets"][1]["groups"] == 3
    assert (data["precision"], data["computes_in"], data["context"], data["batch"]) == ("fp32", "fp32", 3, 1)
    assert data["device"] == TOY.to_json()
    assert "predicted" in data["note"]
    assert "lower bound" in data["note"]
    assert data["recommended"] == {
        "ladder": [0.5],
        "largest_that_fits": 0.5,
        "target_ms": 60000.0,
        "largest_within_target": 0.5,
    }


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--device", "h300"], "unknown device 'h300'; known: a100-80gb, b200"),
        (["--device", "none.toml"], "none.toml: cannot read"),
        (["--device", "t4", "--precision", "fp64"], "precision must be one of fp32"),
        (["--device", "t4", "--budgets", "1.2"], "budget.compute must be in (0, 1], found 1.2"),
        (["--device", "t4", "--budgets", "1,x"], "budgets must be numbers such as 1.0,0.7,0.4, found '1,x'"),
        (["--device", "t4", "--budgets", "0.5,0.7"], "must fall"),
        (["--device", "t4", "--budgets", "0.1"], "budget 0.1 is below one layer of 4"),
        (["--device", "t4", "--budgets", "1", "--ladder", "default"], "budgets and ladder: give one of them"),
        (["--device", "t4", "--ladder", "steep"], "unknown ladder 'steep'; known: buckets, default"),
        (["--device", "t4", "--target-ms", "0"], "target-ms must be finite and above 0"),
        (["--device", "t4", "--context", "0"], "context must be at least 1"),
    ],
)
def test_errors_of_the_command_are_one_line(
    options: list[str], error: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "estimate", str(model), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert error in captured.err
    assert captured.err.count("\n") == 1
