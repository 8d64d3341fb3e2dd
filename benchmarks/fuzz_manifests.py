"""Opens many bundles whose manifests are almost right: each opens, or is one BundleError.

    python benchmarks/fuzz_manifests.py --count 100000 --seed 0

The first manifest that ends otherwise is printed and ends the run. Messages are counted without what was found in the
file: values, numbers and keys below the first; a field counts once it stands in one. Figures go to
benchmarks/results/fuzz_manifests.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mutations import mutate, write_bundle

from l2a_compress._machine import processor
from l2a_compress.bundle import MANIFEST_FILE, Bundle
from l2a_compress.errors import BundleError
from l2a_compress.files import write_atomic

RESULTS = Path(__file__).parent / "results"
_PLACE = re.compile(r"(?s)^(graphs\[\d+\]: )?(graph .*?: )?|^.*: (?=the file|has |is corrupt|cannot)")
_FOUND = re.compile(r"(?s), found .*| \(.*|: its SHA.*|;.*|'.*?(?:'|\.\.\.)|(?<=[a-z])[.\[]\S*|\d+")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="manifests (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz_manifests.json", help="figures (%(default)s)")
    options = parser.parse_args()
    draw, began = random.Random(options.seed), time.perf_counter()
    messages, words, refused = set[str](), set[str](), 0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        manifest = write_bundle(folder)
        for number in range(options.count):
            data = mutate(draw, manifest)
            (folder / MANIFEST_FILE).write_bytes(data)
            try:
                Bundle.load(folder)
            except BundleError as error:
                text = str(error).removeprefix(f"{folder}/").removeprefix(f"{MANIFEST_FILE}: ")
                messages.add(_FOUND.sub("", _PLACE.sub("", text)))
                words.update(re.findall(r"\w+", text.partition(", found ")[0].partition(";")[0]))
                refused += 1
            except BaseException:
                print(f"manifest {number}: {data!r}")
                raise
    fields = set(_fields(manifest | {"files": manifest["files"]["weights.bin"]}))
    found = {
        "count": options.count,
        "seed": options.seed,
        "refused": refused,
        "accepted": options.count - refused,
        "messages": len(messages),
        "fields": len(fields),
        "fields_named": len(fields & words),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": processor(),
    }
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    write_atomic(options.out, json.dumps(found, indent=2, sort_keys=True) + "\n")
    print(f"figures: {options.out}")


def _fields(value: object) -> Iterator[str]:
    """Every key of a JSON value."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _fields(item)


if __name__ == "__main__":
    main()
