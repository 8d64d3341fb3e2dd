"""Engines: rules, recipes, builders, and what may be opened. What the real builder does is in tests/integration."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer

import bad_graphs
from fake_tensorrt import FakeTensorRT
from l2a_compress import files
from l2a_compress._cli import main
from l2a_compress._cli.engines import finish
from l2a_compress.bundle import Bundle
from l2a_compress.engines import BuildRecipe, Built, Profile, engines, open_engine
from l2a_compress.errors import BundleError, ConfigError, EngineError, StorageError
from l2a_compress.exporters import builders
from l2a_compress.exporters.engine_recipes import EngineOptions
from l2a_compress.exporters.facts import nodes
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.exporters.quantize import LINEAR, quantize_linear
from l2a_compress.exporters.rules import check
from l2a_compress.exporters.tensorrt import build_engines
from l2a_compress.exporters.verify import lint, parity, specialized
from toy_models import new_artifact

BUDGETS = (1.0, 0.6)
TRT = ExportOptions(
    budgets=BUDGETS, calibration=16, dialect="standard", head_widths=False, engines=EngineOptions(target="trt")
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, bundle with recipes) that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    artifact = new_artifact(folder)
    export(artifact, folder / "bundle", TRT)
    return artifact, folder / "bundle"


@pytest.fixture
def bundle(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that a test may change, on a machine with a GPU of compute capability 9.0."""
    shutil.copytree(made[1], tmp_path / "bundle")
    monkeypatch.setattr(builders, "capability", lambda: "9.0")
    return tmp_path / "bundle"


def fake(**settings: object) -> dict[str, object]:
    """Builders, of which the one of TensorRT is a double."""
    return {"trt": lambda: builders.TensorRT(FakeTensorRT(**settings))}  # type: ignore[arg-type]


# rules


@pytest.mark.parametrize("name", bad_graphs.GRAPHS)
def test_a_bad_graph_breaks_its_rule_and_no_other(name: str) -> None:
    rule, make = bad_graphs.GRAPHS[name]
    model = make()
    found = check(model)
    assert {finding.rule for finding in found} == {rule}
    names = {node.name or node.output[0] for node, _ in nodes(model.graph)} | {w.name for w in model.graph.initializer}
    for finding in found:
        assert finding.node in names
        assert finding.node in str(finding)
        assert finding.fix in str(finding)


@pytest.mark.parametrize("make", [bad_graphs.good, bad_graphs.if_after_if, bad_graphs.branches_of_one_width])
def test_a_graph_without_the_fault_breaks_none(make: object) -> None:
    assert check(make()) == []  # type: ignore[operator]


