"""Builds the engines of a bundle, one at a time; each is in the bundle, listed, before the next begins."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from l2a_compress._listing import FileEntry
from l2a_compress.bundle import MANIFEST_FILE, Bundle
from l2a_compress.engines import BuildRecipe, Built, Engine, engines
from l2a_compress.errors import BundleError
from l2a_compress.exporters.builders import BUILDERS, EngineBuilder
from l2a_compress.files import check_writable, locked, write_atomic


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
    check_writable(folder)
    graph = next(entry for entry in bundle.graphs if entry.name == recipe.graph)
    began = time.perf_counter()
    engine, capabilities = builder.build(folder / graph.file, recipe)
    seconds = time.perf_counter() - began
    digest = hashlib.sha256(engine).hexdigest()
    built = Built(version=builder.version, capabilities=capabilities, sha256=digest, seconds=seconds)
    record = built.text().encode()
    _list(folder, {recipe.engine: None, recipe.record: None})  # until the new one is whole the bundle has none
    write_atomic(folder / recipe.engine, engine)
    write_atomic(folder / recipe.record, record)
    made: dict[str, FileEntry | None] = {
        recipe.engine: {"sha256": digest, "size": engine.nbytes},
        recipe.record: {"sha256": hashlib.sha256(record).hexdigest(), "size": len(record)},
    }
    _list(folder, made)
    return Engine(recipe=recipe, built=built)


def _list(folder: Path, entries: Mapping[str, FileEntry | None]) -> None:
    """Puts files into the manifest as it is by now, or takes out those of None; one process at a time."""
    with locked(folder, wait=True):
        bundle = read_manifest(folder)
        files = {name: entry for name, entry in bundle.files.items() if name not in entries}
        files |= {name: entry for name, entry in entries.items() if entry is not None}
        if files != bundle.files:
            replace(bundle, files=files).write(folder)


def read_manifest(folder: Path) -> Bundle:
    """A bundle that ``Bundle.load`` has verified, as its manifest is by now; no file is read again."""
    return Bundle.from_json(json.loads((folder / MANIFEST_FILE).read_bytes()))
