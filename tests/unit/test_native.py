"""The C++ runtime in Python: the same tokens and errors as the Python runtime, where its library is built."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from mutations import mutate, write_bundle

from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle
from l2a_compress.errors import BundleError, ConfigError, L2AError
from l2a_compress.exporters.onnx import ExportOptions, export
from l2a_compress.runtime import Limits, Runtime, Sampling
from l2a_compress.runtime.chooser import Serve
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.native import Native, library
from l2a_compress.training.store import load_artifact
from toy_models import kept_groups, new_artifact, prompts

BUILT = Path(__file__).parents[2] / "build" / "cpp" / "libl2a.so"
BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.45)
LIMITS = Limits(max_think_tokens=9, max_answer_tokens=4, tau_threshold=0.5)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    if BUILT.is_file():
        monkeypatch.setenv("L2A_LIBRARY", os.environ.get("L2A_LIBRARY", str(BUILT)))
    try:
        library()
    except ConfigError as error:
        pytest.skip(f"the C++ runtime is not built (make cpp-test): {error}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    artifact = new_artifact(folder)
    gated = load_artifact(artifact).gated
    ladder = ((1.0, kept_groups(gated, (2,) * 6)), (0.8, kept_groups(gated, (2, 2, 0, 1, 2, 1))))
    export(artifact, folder / "bundle", ExportOptions(allocations=ladder))
    return folder / "bundle"


def texts(count: int) -> list[list[int]]:
    ids, mask = prompts(count, 12, seed=3)
    return [row[held.bool()].tolist() for row, held in zip(ids, mask, strict=True)]


def write(bundle: Path, serve: Serve, runs: Any) -> list[tuple[list[int], tuple[int, ...] | None]]:
    engine = Engine(bundle, max_rows=4, threads=1, serve=serve, max_graphs=2, engine=runs)
    budgets = [
        Budget(compute=max(0.8, BUDGETS[row % 6]) if serve == "variants" else BUDGETS[row % 6]) for row in range(24)
    ]
    requests = [
        *engine.submit(texts(12), budgets[:12], limits=LIMITS),
        *engine.submit(texts(12), budgets[12:], limits=LIMITS, sampling=Sampling(temperature=0.8, top_p=0.9, seed=4)),
    ]
    for step in range(300):
        if not engine.busy:
            break
        engine.step()
        if step == 3:
            for place, request in enumerate(requests[:8]):
                engine.set_budget(request, Budget(compute=(0.8, 1.0)[place % 2]))
    assert all(request.done and request.error is None for request in requests)
    return [(request.written, request.kept) for request in requests]


@pytest.mark.parametrize("serve", ["if", "variants"])
def test_native_writes_what_python_writes(bundle: Path, serve: Serve) -> None:
    found, expected = write(bundle, serve, "native"), write(bundle, serve, "python")
    assert found == expected
    assert len({tuple(kept or ()) for _, kept in found}) > 1


def test_a_runtime_is_opened_with_it(bundle: Path) -> None:
    asked = ["Ann has 3 apples.", "Bob has 5 pears and eats 2."]
    budgets = [Budget(compute=0.9), Budget(compute=0.6)]
    native, python = (Runtime.open(bundle, threads=1, engine=kind) for kind in ("native", "python"))
    assert native.generate(asked, budgets, limits=LIMITS) == python.generate(asked, budgets, limits=LIMITS)
    native.engine.close()


def test_all_graphs_are_open_at_once(bundle: Path) -> None:
    engine = Engine(bundle, threads=1, serve="variants", engine="native")
    engine.submit(texts(2), [Budget(compute=1.0), Budget(compute=0.8)], limits=LIMITS)
    engine.step()
    assert sorted(engine.graphs) == ["b0.8", "b1"]  # max_graphs is 1, and each has a row
    assert engine.rows == 2


def test_errors_are_those_of_python(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Native(tmp_path / "none")
    with pytest.raises(ConfigError, match="engine must be one of python, native"):
        Engine(bundle, engine="c++")  # type: ignore[arg-type]
    monkeypatch.setenv("L2A_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ConfigError, match=r"none\.so cannot be loaded .*; build cpp/"):
        Engine(bundle, engine="native")


def _refusal(folder: Path) -> str:
    """What Python has against a bundle."""
    try:
        Bundle.load(folder)
    except L2AError as error:
        return str(error)
    return ""


def test_both_loaders_take_and_refuse_the_same_manifests(tmp_path: Path) -> None:
    manifest, draw, native = write_bundle(tmp_path), random.Random(5), library()
    taken = 0
    for number in range(1500):
        (tmp_path / "manifest.json").write_bytes(mutate(draw, manifest))
        status = native.l2a_verify(os.fsencode(tmp_path))
        code, message = native.l2a_status_code(status), native.l2a_status_message(status)
        native.l2a_status_free(status)
        refused = _refusal(tmp_path)
        assert code == (3 if refused else 0), f"{number}: Python: {refused or 'fine'}; C++: {message.decode()}"
        assert not refused or str(tmp_path).encode() in message
        taken += not refused
    assert taken > 50


def test_limits_of_budgets_are_the_same_integers(bundle: Path) -> None:
    """What is told shows in what the gates keep: 40 budgets, asked of both."""
    draw = random.Random(1)
    asked = [Budget(compute=draw.choice([draw.uniform(0.3, 1), round(draw.uniform(0.3, 1), 2)])) for _ in range(40)]
    kept = []
    for runs in ("python", "native"):
        engine = Engine(bundle, threads=1, engine=runs)  # type: ignore[arg-type]
        requests = engine.submit([texts(1)[0]] * 40, asked, limits=LIMITS)
        while engine.busy:
            engine.step()
        kept.append([request.kept for request in requests])
    assert kept[0] == kept[1]
