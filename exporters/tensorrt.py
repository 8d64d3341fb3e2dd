"""Builds the engines of a bundle, one at a time; each is in the bundle, listed, before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from l2a_compress.bundle import MANIFEST_FILE, Bundle
from l2a_compress.engines import BuildRecipe, Built, Engine, engines
from l2a_compress.errors import BundleError
from l2a_compress.exporters.builders import BUILDERS, EngineBuilder
from l2a_compress.files import sha256_of, write_atomic


def build_engines(
    folder: str | Path,
    *,
    target: str | None = None,
    only: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    builders: dict[str, Callable[[], EngineBuilder]] | None = None,
) -> list[Engine]:
    """Builds what a bundle's recipes describe and is not built, or was built by another version.

    A process that dies leaves a whole bundle: the engines that were finished are listed in the manifest, and a file
    that is not listed is no part of it. Several processes may build engines of one bundle at a time.

    Args:
        folder: the bundle's.
        target: whose engines; None: all.
        only: the graph whose engine is built; None: all.
        force: build them all again.
        progress: told the name of each engine before it is built.
        builders: by target; None: those that are installed.

    Raises:
        BundleError: the bundle is not whole, or has no such recipe.
        EngineError: the builder is not here, or refuses a graph. Engines built before it stay.
        StorageError: the disk is full or not writable.
    """
    folder, bundle = Path(folder), Bundle.load(folder)
    wanted = [each for each in engines(folder, bundle, target) if only in (None, each.recipe.graph)]
    if not wanted:
        raise BundleError(
            f"{folder}: has no recipe of such an engine; export with --target {target or 'trt or trt-rtx'}"
        )
    known, tell = builders or BUILDERS, progress or (lambda _: None)
    made = {name: known[name]() for name in sorted({each.recipe.target for each in wanted})}
    found = []
    for each in wanted:
        builder = made[each.recipe.target]
        if force or each.built is None or each.built.version != builder.version:
            tell(each.recipe.engine)
            each = _build(folder, bundle, each.recipe, builder)
        found.append(each)
    return found


def _build(folder: Path, bundle: Bundle, recipe: BuildRecipe, builder: EngineBuilder) -> Engine:
    graph = next(entry for entry in bundle.graphs if entry.name == recipe.graph)
    began = time.perf_counter()
    engine, capabilities = builder.build(folder / graph.file, recipe)
    seconds = time.perf_counter() - began
    names = (recipe.engine, recipe.record)
    _list(folder, names, listed=False)  # until the new one is whole the bundle has none
    write_atomic(folder / recipe.engine, engine)
    built = Built(
        version=builder.version,
        capabilities=capabilities,
        sha256=sha256_of(folder / recipe.engine),
        seconds=seconds,
    )
    write_atomic(folder / recipe.record, built.text())
    _list(folder, names, listed=True)
    return Engine(recipe=recipe, built=built)


def _list(folder: Path, names: Sequence[str], *, listed: bool) -> None:
    """Puts files into the manifest as it is by now, or takes them out; one process at a time."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        bundle = Bundle.from_json(json.loads((folder / MANIFEST_FILE).read_bytes()))
        files = {name: entry for name, entry in bundle.files.items() if name not in names}
        for name in names if listed else ():
            files[name] = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
        if files != bundle.files:
            replace(bundle, files=files).write(folder)
    finally:
        os.close(held)