def test_verify_names_node_rule_and_fix(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Bundle.load(bundle)
    model = onnx.load(bundle / "b1.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.domain = "com.microsoft"
    onnx.save(model, bundle / "b1.onnx")
    broken = [text for text in lint(bundle, found) if "standard-operators" in text]
    assert len(broken) == 1
    assert node.name in broken[0]
    assert "--dialect standard" in broken[0]


# graphs


def test_told_of_a_model_without_token_gates_takes_no_budget(tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path, tokens=False)
    export(artifact, tmp_path / "bundle", TRT)
    rows = [row for row in parity(tmp_path / "bundle", artifact, prompts=4, tokens=3) if row.graph == "told"]
    assert rows
    assert all(row.equal == row.tokens for row in rows)


@pytest.mark.parametrize("head_widths", [False, True])
def test_told_and_specialised_graphs_are_the_if_graph(head_widths: bool, tmp_path: Path) -> None:
    artifact = new_artifact(tmp_path)
    options = dataclasses.replace(TRT, head_widths=head_widths)
    made = export(artifact, tmp_path / "bundle", options)
    assert lint(tmp_path / "bundle", made) == []
    rows = [row for row in parity(tmp_path / "bundle", artifact, prompts=8, tokens=6) if row.graph == "told"]
    assert len(rows) == 7
    assert all(row.equal == row.tokens and row.allocations for row in rows)
    for entry in (made.if_graph, made.told_graph):
        assert entry is not None
        assert specialized(tmp_path / "bundle", made, entry) == {"b1": 0.0, "b0.6": 0.0}


def test_a_bundle_of_few_positions_is_specialised_within_them(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = ExportOptions(budgets=(1.0,), calibration=4, dialect="standard", head_widths=False, positions=24)
    found = export(made[0], tmp_path / "bundle", options)
    assert found.if_graph is not None
    assert specialized(tmp_path / "bundle", found, found.if_graph) == {"b1": 0.0}


@pytest.mark.parametrize("precision", LINEAR)
def test_weight_only_precisions_keep_to_half_a_step(precision: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    matrix[:, 0] = 0
    matrix[:, 1] *= 1e-4  # scales that 16 bits hold with few digits
    values, scales = quantize_linear(matrix, precision, 0, 32 if precision == "int4" else 0)
    scales = scales.astype(np.float32)
    steps = scales.repeat(32, axis=0) if precision == "int4" else scales[None]
    found = values.astype(np.float32) * steps
    half = np.abs(found) / 16 + steps if precision == "fp8" else steps / 2  # an 8-bit float has 3 bits behind the point
    clipped = np.abs(found - matrix) - half <= 1e-3 * np.abs(matrix)  # where a scale was rounded down
    assert clipped.all()


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_a_quantized_bundle_answers_nearly_as_in_32_bits(precision: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64}
    artifact = new_artifact(tmp_path, model=sizes)
    made = export(artifact, tmp_path / "bundle", dataclasses.replace(TRT, precision=precision))
    assert lint(tmp_path / "bundle", made) == []
    rows = {(r.graph, r.budget): r for r in parity(tmp_path / "bundle", artifact, prompts=8, tokens=4, budgets=(1.0,))}
    differences = [rows[name].difference for name in (("if", "1"), ("told", "1"), ("b1", "1"))]
    assert max(differences) - min(differences) < 0.05  # the three compute the same
    assert differences[0] < {"int8": 0.6, "fp8": 3.0, "int4": 6.0}[precision]


# builders


def recipe(**changes: object) -> BuildRecipe:
    shapes = {"input_ids": ((1, 1), (1, 4), (2, 8))}
    given = {
        "graph": "b1",
        "target": "trt",
        "flags": {"STRONGLY_TYPED": True, "TF32": False},
        "profiles": (Profile(name="prefill", shapes=shapes), Profile(name="decode", shapes=shapes)),
        "graph_sha256": "0" * 64,
        "weights_sha256": "1" * 64,
    }
    return BuildRecipe(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "network"), [("10.16.1.11", 2), ("11.4.0.106", 0)])
def test_tensorrt_is_called_as_documented(version: str, network: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "capability", lambda: "9.0")
    module = FakeTensorRT(version)
    engine, capabilities = builders.TensorRT(module).build(Path("b1.onnx"), recipe())
    assert (bytes(engine), capabilities) == (b"engine", ("9.0",))
    profile = [
        ("create_optimization_profile",),
        ("set_shape", "input_ids", (1, 1), (1, 4), (2, 8)),
        ("add_optimization_profile",),
    ]
    assert module.calls == [
        ("Builder",),
        ("create_network", network),
        ("OnnxParser", "network"),
        ("parse_from_file", "b1.onnx"),
        ("create_builder_config",),
        ("clear_flag", "TF32"),
        *profile,
        *profile,
        ("build_serialized_network", "network"),
    ]


@pytest.mark.parametrize(
    ("settings", "here", "words"),
    [
        ({"parses": False}, "9.0", "cannot parse it: v12: not supported"),
        ({"engine": None}, "9.0", "cannot build it: no kernel for it"),
        ({"engine": b""}, "9.0", "the engine is empty"),
        ({"profile": -1}, "9.0", "cannot take the profile prefill"),
        ({"starts": False}, "9.0", "cannot start here .*failure with error: 35; .*returned nullptr"),
        ({}, None, "none is here"),
        ({}, "8.9", "for compute capability 9.0, and the GPU here has 8.9"),
    ],
)
def test_what_the_builder_refuses_is_one_error(
    settings: dict[str, object], here: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "capability", lambda: here)
    module = FakeTensorRT(**settings)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=words):
        builders.TensorRT(module).build(Path("b1.onnx"), recipe(capabilities=("9.0",)))
    assert bool(module.calls) == (here == "9.0")  # nothing is begun for another GPU


def test_a_flag_that_the_version_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "capability", lambda: "9.0")
    with pytest.raises(ConfigError, match="has no flag FP16"):
        builders.TensorRT(FakeTensorRT("11.4.0.106")).build(Path("b1.onnx"), recipe(flags={"FP16": True}))


def test_recipes_round_trip_and_refuse_what_is_wrong() -> None:
    made = recipe(capabilities=("8.9", "12.0"))
    assert BuildRecipe.from_json(json.loads(made.text())) == made
    with pytest.raises(BundleError, match="target must be one of"):
        recipe(target="trtx")
    with pytest.raises(BundleError, match="capabilities must be texts"):
        recipe(capabilities=("sm89",))
    with pytest.raises(BundleError, match="three shapes that do not fall"):
        Profile(name="p", shapes={"x": ((2,), (1,), (3,))})
    with pytest.raises(BundleError, match="unknown key"):
        BuildRecipe.from_json(made.to_json() | {"more": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "onnx"}, "target"),
        ({"kinds": ("all",)}, "choose some of"),
        ({"context": 1}, "at least 2"),
        ({"context": 256}, "prompt = 512: more than context = 256"),
        ({"target": "trt-rtx", "capabilities": ("9.0",)}, "use --target trt"),
    ],
)
def test_wrong_engine_options(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**({"target": "trt"} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "changes", "words"),
    [
        ({"kinds": ("static",)}, {}, "no such graphs"),
        ({"kinds": ("told",)}, {"if_graph": False, "per_budget": 2}, "no such graphs"),
        ({"kinds": ("variants",)}, {"budgets": ()}, "no such graphs"),
        ({"kinds": ("told", "static")}, {}, "engines static: the export has no such graphs"),
        ({"capabilities": ("8.0",)}, {"precision": "fp8"}, "8.0 do not know it; use int8 or int4"),
        ({"capabilities": ("8.9", "7.5")}, {"precision": "bf16"}, "7.5 do not know it; use fp16"),
        ({}, {"calibrate": True}, "leave out --calibrate"),
    ],
)
def test_what_no_engine_comes_of_is_refused_before_the_export(
    engine: dict[str, object], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(TRT, engines=EngineOptions(target="trt", **engine), **changes)  # type: ignore[arg-type]


def test_a_gpu_that_does_not_start_leaves_a_whole_bundle_and_exit_code_3(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("l2a_compress.exporters.tensorrt.BUILDERS", fake(starts=False))
    with pytest.raises(typer.Exit) as left:
        finish(bundle, "trt", defer=False, quiet=True)
    assert left.value.exit_code == 3
    assert "the bundle is whole, but tensorrt 11.4.0.106 cannot start here" in capsys.readouterr().err


# what is in the bundle


def test_engines_are_built_listed_and_opened(bundle: Path) -> None:
    before = Bundle.load(bundle)
    assert [each.recipe.graph for each in engines(bundle, before)] == ["told", "b1", "b0.6", "router"]
    assert [profile.name for profile in engines(bundle, before)[0].recipe.profiles] == ["prefill", "decode"]
    assert [profile.name for profile in engines(bundle, before)[3].recipe.profiles] == ["prefill"]
    decode = engines(bundle, before)[0].recipe.profiles[1].shapes
    assert decode["input_ids"] == ((1, 1), (4, 1), (8, 1))
    assert decode["attention_mask"] == ((1, 2), (4, 257), (8, 512))  # the model has 512 positions, not 1024
    assert decode["past_key_values.0.key"] == ((1, 2, 1, 16), (4, 2, 256, 16), (8, 2, 511, 16))
    with pytest.raises(EngineError, match=r"not built yet.*l2a compress build-engines"):
        open_engine(bundle, before, "b1", "trt", version="11.4.0.106", capability="9.0")
    told: list[str] = []
    found = build_engines(bundle, builders=fake(), progress=told.append)  # type: ignore[arg-type]
    assert told == [f"{name}.trt.engine" for name in ("told", "b1", "b0.6", "router")]
    after = Bundle.load(bundle)
    assert set(after.files) - set(before.files) == {each.recipe.engine for each in found} | {
        each.recipe.record for each in found
    }
    made, data = open_engine(bundle, after, "b1", "trt", version="11.4.0.106", capability="9.0")
    assert (data, made) == (b"engine", found[1].recipe)
    told.clear()
    build_engines(bundle, builders=fake(), progress=told.append)  # type: ignore[arg-type]
    assert told == []
    build_engines(bundle, only="b1", force=True, builders=fake(), progress=told.append)  # type: ignore[arg-type]
    assert told == ["b1.trt.engine"]
    build_engines(bundle, builders=fake(version="11.5.0.1"), progress=told.append)  # type: ignore[arg-type]
    assert len(told) == 5


def test_an_engine_for_something_else_is_refused_with_the_command(bundle: Path) -> None:
    build_engines(bundle, only="b1", builders=fake())  # type: ignore[arg-type]
    found = Bundle.load(bundle)
    again = r"l2a compress build-engines .* --target trt --force"
    for version, here, words in (
        ("11.3.0.99", "9.0", "built by trt 11.4.0.106, and here is 11.3.0.99"),
        ("11.4.0.106", "10.0", "the GPU here has 10.0"),
        ("11.4.0.106", None, "no GPU is here"),
    ):
        with pytest.raises(EngineError, match=f"{words}.*{again}"):
            open_engine(bundle, found, "b1", "trt", version=version, capability=here)
    (bundle / "b1.trt.engine").write_bytes(b"ENGINE")  # after the bundle was verified
    with pytest.raises(EngineError, match=f"not what was built.*{again}"):
        open_engine(bundle, found, "b1", "trt", version="11.4.0.106", capability="9.0")
    with pytest.raises(BundleError, match="corrupt"):
        Bundle.load(bundle)
    with pytest.raises(BundleError, match="has no engine of b0"):
        open_engine(bundle, found, "b0", "trt", version="11.4.0.106", capability="9.0")


def test_a_recipe_of_another_graph_is_refused(bundle: Path) -> None:
    found = Bundle.load(bundle)
    shutil.copy(bundle / "b0.6.trt.recipe.json", bundle / "b1.trt.recipe.json")
    with pytest.raises(BundleError, match="of another graph"):
        engines(bundle, found)
    (bundle / "b1.trt.recipe.json").write_text("{}")
    with pytest.raises(BundleError, match="not what export and build-engines write"):
        engines(bundle, found)


def test_a_build_that_dies_leaves_a_whole_bundle(bundle: Path) -> None:
    build_engines(bundle, only="told", builders=fake())  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        build_engines(bundle, force=True, builders=fake(engine=None))  # type: ignore[arg-type]
    assert [each.built is not None for each in engines(bundle, Bundle.load(bundle))] == [True, False, False, False]
    (bundle / "b1.trt.engine").write_bytes(b"half")  # written, but not listed: no part of the bundle
    assert [each.built is not None for each in engines(bundle, Bundle.load(bundle))] == [True, False, False, False]
    build_engines(bundle, builders=fake())  # type: ignore[arg-type]
    assert all(each.built for each in engines(bundle, Bundle.load(bundle)))


def test_processes_that_build_at_a_time_keep_each_others_engines(bundle: Path) -> None:
    def meanwhile() -> builders.TensorRT:
        build_engines(bundle, only="b0.6", builders=fake())  # type: ignore[arg-type]
        return builders.TensorRT(FakeTensorRT())

    build_engines(bundle, only="b1", builders={"trt": meanwhile})
    built = {each.recipe.graph for each in engines(bundle, Bundle.load(bundle)) if each.built}
    assert built == {"b1", "b0.6"}


def test_a_file_system_without_locks_gets_its_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def flock(held: int, how: int) -> None:
        asked.append(how)
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    build_engines(bundle, only="b1", builders=fake())  # type: ignore[arg-type]
    assert asked == [files.fcntl.LOCK_EX] * 2  # which waits
    assert [each.recipe.graph for each in engines(bundle, Bundle.load(bundle)) if each.built] == ["b1"]


def test_a_folder_that_is_not_writable_is_told_before_the_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", read_only)
    module = FakeTensorRT()
    with pytest.raises(StorageError, match=r"bundle: cannot write: .*choose another one"):
        build_engines(bundle, builders={"trt": lambda: builders.TensorRT(module)})
    assert module.calls == []


def test_files_are_hashed_once_as_engines_are_built_and_shown(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = list[str]()

    def counted(path: Path) -> str:
        hashed.append(Path(path).name)
        return files.sha256_of(path)

    monkeypatch.setattr("l2a_compress._listing.sha256_of", counted)
    monkeypatch.setattr("l2a_compress.exporters.tensorrt.BUILDERS", fake())
    finish(bundle, "trt", defer=False, quiet=True)
    assert hashed.count("weights.bin") == 1
    assert "b1.trt.engine" not in hashed  # by its bytes in memory
    Bundle.load(bundle)


def test_engines_are_built_where_there_is_neither_torch_nor_onnx(bundle: Path) -> None:
    program = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime"):
    sys.modules[name] = None
from l2a_compress._cli import main
sys.exit(main(["compress", "build-engines", sys.argv[1], "--quiet"]))
"""
    found = subprocess.run([sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "tensorrt cannot be loaded" in found.stderr


def test_records_of_builds_are_checked() -> None:
    with pytest.raises(BundleError, match="seconds"):
        Built(version="1", capabilities=("8.9",), sha256="0" * 64, seconds=0)


# command line


def test_verify_compares_engines_that_there_are(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ["compress", "verify", str(made[1]), "--artifact", str(made[0])]
    for options, words in (
        (["--engines", "nonsense"], "--engines must be one of trt, trt-rtx, found 'nonsense'"),
        (["--engines", "trt-rtx"], "has no engine to compare; export with --target trt-rtx"),
        (["--engines", "trt", "--provider", "cuda"], "give one of them"),
    ):
        assert main([*verify, *options]) == 2
        assert words in capsys.readouterr().err
    export(made[0], tmp_path / "bundle", dataclasses.replace(TRT, engines=None))
    verify[2] = str(tmp_path / "bundle")
    assert main([*verify, "--engines", "trt"]) == 2
    assert "has no engine to compare; export with --target trt, and some of told" in capsys.readouterr().err


def test_verify_says_which_graphs_it_did_not_compare_with_variants(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "verify", str(made[1])]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} specialised to each of 2 variants is that variant" in shown for name in ("if", "told"))
    export(made[0], tmp_path / "bundle", dataclasses.replace(TRT, precision="fp16"))
    assert main(["compress", "verify", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} was NOT compared with variants" in shown for name in ("if", "told"))


def test_without_tensorrt_the_bundle_is_whole_and_the_exit_code_says_so(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(builders, "import_module", missing)
    command = ["compress", "export", "--artifact", str(made[0]), "--target", "trt", "--device", "h100-sxm", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 3
    error = capsys.readouterr().err
    assert "the bundle is whole, but tensorrt cannot be loaded" in error
    assert f"l2a compress build-engines {tmp_path / 'a'}" in error
    found = Bundle.load(tmp_path / "a")
    assert found.precision == "fp16"
    assert {each.recipe.capabilities for each in engines(tmp_path / "a", found)} == {("9.0",)}
    assert main([*command, "--out", str(tmp_path / "b"), "--defer-build"]) == 0
    assert "engines are NOT built; on the machine that is to run them" in capsys.readouterr().out
    assert main(["compress", "inspect", str(tmp_path / "b")]) == 0
    assert "not built" in capsys.readouterr().out
    assert main(["compress", "build-engines", str(tmp_path / "b"), "--quiet"]) == 2
    assert "pip install 'l2a-compress[gpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "tensorrt"], "--target must be one of onnx, trt, trt-rtx"),
        (["--target", "trt", "--dialect", "ort"], "TensorRT knows the dialect standard alone"),
        (["--target", "trt-rtx", "--device", "h100-sxm"], "use --target trt"),
        (["--target", "trt", "--device", "generic-cpu"], "no NVIDIA GPU"),
        (["--target", "trt-rtx", "--device", "a100-80gb", "--precision", "fp8"], "do not know it"),
        (["--precision", "fp8"], "standard dialect"),
        (["--target", "trt", "--engines", "static"], "the export has no such graphs"),
        (["--max-batch", "2"], "--target onnx has none; give --target trt or trt-rtx"),
        (["--device", "t4"], "are of engines"),
        (["--defer-build"], "are of engines"),
        (["--no-variants", "--ladder", "default"], "give one"),
    ],
)
def test_mistakes_of_the_export_are_one_line(
    options: list[str], words: str, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", "export", "--artifact", str(made[0]), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*command, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_ladder_may_bring_fixed_shapes(made: tuple[Path, Path], tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.toml"
    ladder.write_text('budgets = [1.0]\nstatic_shapes = "batch=1,2 seq=16"\n')
    command = ["compress", "export", "--artifact", str(made[0]), "--out", str(tmp_path / "out"), "--quiet"]
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("budgets = [1.0]\nstatic_shapes = [1, 2]\n")
    assert main([*command, "--ladder", str(wrong)]) == 2
    assert main([*command, "--target", "trt", "--ladder", str(ladder), "--defer-build"]) == 0
    found = engines(tmp_path / "out", Bundle.load(tmp_path / "out"))
    fixed = [each.recipe.graph for each in found if not each.recipe.profiles]
    assert fixed == [f"b1.{phase}.batch{rows}.seq16" for rows in (2, 1) for phase in ("prefill", "decode")]
