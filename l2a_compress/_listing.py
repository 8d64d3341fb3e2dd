"""Folders that one JSON file describes: what is in them, and whether it is still all there."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypedDict, TypeVar

from l2a_compress import _validate
from l2a_compress.errors import L2AError, StorageError
from l2a_compress.files import sha256_of, write_atomic

MOST_BYTES = 2**24  # of a describing file


class FileEntry(TypedDict):
    """What is known of one file: its SHA-256 as 64 hexadecimal digits and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder: its name, its describing file, what makes it, what to do when it is broken, and its error."""

    what: str
    file: str
    maker: str
    remedy: str
    error: type[L2AError]


def describe(folder: Path, skip: str) -> dict[str, FileEntry]:
    """The size and SHA-256 of every file of a folder but ``skip``.

    Raises:
        StorageError: A file cannot be read.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
        for name in names
        if name != skip
    }


class Described(Protocol):
    """What a describing file is read into."""

    @property
    def files(self) -> dict[str, FileEntry]:
        """The files that it lists."""


Description = TypeVar("Description", bound=Described)


def write(folder: Path, data: Mapping[str, Any], kind: Kind) -> None:
    """Writes the describing file, atomically.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / kind.file, text + "\n")


def load(folder: Path, parse: Callable[[object], Description], kind: Kind) -> Description:
    """Reads the describing file and verifies every file that it lists; what is wrong is an error of the kind."""
    path = folder / kind.file
    data = _read_json(path, kind)
    try:
        found = parse(data)
    except kind.error as error:
        raise kind.error(f"{path}: {error}; if {kind.file} was changed, {kind.remedy}") from None
    for name, entry in found.files.items():
        _verify(folder, name, entry, kind)
    return found


def _read_json(path: Path, kind: Kind) -> object:
    """The describing file's content; each way it can be absent or broken is one error of the kind."""
    if not os.path.isdir(path.parent):
        raise kind.error(f"{path.parent}: no such folder; give the folder that {kind.maker} wrote")
    size = _size(path.parent, kind.file, kind)
    if size is None:
        raise kind.error(
            f"{path.parent}: not {_a(kind.what)}: it holds no {kind.file}; give the folder that {kind.maker} wrote"
        )
    if size > MOST_BYTES:
        raise kind.error(f"{path}: has {size} bytes, more than {MOST_BYTES}; {kind.remedy}")
    try:
        return json.loads(path.read_bytes().decode(), object_pairs_hook=_once)
    except OSError as error:
        raise kind.error(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise kind.error(f"{path}: not JSON ({error}); the file is corrupt: {kind.remedy}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once each; readers differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {_validate.shown(twice)} stands twice in an object")
    return found


def _size(folder: Path, name: str, kind: Kind) -> int | None:
    """Bytes of the regular file at a relative path, None where there is nothing. Opens nothing and follows no link."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise kind.error(f"{path}: cannot be read: {error.strerror}; {kind.remedy}") from error
        if stat.S_ISLNK(status.st_mode):
            raise kind.error(
                f"{path}: leaves the {kind.what} folder, or may come to: it is a link; put what it names there"
            )
    if not stat.S_ISREG(status.st_mode):
        raise kind.error(f"{path}: is a folder, a pipe or a device and not a file; {kind.remedy}")
    return status.st_size


def _verify(folder: Path, name: str, entry: FileEntry, kind: Kind) -> None:
    path = folder / name
    size = _size(folder, name, kind)
    if size is None:
        raise kind.error(f"{path}: the file is missing; {kind.remedy}")
    if size != entry["size"]:
        raise kind.error(f"{path}: has {size} bytes instead of {entry['size']}; {kind.remedy}")
    try:
        digest = sha256_of(path)
    except StorageError as error:
        raise kind.error(str(error)) from error
    if digest != entry["sha256"]:
        raise kind.error(
            f"{path}: is corrupt: its SHA-256 is {digest[:12]}... instead of {entry['sha256'][:12]}...; {kind.remedy}"
        )


def parse(value: object, kind: Kind) -> dict[str, FileEntry]:
    """The ``files`` of a describing file, checked: paths stay in the folder, entries are whole."""
    if not isinstance(value, Mapping):
        raise kind.error(f"files must be an object, found {_validate.shown(value)}")
    return {_inside(name, kind): _entry(entry, f"files.{name}", kind) for name, entry in value.items()}


def _entry(value: object, name: str, kind: Kind) -> FileEntry:
    if not isinstance(value, dict) or set(value) != {"sha256", "size"}:
        raise kind.error(f"{name} must hold exactly sha256 and size, found {_validate.shown(value)}")
    return {
        "sha256": _validate.sha256(value["sha256"], f"{name}.sha256", kind.error),
        "size": _validate.integer(value["size"], f"{name}.size", kind.error, minimum=0),
    }


def _inside(value: object, kind: Kind) -> str:
    """Return a relative path that stays in the folder, on every system."""
    name = _validate.line(value, "files: a path", kind.error)
    parts = PurePosixPath(name)
    clean = name == parts.as_posix() and "\\" not in name and ":" not in name
    if not clean or parts.is_absolute() or ".." in parts.parts or name in (".", kind.file):
        raise kind.error(f"files: {name!r} is not a path inside the {kind.what} folder")
    return name


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
