"""Kills exports at random moments: python kill_export.py ARTIFACT OUT TIMES. Run by test_processes.py.

The moments are spread over a whole export, and every sixth process is left to end, however busy the machine is.
After each kill the bundle must be the old one, the new one, or absent where none was; never one that opens half.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from l2a_compress.bundle import Bundle
from l2a_compress.exporters.onnx import ExportOptions, export

KINDS = (ExportOptions(budgets=(1.0, 0.6), calibration=4), ExportOptions(budgets=(1.0, 0.8, 0.6), calibration=4))
CONTEXT = multiprocessing.get_context(
    "forkserver"
)  # children of a process that has imported everything and run nothing


def start(artifact: Path, out: Path, kind: int) -> ForkServerProcess:
    """An export of that kind, in a process of its own."""
    child = CONTEXT.Process(target=export, args=(artifact, out, KINDS[kind]), kwargs={"force": True})
    child.start()
    return child


def finish(child: ForkServerProcess) -> None:
    """Waits for an export that nobody kills."""
    child.join()
    assert child.exitcode == 0, f"an export ended with {child.exitcode}"


def main() -> None:
    """Prints how often each state was found."""
    artifact, out, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    CONTEXT.set_forkserver_preload(["l2a_compress.exporters.onnx", "onnxruntime"])
    bundles, seconds = [], []
    for kind in (0, 0, 1):  # the first one also starts the server
        began = time.perf_counter()
        finish(start(artifact, out, kind))
        bundles.append(Bundle.load(out))
        seconds.append(time.perf_counter() - began)
    bundles, longest = bundles[1:], max(seconds[1:])
    whole = shutil.copytree(out, out.with_name("whole"))
    draw, found = random.Random(0), Counter[str]()
    for number in range(times):
        if number % 2 == 0:
            shutil.rmtree(out, ignore_errors=True)
        elif not out.exists():
            shutil.copytree(whole, out)
        before = Bundle.load(out) if out.exists() else None
        new = 0 if before == bundles[1] else 1
        child = start(artifact, out, new)
        if number % 6 == 5:
            finish(child)
        else:
            time.sleep(1.3 * longest * (number + draw.random()) / times)
            child.kill()
            child.join()
        if not out.exists():
            assert before is None, f"kill {number}: the bundle that was there is lost"
            found["absent"] += 1
        else:
            now = Bundle.load(out)  # checks every digest
            assert now in (before, bundles[new]), f"kill {number}: another bundle than the old and the new one"
            found["old" if now == before else "new"] += 1
    finish(start(artifact, out, 0))
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    assert not left, f"left behind after the next export: {left}"
    print(dict(found))


if __name__ == "__main__":
    main()
