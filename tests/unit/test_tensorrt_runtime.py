"""Engines that run, on doubles of TensorRT and CUDA: onnxruntime does the arithmetic, memory is this process's."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import BundleError, ConfigError, EngineError, OutOfMemoryError, SessionError
from l2a_compress.exporters import builders
from l2a_compress.exporters.engine_recipes import EngineOptions
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.exporters.tensorrt import build_engines
from l2a_compress.exporters.verify import graph_logits, one_more, parity
from l2a_compress.gpu import capability
from l2a_compress.runtime import Limits, Runtime, providers
from l2a_compress.runtime.cuda import Cuda
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.runtime.providers import ORDERS, open_session
from l2a_compress.runtime.tensorrt import EngineDecoder
from l2a_compress.runtime.tensorrt_fixed import FixedDecoder
from toy_models import new_artifact, prompts

SEQUENCE = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, bundle whose engines the double has built) that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    artifact = new_artifact(folder)
    options = EngineOptions(target="trt", kinds=("if", "told", "variants", "static"), batch=16, prompt=512, context=512)
    export(
        artifact,
        folder / "bundle",
        ExportOptions(
            budgets=(1.0, 0.6),
            calibration=16,
            dialect="standard",
            head_widths=False,
            static_shapes=((2, SEQUENCE),),
            engines=options,
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "capability", lambda: "9.0")
        module = FakeTensorRT(engine="graph")
        build_engines(folder / "bundle", builders={"trt": lambda: builders.TensorRT(module)})
    return artifact, folder / "bundle"


def opened(
    folder: Path, graph: str, *, cuda: FakeCuda | None = None, **settings: Any
) -> tuple[EngineDecoder, FakeTensorRT]:
    cuda = cuda or FakeCuda()
    module = FakeTensorRT(cuda=cuda, **settings)
    decoder = EngineDecoder(folder, Bundle.load(folder), graph, "trt", cuda=Cuda(cuda), module=module, here="9.0")
    return decoder, module


def test_engines_say_what_pytorch_says(made: tuple[Path, Path]) -> None:
    def decoder(entry: Any) -> EngineDecoder:
        return opened(made[1], entry.name)[0]

    rows = list(parity(made[1], made[0], prompts=8, tokens=6, budgets=(1.0, 0.6), open_decoder=decoder))
    assert [row.graph for row in rows] == ["if"] * 3 + ["b1", "b0.6"] + ["told"] * 3
    assert all(row.equal == row.tokens and row.allocations for row in rows)


def test_engines_are_compared_within_their_profiles(
    made: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = EngineOptions(target="trt", kinds=("variants",), batch=3, prompt=30, context=40)
    settings = {"budgets": (1.0,), "if_graph": False, "calibration": 4, "dialect": "standard", "engines": options}
    export(made[0], tmp_path / "bundle", ExportOptions(**settings))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "capability", lambda: "9.0")
        build_engines(tmp_path / "bundle", builders={"trt": lambda: builders.TensorRT(FakeTensorRT(engine="graph"))})

    def compared(tokens: int) -> int:
        given = {"open_decoder": lambda entry: opened(tmp_path / "bundle", entry.name)[0]}
        (row,) = parity(tmp_path / "bundle", made[0], prompts=16, tokens=tokens, **given)
        assert row.equal == row.tokens
        return row.tokens // tokens

    assert 0 < compared(6) < 16
    assert f"{16 - compared(6)} prompts of more than 30 tokens have no room" in caplog.text
    with pytest.raises(ConfigError, match="none of 16 prompts has at most 0 tokens"):
        compared(40)


@pytest.mark.parametrize("host", [(), ("input_ids", "attention_mask")])
def test_profiles_switch_and_memory_is_freed(made: tuple[Path, Path], host: tuple[str, ...]) -> None:
    cuda = FakeCuda()
    decoder, module = opened(made[1], "b1", cuda=cuda, host=host)
    ids, mask = prompts(rows=3)
    graph = GraphDecoder(made[1] / "b1.onnx", in_place=False, threads=1)
    follow = np.array([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    expected, _ = graph_logits(graph, ids, mask, follow, {})
    for _ in range(2):  # a second text begins from nothing
        found, _ = graph_logits(decoder, ids, mask, follow, {})
        np.testing.assert_array_equal(found, expected)
    context = module.opened[0]
    assert context is not None
    del decoder
    assert cuda.live == {}


@pytest.mark.parametrize("serve", ["if", "variants"])
def test_the_runtime_answers_on_engines_as_on_graphs(serve: Any, made: tuple[Path, Path], tmp_path: Path) -> None:
    allocations = tuple((v.budget, v.allocation) for v in Bundle.load(made[1]).variants if v.budget and v.allocation)
    export(made[0], tmp_path / "ort", ExportOptions(allocations=allocations))
    texts = ["how many does Ann have ?", "count of Bob : 3 4 ."]
    budgets = [Budget(compute=0.6), Budget()]
    limits = Limits(max_think_tokens=12, max_answer_tokens=6)

    def engine(folder: Path, bundle: Bundle, graph: str) -> EngineDecoder:
        return opened(folder, graph)[0]

    graphs = Runtime.open(tmp_path / "ort", serve=serve, sources=(), threads=1)
    runtime = Runtime.open(made[1], serve=serve, sources=(), open_engine=engine)
    assert runtime.generate(texts, budgets, limits=limits) == graphs.generate(texts, budgets, limits=limits)
    assert runtime.engine.runs_on == ("told: told.trt.engine" if serve == "if" else "b1: b1.trt.engine")
    assert graphs.engine.runs_on.endswith("CPUExecutionProvider")
    with pytest.raises(ConfigError, match="give a budget"):
        runtime.generate(texts, ["auto"] * 2)
    changed = runtime.engine.submit([runtime.encode(texts[0])], [Budget()], limits=limits)[0]
    for _ in range(3):
        runtime.engine.step()
    runtime.engine.set_budget(changed, Budget(compute=0.6))
    while runtime.engine.busy:
        runtime.engine.step()
    assert changed.done
    assert changed.error is None
    assert len(changed.written) > 3
    with pytest.raises(BundleError, match="dialect standard"):
        Runtime.open(tmp_path / "ort", serve=serve, sources=(), open_engine=engine)


def test_shapes_beyond_the_profiles_are_refused(made: tuple[Path, Path]) -> None:
    decoder, _ = opened(made[1], "b1")
    decoder.start(17, 8)
    ids = np.ones((17, 4), dtype=np.int64)
    with pytest.raises(SessionError, match=r"cannot take input_ids of shape .*--max-batch"):
        decoder.step(ids, ids)


@pytest.mark.parametrize("capturable", [True, False])
def test_fixed_engines_replay_a_cuda_graph_where_they_can(capturable: bool, made: tuple[Path, Path]) -> None:
    cuda = FakeCuda()
    module = FakeTensorRT(cuda=cuda, capturable=capturable)
    settings = {"cuda": Cuda(cuda), "module": module, "here": "9.0"}
    decoder = FixedDecoder(made[1], Bundle.load(made[1]), "b0.6", "trt", batch=2, sequence=SEQUENCE, **settings)
    graph = GraphDecoder(made[1] / "b0.6.onnx", in_place=False, threads=1)
    ids, mask = (value.numpy() for value in prompts(rows=2, length=9))
    for start in range(2):
        tokens, seen = ids, mask
        graph.start(2, SEQUENCE)
        decoder.start(2, SEQUENCE)
        for step in range(6):
            expected = graph.step(tokens, seen)["logits"]
            found = decoder.step(tokens, seen)["logits"]
            np.testing.assert_allclose(found, expected, atol=2e-5)
            tokens = np.array([[5 + step + start], [9 + step]])
            seen = one_more(seen, in_place=False)
    assert cuda.log.count("begin") == int(capturable)
    assert cuda.log.count("launch") == 9 * int(capturable)
    with pytest.raises(ConfigError, match="these engines are for 2"):
        decoder.start(2, SEQUENCE + 1)
    for _ in range(SEQUENCE - 9 - 5):
        decoder.step(tokens, seen)
    with pytest.raises(SessionError, match="all 32 slots are used"):
        decoder.step(tokens, seen)
    with pytest.raises(BundleError, match="--static-shapes"):
        FixedDecoder(made[1], Bundle.load(made[1]), "b1", "trt", batch=4, sequence=SEQUENCE, **settings)


def test_what_cannot_be_opened_is_one_error(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="does not open it"):
        opened(made[1], "b1", opens=False)
    with pytest.raises(EngineError, match=r"here is 10\.0\.1; rebuild it: l2a compress build-engines"):
        EngineDecoder(
            made[1], Bundle.load(made[1]), "b1", "trt", cuda=Cuda(FakeCuda()), module=FakeTensorRT("10.0.1"), here="9.0"
        )
    with pytest.raises(EngineError, match="tensorrt cannot be loaded"):
        EngineDecoder(made[1], Bundle.load(made[1]), "b1", "trt", cuda=Cuda(FakeCuda()))
    with pytest.raises(OutOfMemoryError, match="lower batch and context"):
        opened(made[1], "b1", cuda=FakeCuda(memory=1000))[0].start(16, 512)
    with pytest.raises(SessionError, match="cudaStreamSynchronize failed with CUDA's error 700"):
        decoder, _ = opened(made[1], "b1", cuda=FakeCuda(fails="wait"))
        decoder.start(1, 8)
        decoder.step(np.ones((1, 4), dtype=np.int64), np.ones((1, 4), dtype=np.int64))
    with pytest.raises(SessionError, match=r"pip install 'l2a-compress\[gpu\]'"):
        Cuda()


def test_the_gpu_that_is_here() -> None:
    def handle(index: int) -> int:
        return index

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetCudaComputeCapability=lambda device: (8, 9),
    )
    assert capability(nvml=nvml) == "8.9"
    assert capability(nvml=SimpleNamespace()) is None


# providers of onnxruntime


class Session:
    """A session of onnxruntime that is made with what was asked for and runs on something else."""

    def __init__(self, runs: list[str]) -> None:
        self.runs, self.asked = runs, None

    def InferenceSession(self, path: str, options: Any, providers: Any = None) -> Session:
        self.asked = providers
        return self

    def get_providers(self) -> list[str]:
        return self.runs


@pytest.mark.parametrize("provider", ["cuda", "trt"])
def test_the_order_of_providers_is_written_and_what_runs_is_told(
    provider: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = list(ORDERS[provider])
    module = Session(order)
    options = onnxruntime.SessionOptions()
    with caplog.at_level(logging.INFO):
        open_session(tmp_path / "if.onnx", options, provider, onnxruntime=module)  # type: ignore[arg-type]
    assert module.asked == order
    assert f"runs it on {', '.join(order)}" in caplog.text
    fallen = Session(["CPUExecutionProvider"])
    with pytest.raises(SessionError, match="install what"):
        open_session(tmp_path / "if.onnx", onnxruntime.SessionOptions(), provider, onnxruntime=fallen)  # type: ignore[arg-type]
    caplog.clear()
    open_session(
        tmp_path / "if.onnx",
        onnxruntime.SessionOptions(),
        provider,  # type: ignore[arg-type]
        strict=False,
        onnxruntime=fallen,
    )
    assert caplog.records[0].levelno == logging.WARNING


def test_the_plugin_of_tensorrt_rtx_is_registered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    plugin = SimpleNamespace(get_ep_name=lambda: device.ep_name, get_library_path=lambda: "lib.so")
    monkeypatch.setattr(providers, "import_module", lambda name: plugin)
    registered: list[str] = []
    module: Any = Session(["NvTensorRTRTXExecutionProvider", "CPUExecutionProvider"])
    module.get_ep_devices = lambda: [device] if registered else []
    module.register_execution_provider_library = lambda name, path: registered.append(path)
    given: list[Any] = []
    options: Any = SimpleNamespace(add_provider_for_devices=lambda devices, settings: given.append(devices))
    for _ in range(2):
        open_session(tmp_path / "if.onnx", options, "trt-rtx", onnxruntime=module)
    assert (registered, given) == (["lib.so"], [[device], [device]])
    module.get_ep_devices = list
    with pytest.raises(SessionError, match="finds no GPU"):
        open_session(tmp_path / "if.onnx", options, "trt-rtx", onnxruntime=module)


def test_providers_that_are_not_there(made: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="choose one of cpu, cuda, trt, trt-rtx"):
        GraphDecoder(made[1] / "b1.onnx", in_place=False, provider="gpu")  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="onnxruntime-ep-nv-tensorrt-rtx"):
        GraphDecoder(made[1] / "b1.onnx", in_place=False, provider="trt-rtx")
    assert GraphDecoder(made[1] / "b1.onnx", in_place=False).providers == ["CPUExecutionProvider"]
