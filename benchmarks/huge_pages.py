"""What huge pages are worth: decode steps of SmolLM2-135M where the kernel gives them to a runtime, and where not.

    cpp/prepare && python benchmarks/huge_pages.py

Both runtimes ask for them as they open a bundle. Every process is started anew several times, with them and, by prctl's
PR_SET_THP_DISABLE, without any, in turns, since each start gets other memory. One thread, a dense graph, batch 1 behind
64 tokens. Bundles are those of native.py; figures go to benchmarks/results/huge_pages.json.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE
from measure import RESULTS, Peer, Results, ratio, shown
from native import BUILD, HERE, PRECISIONS, build_bench, export_bundles
from untrained import CHECKPOINT

START = (
    "import ctypes, os, sys; os.environ.pop('GLIBC_TUNABLES', None); "
    "ctypes.CDLL(None).prctl(41, int(sys.argv[1]), 0, 0, 0); os.execv(sys.argv[2], sys.argv[2:])"
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "native", help="bundles (%(default)s)")
    parser.add_argument("--starts", type=int, default=8, help="of each process (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "huge_pages.json", help="figures (%(default)s)")
    options = parser.parse_args()
    options.checkpoint, options.work = CHECKPOINT, options.work / CHECKPOINT  # as native.py has them
    build_bench()
    export_bundles(options)
    results = Results(options.out)
    for precision in PRECISIONS:
        folder = str(options.work / f"dense-{precision}")
        commands = {
            "python": [sys.executable, str(HERE / "engines.py"), "bundle", folder, "1"],
            "native": [str(BUILD / "bench" / "l2a_bench"), folder, "1", "7"],
        }
        found = {name: _measure(name, command, options.starts) for name, command in commands.items()}
        for name, figures in found.items():
            print(f"{precision} {name}: speed with over without {shown(figures['speed'])}, ms {figures['ms']}")
        results.put(precision, found, {"starts": options.starts}, threads=1)
    print(f"figures: {options.out}")


def _measure(name: str, command: list[str], starts: int) -> dict[str, Any]:
    """Milliseconds of a step, medians of each start, and megabytes on huge pages."""
    asked: dict[str, Any] = {"task": "decode", "batch": 1, "length": 64, "tokens": 33, "graph": "b1"}
    if name == "native":
        asked = {"task": "step", "serve": "variants", "batch": 1, "length": 64, "tokens": 33}
    key = "decode" if name == "native" else "seconds"
    took: dict[str, list[float]] = {"with": [], "without": []}
    huge: dict[str, list[int]] = {"with": [], "without": []}
    for start in range(starts):
        for kind in ("with", "without") if start % 2 else ("without", "with"):
            worker = Peer(sys.executable, "-c", START, str(int(kind == "without")), *command)
            steps = [float(worker.ask(**asked)[key]) for _ in range(5)][1:]  # the first one warms up
            rollup = Path(f"/proc/{worker.process.pid}/smaps_rollup").read_text()
            worker.close()
            took[kind].append(statistics.median(steps))
            (kilobytes,) = re.findall(r"AnonHugePages:\s+(\d+)", rollup)
            huge[kind].append(int(kilobytes) // 1024)
    return {
        "seconds": took,
        "ms": {kind: round(1e3 * statistics.median(values), 2) for kind, values in took.items()},
        "huge_mb": huge,
        "speed": ratio(took["without"], took["with"]),
    }


if __name__ == "__main__":
    main()
