"""Reads rows from local files, folders and the hub, and turns every failure into one clear error."""

from __future__ import annotations

import errno
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2a_compress.errors import DataError, StorageError
from l2a_compress.training.data_config import DataConfig

__all__ = ["FORMATS", "Row", "Rows", "read_rows"]

Row = Mapping[str, Any]

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one source in file order.

    Attributes:
        parts: Tables (``datasets.Dataset`` or lists of rows), one per file.
        names: Where each part came from: a path or a hub name.
        columns: Column names that the source has.
    """

    parts: tuple[Sequence[Row], ...]
    names: tuple[str, ...]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Row]:
        for part, name in zip(self.parts, self.names, strict=True):
            try:
                yield from part
            except UnicodeDecodeError as error:  # the JSON loader takes any bytes and fails when a row is read
                raise DataError(f"{name}: cannot be read: {error}; save it as UTF-8") from error

    def __getitem__(self, index: int) -> Row:
        part, row = self._place(index)
        return self.parts[part][row]

    def where(self, index: int) -> str:
        """Names the file and the row, counted from 1, of a row of this source."""
        part, row = self._place(index)
        return f"{self.names[part]}, row {row + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        for number, part in enumerate(self.parts):
            if index < len(part):
                return number, index
            index -= len(part)
        raise IndexError(index)


def read_rows(config: DataConfig) -> Rows:
    """Reads the source of a config; a local path is preferred to a hub name that looks the same.

    Raises:
        DataError: The source cannot be found, reached, read or understood, or has no row.
        StorageError: The disk is full while the data set is prepared.
    """
    path = Path(config.source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, config)
    elif path.exists():
        rows = _read_files([path])
    elif path.suffix in FORMATS or config.source.startswith((".", "/", "~")):
        raise DataError(f"{config.source}: no such file or folder")
    else:
        rows = _read_hub(config)
    if not len(rows):
        raise DataError(f"{config.source}: the data set is empty")
    return rows


def _read_folder(path: Path, config: DataConfig) -> Rows:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, config.split)
    root = path
    if config.subset:
        root = path / config.subset
        if not root.is_dir():
            raise DataError(f"{path}: subset {config.subset!r} must be a folder in it, and there is none")
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in FORMATS
        and file.name not in _NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"{root}: no {', '.join(FORMATS)} file in this folder")
    files = _of_split(root, files, config.split)
    formats = sorted({FORMATS[file.suffix] for file in files})
    if len(formats) > 1:
        raise DataError(f"{root}: files of several formats ({', '.join(formats)}); name one file, or a split")
    return _read_files(files)


def _of_split(root: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files whose name or folder says the split; without a split asked for, ``train`` or else all."""
    word = re.compile(rf"(^|[^a-z0-9]){re.escape((split or 'train').lower())}([^a-z0-9]|$)")
    chosen = [file for file in files if word.search(str(file.relative_to(root).with_suffix("")).lower())]
    if split and not chosen:
        found = ", ".join(str(file.relative_to(root)) for file in files[:8])
        raise DataError(f"{root}: no file of split {split!r}; found {found}")
    return chosen or files


def _read_saved(path: Path, split: str | None) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(saved, datasets.DatasetDict):
        name = split or ("train" if "train" in saved else next(iter(saved), ""))
        if name not in saved:
            raise DataError(f"{path}: no split {name!r}; found {', '.join(saved)}")
        saved = saved[name]
    return Rows(parts=(saved,), names=(str(path),), columns=tuple(saved.column_names))


def _read_files(files: Sequence[Path]) -> Rows:
    tables = [_read_file(file) for file in files]
    columns = dict.fromkeys(name for table in tables for name in getattr(table, "column_names", ()))
    return Rows(parts=tuple(tables), names=tuple(map(str, files)), columns=tuple(columns))


def _read_file(path: Path) -> Sequence[Row]:
    import datasets

    if path.suffix not in FORMATS:
        raise DataError(f"{path}: unknown format {path.suffix!r}; use one of {', '.join(FORMATS)}")
    try:
        if path.stat().st_size == 0:
            return []
        table: Sequence[Row] = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        if FORMATS[path.suffix] == "json":
            _find_bad_json(path)
        if "corresponds to no data" in str(error):  # how `datasets` says that a CSV file has only its header
            return []
        raise _unreadable(path, error) from error
    return table


def _find_bad_json(path: Path) -> None:
    """Raises an error that names the first row that is not a JSON object; the loader's own error does not."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        _check_objects(path, enumerate(rows, start=1))
        return
    _check_objects(path, _json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number}: not valid JSON: {error.msg}") from error


def _check_objects(path: Path, rows: Iterator[tuple[int, object]]) -> None:
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, found {type(row).__name__}")


def _read_hub(config: DataConfig) -> Rows:
    import datasets

    split = config.split or "train"
    try:
        table = datasets.load_dataset(config.source, config.subset, split=split, streaming=config.streaming)
        if config.streaming:
            table = list(itertools.islice(table, config.limit))
    except (ConnectionError, TimeoutError) as error:
        raise DataError(
            f"{config.source}: no such local path, and the hub could not be reached ({error}). Download the data set "
            "where there is a network and give the path of its file or folder instead"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{config.source}: neither a local path nor a data set on the hub ({error})") from error
    except Exception as error:
        raise _unreadable(config.source, error) from error
    columns = table.column_names if not isinstance(table, list) else dict.fromkeys(key for row in table for key in row)
    return Rows(parts=(table,), names=(f"{config.source} ({split})",), columns=tuple(columns))


def _unreadable(where: object, error: Exception) -> DataError | StorageError:
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return StorageError(errno.ENOSPC, f"the disk is full while reading {where}; free some space or set HF_HOME")
    return DataError(f"{where}: cannot be read: {str(cause) or type(cause).__name__}")
