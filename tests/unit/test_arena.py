"""The arena that sessions of onnxruntime share, which gives back what a large run took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

MATRIX = 128 << 20
PROGRAM = """
import re, sys
import numpy as np
import onnxruntime as ort
from l2a_compress.runtime.arena import giving_back, share_arena
from l2a_compress.runtime.pages import give_back

def anonymous():
    return int(re.search(r"Anonymous: *(\\d+)", open("/proc/self/smaps_rollup").read())[1]) << 10

shared, given_back = (word == "1" for word in sys.argv[2:])
sessions = []
for _ in range(3):
    options = ort.SessionOptions()
    if shared:
        share_arena(options)
    sessions.append(ort.InferenceSession(sys.argv[1], options))
sessions[0].run(None, {"x": np.ones((1, 1), np.float32)})  # an arena keeps what it first asked for
before = anonymous()
for session in sessions:
    (found,) = session.run(None, {"x": np.ones((4096, 1), np.float32)}, giving_back() if given_back else None)
    assert found == 4096 * 8192 * 2
del found
give_back()
print(anonymous() - before)
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums a matrix that it makes, by way of another."""
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Exp", ["zero"], ["one"]),
        helper.make_node("Add", ["wide", "one"], ["more"]),
        helper.make_node("ReduceSum", ["more"], ["y"], keepdims=0),
    ]
    made = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [
            helper.make_tensor("shape", TensorProto.INT64, [2], [1, 8192]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        ],
    )
    path = tmp_path_factory.mktemp("arena") / "sum.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def _held(graph: Path, *, shared: bool, given_back: bool) -> int:
    """Bytes that three sessions hold behind a large run of each."""
    command = [sys.executable, "-c", PROGRAM, str(graph), str(int(shared)), str(int(given_back))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_sessions_compute_in_one_arena_and_give_it_back(graph: Path) -> None:
    apart = _held(graph, shared=False, given_back=False)
    assert apart > 5 * MATRIX  # two matrices for each
    assert _held(graph, shared=True, given_back=False) < 0.7 * apart
    assert _held(graph, shared=True, given_back=True) < 0.25 * MATRIX
