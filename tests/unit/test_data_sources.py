"""Reading rows: every format, and one clear error for everything that can go wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import datasets
import pytest

from l2a_compress.errors import DataError, StorageError
from l2a_compress.training.data import load_examples
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.sources import Rows, read_rows
from toy_data import TINY_GSM8K, write_jsonl

ROWS = [{"prompt": f"p{number}", "trace": f"t{number}", "answer": f"a{number}"} for number in range(7)]


def config(source: object, **options: object) -> DataConfig:
    return DataConfig.from_json({"source": str(source), "kind": "reasoning", **options})


def read(source: object, **options: object) -> Rows:
    return read_rows(config(source, **options))


def write_as(path: Path, rows: list[dict[str, str]]) -> Path:
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".csv":
        table.to_csv(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = read(write_as(tmp_path / f"rows{suffix}", ROWS))
    assert [dict(row) for row in rows] == ROWS
    assert dict(rows[5]) == ROWS[5]
    assert rows.columns == ("prompt", "trace", "answer")
    assert rows.where(6) == f"{tmp_path / f'rows{suffix}'}, row 7"


def test_a_text_file_has_one_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    whole = {"heldout_share": 0.0, "calibration_share": 0.0}
    examples = load_examples(DataConfig.from_json({"source": str(tmp_path / "t.txt"), "kind": "text", **whole}))
    assert [example.prompt for example in examples] == ["one", "two"]


def test_a_folder_takes_the_files_of_its_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    write_as(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:2])
    write_as(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[2:4])
    write_as(tmp_path / "data" / "test.jsonl", ROWS[4:])
    write_as(tmp_path / ".cache" / "train.jsonl", ROWS)
    (tmp_path / "dataset_info.json").write_text("{}")
    rows = read(tmp_path)
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert rows.where(3).endswith("train-00001-of-00002.jsonl, row 2")
    assert [row["prompt"] for row in read(tmp_path, split="test")] == ["p4", "p5", "p6"]
    assert len(read(tmp_path, subset="data")) == 4
    with pytest.raises(DataError, match=r"no file of split 'dev'; found data/test\.jsonl"):
        read(tmp_path, split="dev")
    with pytest.raises(DataError, match="subset 'main' must be a folder"):
        read(tmp_path, subset="main")


def test_a_folder_without_split_names_is_read_whole(tmp_path: Path) -> None:
    write_as(tmp_path / "a.jsonl", ROWS[:3])
    write_as(tmp_path / "b.jsonl", ROWS[3:])
    assert len(read(tmp_path)) == 7


def test_a_folder_of_mixed_formats_is_refused(tmp_path: Path) -> None:
    write_as(tmp_path / "a.jsonl", ROWS)
    write_as(tmp_path / "b.csv", ROWS)
    with pytest.raises(DataError, match=r"several formats \(csv, json\)"):
        read(tmp_path)


def test_a_saved_data_set_is_read_by_split(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert len(read(tmp_path / "one")) == 7
    assert len(read(tmp_path / "two")) == 7
    assert len(read(tmp_path / "two", split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev'; found train, test"):
        read(tmp_path / "two", split="dev")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"a": 1}\n{"a":\n', r"bad\.jsonl, row 2: not valid JSON"),
        ("list.jsonl", b'{"a": 1}\n[1]\n', r"list\.jsonl, row 2: expected a JSON object, found list"),
        ("bad.json", b'[{"a": 1},\n{"a" 2}]', r"bad\.json, line 2: not valid JSON"),
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), r"latin\.jsonl: cannot be read: .*utf-8"),
        ("bad.parquet", b"PAR1xx", r"bad\.parquet: cannot be read: Parquet"),
        ("empty.jsonl", b"", r"empty\.jsonl: the data set is empty"),
        ("head.csv", b"prompt,trace\n", r"head\.csv: the data set is empty"),
        ("rows.xml", b"<a/>", r"rows\.xml: unknown format '\.xml'"),
    ],
)
def test_a_bad_file_is_one_error_with_its_path(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read(path))


def test_missing_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        read("none.parquet")
    with pytest.raises(DataError, match=r"void: no \.jsonl"):
        read(tmp_path / "void")


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_network_the_error_offers_a_local_path(streaming: bool) -> None:
    with pytest.raises(DataError, match=r"openai/gsm8k: .*hub could not be reached.*give the path"):
        read("openai/gsm8k", subset="main", streaming=streaming, limit=4)


def hub(monkeypatch: pytest.MonkeyPatch, outcome: object) -> None:
    def load(*_: object, **__: object) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_stream_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, iter(ROWS))
    rows = read("some/data", streaming=True, limit=3)
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2"]
    assert rows.where(1) == "some/data (train), row 2"
    assert rows.columns == ("prompt", "trace", "answer")


@pytest.mark.parametrize(
    ("outcome", "error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("nothing"), DataError, "neither a local path nor a data set"),
        (ValueError('Unknown split "dev"'), DataError, 'some/data: cannot be read: Unknown split "dev"'),
        (OSError(errno.ENOSPC, "No space left"), StorageError, "the disk is full while reading some/data"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception, error: type[Exception], words: str
) -> None:
    hub(monkeypatch, outcome)
    with pytest.raises(error, match=words):
        read("some/data")


def test_a_local_path_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    (tmp_path / "openai" / "gsm8k" / "train.jsonl").write_bytes(TINY_GSM8K.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read("openai/gsm8k")) == 6
