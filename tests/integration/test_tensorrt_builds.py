"""Real builds by TensorRT-RTX, ahead of time and without a GPU: what it refuses, and the embedded model's engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import bad_graphs
from l2a_compress._cli import main
from l2a_compress.bundle import Bundle
from l2a_compress.engines import BuildRecipe, Profile, engines, open_engine
from l2a_compress.errors import EngineError
from l2a_compress.exporters.builders import TensorRTRTX
from l2a_compress.exporters.engine_recipes import EngineOptions
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.exporters.tensorrt import build_engines
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.loading import digest_of, load_base
from l2a_compress.training.recipe import Recipe
from l2a_compress.training.store import save_artifact
from toy_models import new_artifact

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'l2a-compress[trt-rtx]'")
GPUS = ("8.6", "8.9", "12.0")
ALL = ("if", "told", "variants")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's own weights, with gates that are not trained."""
    folder = tmp_path_factory.mktemp("embedded") / "artifact"
    recipe = Recipe.named("mini", [])
    model, tokenizer = load_base(recipe.model.name, attention=recipe.model.attention)
    digest = digest_of(model)
    gated = GatedModel.wrap(model, recipe.gates, recipe.adapter)
    save_artifact(gated, tokenizer, recipe, folder, base_digest=digest, metrics={})
    return folder


def options(
    precision: str, *, budgets: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55, 0.4), **changes: object
) -> ExportOptions:
    engine_options = EngineOptions(target="trt-rtx", **{"capabilities": GPUS, "kinds": ALL} | changes)  # type: ignore[arg-type]
    return ExportOptions(
        budgets=budgets,
        calibration=16,
        dialect="standard",
        precision=precision,
        head_widths=False,
        engines=engine_options,
    )


def built(model: onnx.ModelProto, folder: Path) -> memoryview:
    """The engine of a small graph; batches of 4 to 16 where the batch is free."""
    np.ones((8, 4), dtype=np.float32).tofile(folder / bad_graphs.WEIGHTS)
    onnx.save(model, folder / "graph.onnx")
    free = {value.name: value for value in model.graph.input if value.type.tensor_type.shape.dim[:1]}
    shapes = {}
    for name, value in free.items():
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if isinstance(dims[0], str):
            shapes[name] = tuple((size, *dims[1:]) for size in (4, 8, 16))
    recipe = BuildRecipe(
        graph="graph",
        target="trt-rtx",
        capabilities=GPUS[:1],
        flags={"STRONGLY_TYPED": True},
        profiles=(Profile(name="all", shapes=shapes),) if shapes else (),  # type: ignore[arg-type]
        graph_sha256="0" * 64,
        weights_sha256="0" * 64,
    )
    return TensorRTRTX().build(folder / "graph.onnx", recipe)[0]


@pytest.mark.parametrize("name", bad_graphs.GRAPHS)
def test_the_builder_refuses_every_bad_graph(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot (parse|build) it: (?!it does not say why)"):
        built(bad_graphs.GRAPHS[name][1](), tmp_path)


@pytest.mark.parametrize("make", [bad_graphs.good, bad_graphs.if_after_if, bad_graphs.branches_of_one_width])
def test_the_builder_takes_the_same_graphs_without_the_fault(make: object, tmp_path: Path) -> None:
    assert built(make(), tmp_path).nbytes > 0  # type: ignore[operator]


def header_diagnostics(engine: bytes) -> int:
    """What TensorRT-RTX says of an engine's header; whether a GPU runs it, it cannot say without one."""
    return int(trt.Runtime(trt.Logger(trt.Logger.ERROR)).get_engine_validity(engine)[1])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # some 80 processor seconds, of which a busy machine may give little
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_engine_of_the_embedded_model_is_built_for_three_gpus(
    precision: str, artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    whole = precision == "fp16"  # of the other the recipe's flags and the smallest variant
    chosen = {"kinds": ALL} if whole else {"kinds": ("variants",), "budgets": (0.4,)}
    export(artifact, folder, options(precision, **chosen))
    build_engines(folder)
    bundle = Bundle.load(folder)
    found = engines(folder, bundle)
    names = ["if", "told", "b1", "b0.85", "b0.7", "b0.55", "b0.4", "router"]
    assert [each.recipe.graph for each in found] == (names if whole else ["b0.4", "router"])
    version, sizes = TensorRTRTX().version, {}
    for each in found:
        assert each.built is not None
        assert each.built.capabilities == GPUS
        assert each.recipe.flags == {"STRONGLY_TYPED": True} | ({"TF32": False} if precision == "fp32" else {})
        names = [profile.name for profile in each.recipe.profiles]
        assert names == (["prefill"] if each.recipe.graph == "router" else ["prefill", "decode"])
        name = each.recipe.graph
        _, data = open_engine(folder, bundle, name, "trt-rtx", version=version, capability="8.9")
        assert header_diagnostics(data) == 0
        sizes[name] = len(data)
    assert header_diagnostics(b"?" + data[1:]) == int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    if whole:
        assert sizes["b1"] > sizes["b0.7"] > sizes["b0.4"] > 0
        assert sizes["b1"] < sizes["told"] < sum(size for name, size in sizes.items() if name.startswith("b"))


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "fp8"])
def test_other_precisions_are_built_inside_of_branches(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    gpus = GPUS[1:] if precision == "fp8" else GPUS
    small = new_artifact(tmp_path, model={"num_hidden_layers": 3})
    export(small, folder, options(precision, budgets=(), kinds=("told",), capabilities=gpus))
    (told,) = build_engines(folder, only="told")
    assert told.built is not None
    assert told.built.capabilities == gpus
    assert Bundle.load(folder).files["told.trt-rtx.engine"]["size"] > 1e6


def test_the_command_builds_for_each_gpu_and_in_fixed_shapes(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ladder = tmp_path / "ladder.toml"
    ladder.write_text("budgets = [0.4]\n")
    for device, capability in (("rtx-4090", "8.9"), ("rtx-5090", "12.0")):
        folder = tmp_path / device
        command = ["compress", "export", "--artifact", str(artifact), "--out", str(folder), "--quiet"]
        command += ["--target", "trt-rtx", "--device", device, "--ladder", str(ladder), "--engines", "static"]
        assert main([*command, "--static-shapes", "batch=2 seq=64", "--no-if-graph"]) == 0
        assert "b0.4.decode.batch2.seq64" in capsys.readouterr().out
        made = engines(folder, Bundle.load(folder))
        assert [each.recipe.profiles for each in made] == [(), ()]
        assert {each.built.capabilities for each in made if each.built} == {(capability,)}
