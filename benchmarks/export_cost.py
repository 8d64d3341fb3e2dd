"""What an export takes and gives: seconds, peak memory, and bytes of the bundle against the dense model's.

    python benchmarks/export_cost.py --artifact runs/smollm2/artifact

Every precision is exported by the command line in a process of its own. Dense bytes are those of the tensors that the
dense variant reads, without gaps; the bundle's are the whole weight file and all graphs (one If graph, five variants).
The tokenizer and the manifest, which a dense model has too, are not counted. Figures go to
benchmarks/results/export_cost.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from measure import RESULTS, Results, verdict

from l2a_compress.bundle import WEIGHT_FILE, Bundle
from l2a_compress.exporters.facts import initializers

PRECISIONS = ("fp32", "int8", "int4")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "export_cost.json", help="figures (%(default)s)")
    options = parser.parse_args()
    found, float_bytes = {}, 0
    with tempfile.TemporaryDirectory() as work:
        for precision in PRECISIONS:
            folder = Path(work) / precision
            seconds, peak = _export(options.artifact, folder, precision)
            sizes = _sizes(folder)
            float_bytes = float_bytes or sizes["dense"]  # fp32 comes first
            found[precision] = {"seconds": seconds, "peak_bytes": peak, **sizes}
            name = Path(Bundle.load(folder).base["name"]).name
            verdict(f"{precision}: {seconds:.1f} s", seconds, 60, at_most=True)
            share = peak / float_bytes
            verdict(f"{precision}: peak {peak / 1e6:.0f} MB, {share:.2f} x fp32 weights", share, 2.5, at_most=True)
            ratio = (sizes["weights"] + sizes["graphs"]) / sizes["dense"]
            verdict(f"{precision}: bundle {ratio:.4f} x dense weights", ratio, 1.02, at_most=True)
    Results(options.out).put(name, found, {"precisions": PRECISIONS}, threads=len(os.sched_getaffinity(0)))
    print(f"figures: {options.out}")


def _export(artifact: Path, folder: Path, precision: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of the command, start of the interpreter included."""
    command = ["-m", "l2a_compress", "compress", "export", "--artifact", str(artifact), "--out", str(folder)]
    began = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *command, "--precision", precision, "--quiet"], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"the export at {precision} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def _sizes(folder: Path) -> dict[str, Any]:
    """Bytes of what the dense variant reads, of the weight file, and of all graphs."""
    dense = next(entry for entry in Bundle.load(folder).variants if entry.budget == 1.0)
    ends: dict[int, int] = {}
    for tensor in initializers(onnx.load(str(folder / dense.file), load_external_data=False).graph):
        place = {item.key: int(item.value) for item in tensor.external_data if item.key != "location"}
        if place:
            ends[place["offset"]] = max(ends.get(place["offset"], 0), place["offset"] + place["length"])
    total = last = 0
    for start, end in sorted(ends.items()):  # a tensor and some of its rows are counted once
        total += max(0, end - max(start, last))
        last = max(last, end)
    graphs = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    return {"dense": total, "weights": (folder / WEIGHT_FILE).stat().st_size, "graphs": graphs}


if __name__ == "__main__":
    main()
