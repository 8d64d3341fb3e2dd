"""Files: old or new, never half, whatever happens while they are written."""

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from l2a_compress import StorageError, files

CONTENT = {"a.bin": b"a" * 5000, "sub/b.bin": b"b"}


def fill(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_sha256_is_that_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    assert files.sha256_of(tmp_path / "x") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_sha256_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing"):
        files.sha256_of(tmp_path / "nothing")


def test_write_atomic_replaces_bytes_and_text(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "x", b"\0old")
    files.write_atomic(tmp_path / "x", "ö")
    assert read(tmp_path) == {"x": "ö".encode()}


@pytest.mark.parametrize("name", ["x/below", "n" * 250])
def test_write_atomic_of_a_name_that_cannot_be_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_atomic(tmp_path / name, "new")
    assert read(tmp_path) == {"x": b"a file"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_on_a_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files.write_atomic(tmp_path / "x", "old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(StorageError, match=r"x: cannot write: No space left on device; free some space") as caught:
        files.write_atomic(tmp_path / "x", "new")
    assert caught.value.errno == errno.ENOSPC
    assert read(tmp_path) == {"x": b"old"}


def test_atomic_dir_makes_a_folder_with_its_parents(tmp_path: Path) -> None:
    with files.atomic_dir(tmp_path / "deep" / "out") as folder:
        fill(folder)
        assert not (tmp_path / "deep" / "out").exists()
    assert read(tmp_path) == {f"deep/out/{name}": data for name, data in CONTENT.items()}


def test_atomic_dir_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with files.atomic_dir(tmp_path / "out") as folder:
        fill(folder)
    assert read(tmp_path / "out") == CONTENT
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_dir_keeps_what_is_there_unless_forced(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"old": b""})
    with pytest.raises(StorageError, match="--force"), files.atomic_dir(tmp_path / "out"):
        pytest.fail("the block must not run")
    with files.atomic_dir(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert read(tmp_path) == {f"out/{name}": data for name, data in CONTENT.items()}


def test_atomic_dir_replaces_by_force_what_holds_a_certain_file(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"old": b""})
    with (
        pytest.raises(StorageError, match="holds no about"),
        files.atomic_dir(tmp_path / "out", force=True, holding="about"),
    ):
        pytest.fail("the block must not run")
    with files.atomic_dir(tmp_path / "out", force=True, holding="old") as folder:
        fill(folder)
    assert read(tmp_path) == {f"out/{name}": data for name, data in CONTENT.items()}


def test_atomic_dir_refuses_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="choose another"), files.atomic_dir(tmp_path / "out", force=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_exchange_the_old_folder_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    fill(tmp_path / "out", {"old": b""})
    with files.atomic_dir(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert read(tmp_path) == {f"out/{name}": data for name, data in CONTENT.items()}


def test_without_exchange_a_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    fill(tmp_path / "out", {"old": b""})
    rename = os.rename

    def fail_for_new(source: Path, target: Path) -> None:
        full_disk() if source.suffix == ".tmp" else rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_new)
    with pytest.raises(StorageError, match="No space left"), files.atomic_dir(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert read(tmp_path) == {"out/old": b""}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
        OSError(errno.EACCES, "Permission denied"),
    ],
)
def test_an_error_of_the_disk_in_the_block_leaves_the_old_or_nothing(
    tmp_path: Path, force: bool, error: Exception
) -> None:
    if force:
        fill(tmp_path / "out", {"old": b"1"})
    before = read(tmp_path)
    with (
        pytest.raises(StorageError, match=r"out: cannot write: .*choose"),
        files.atomic_dir(tmp_path / "out", force=force) as folder,
    ):
        fill(folder)
        raise error
    assert read(tmp_path) == before


def test_other_errors_in_the_block_pass_and_leave_nothing(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.atomic_dir(tmp_path / "out") as folder:
            fill(folder)
            raise error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_at_the_last_flush_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", {"old": b"1"})
    with (
        pytest.raises(StorageError, match="No space left"),
        files.atomic_dir(tmp_path / "out", force=True) as folder,
    ):
        fill(folder)
        monkeypatch.setattr(os, "fsync", full_disk)
    assert read(tmp_path) == {"out/old": b"1"}


WRITER = textwrap.dedent(
    """
    import sys
    from l2a_compress.files import atomic_dir
    for turn in range(1, 10_000):
        with atomic_dir(sys.argv[1], force=True) as folder:
            for part in range(4):
                (folder / str(part)).write_text(str(turn) * 2000)
        print(turn, flush=True)
    """
)


def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """Kill a writer that replaces a folder over and over, at ten moments of its work."""
    for round_number in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            finished = 0
            for _ in range(1 + 3 * round_number):
                finished = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            finished = max([finished, *map(int, writer.stdout.read().split())])
        content = read(tmp_path / "out")
        assert sorted(content) == ["0", "1", "2", "3"]
        assert len(set(content.values())) == 1
        assert content["0"] in (str(finished).encode() * 2000, str(finished + 1).encode() * 2000)
    with files.atomic_dir(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert os.listdir(tmp_path) == ["out"], "the next write removes what killed writers left"


def test_a_folder_that_was_aside_when_the_process_died_comes_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = files._beside(tmp_path / "out", "old")
    fill(aside.with_name(aside.name.replace(f".{os.getpid()}.", f".{dead.pid}.")), {"old": b"1"})
    with pytest.raises(StorageError, match="--force"), files.atomic_dir(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert read(tmp_path) == {"out/old": b"1"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_dead_process_of_the_same_id_left_is_removed(tmp_path: Path, kind: str) -> None:
    """In a container the first process has the same id at every start."""
    left = tmp_path / f".out.{socket.gethostname()}.{os.getpid()}.0badcafe.tmp"
    left.write_text("half") if kind == "file" else fill(left)
    with files.atomic_dir(tmp_path / "out") as folder:
        fill(folder)
        files.write_atomic(tmp_path / "out2", "x")
        assert folder.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["out", "out2"]


def test_files_of_living_writers_are_left_alone(tmp_path: Path) -> None:
    with files.atomic_dir(tmp_path / "out") as first:
        files.write_atomic(tmp_path / "out2", "x")
        with files.atomic_dir(tmp_path / "out") as second:
            fill(second)
        assert first.is_dir()
        with pytest.raises(StorageError, match="--force"):
            files._check_free(tmp_path / "out", force=False)
        os.rename(tmp_path / "out", tmp_path / "away")
    assert (tmp_path / "out").is_dir()
