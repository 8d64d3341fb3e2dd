"""Files that are either old or new, never half: checksums and atomic writes.

Everything is written under a temporary name beside its target, flushed to the disk, and renamed. What a killed process
leaves behind is such a temporary name, and the next write to the same target removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from l2a_compress.errors import L2AError, StorageError

if sys.platform != "win32":
    import fcntl

__all__ = ["atomic_dir", "check_writable", "locked", "make_folder", "sha256_of", "write_atomic"]

_HINTS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "the quota is used up: free some space or choose another disk",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "the disk is read-only: choose another one",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "the path is a folder: choose another one",
    errno.EIO: "the disk reports a fault",
    errno.EFBIG: "the file system does not hold files of this size",
    errno.ENAMETOOLONG: "choose a shorter path",
}
# What libraries that write files themselves say in errors that are no OSError.
_FULL_DISK_WORDS = ("No space left on device", "StorageFull", "os error 28")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_made = set[str]()  # temporary names of this process: in a container the next one may have the same id


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    Raises:
        StorageError: The file cannot be read.
    """
    with _storage_errors(Path(path), "cannot read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | Path, data: bytes | memoryview | str) -> None:
    """Write a file so that a reader, even after a crash, sees the old content or the new; text is UTF-8.

    Raises:
        StorageError: The disk is full or the folder is not writable; the old file is untouched.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        with _storage_errors(path, "cannot write"):
            _clean_up(path)
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Makes a folder for results and its parents, where they are not there.

    Raises:
        StorageError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}; choose another --out") from error


def check_writable(folder: Path) -> None:
    """Raises a StorageError where no file can be made in a folder, before the work whose result belongs there."""
    with _storage_errors(folder, "cannot write"), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder, which is made where it is not there, against other processes that ask for the same.

    File systems that know no locks, and Windows, hold nothing.

    Raises:
        StorageError: Another one holds it, unless it is to ``wait``, or it cannot be made.
    """
    make_folder(folder)
    if sys.platform == "win32":
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = "another process works in it; wait for its end, or choose another --out"
            raise StorageError(f"{folder}: {told}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(held)


@contextmanager
def atomic_dir(final: str | Path, *, force: bool = False, holding: str | None = None) -> Iterator[Path]:
    """Make a folder at once: yields a temporary sibling to fill, which takes the final name when the block ends well.

    Where the system can exchange two names in one step (Linux), a reader finds the old folder or the new one at every
    moment. Elsewhere the old one is moved aside first and comes back at the next write if the process died in between.

    Args:
        final: The folder to make; its parents are made too.
        force: Replace a folder that is there and not empty.
        holding: A file without which such a folder is nothing that may be replaced; None: whatever it holds.

    Raises:
        StorageError: The folder is taken (without ``force``), the disk is full or not writable. What was there stays.
    """
    final = Path(os.path.abspath(final))
    with _storage_errors(final, "cannot write"):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(final)
        _check_free(final, force=force, holding=holding)
        temporary = _beside(final, "tmp")
        temporary.mkdir()
    try:
        with _storage_errors(final, "cannot write", only_known=True):
            yield temporary
        with _storage_errors(final, "cannot write"):
            fsync_tree(temporary)
            _check_free(final, force=force, holding=holding)
            _put(temporary, final)
            fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(final: Path, *, force: bool, holding: str | None = None) -> None:
    if not os.path.lexists(final):
        return
    if not final.is_dir() or final.is_symlink():
        raise StorageError(f"{final}: a file or link has this name: choose another one")
    if not any(final.iterdir()):
        return
    if not force:
        raise StorageError(f"{final}: the folder exists and is not empty: choose another name or pass force (--force)")
    if holding is not None and not (final / holding).is_file():
        raise StorageError(
            f"{final}: the folder holds no {holding}, so --force does not replace it: choose another name"
        )


def _put(temporary: Path, final: Path) -> None:
    """Give ``temporary`` the name ``final``; a folder that had it is removed, here or by the caller."""
    if not final.exists():
        os.rename(temporary, final)
        return
    if _exchange(temporary, final):  # the old folder now has the temporary name
        return
    aside = _beside(final, "old")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(done == 0)


def _beside(path: Path, kind: str) -> Path:
    """Return a fresh hidden name beside ``path`` that says which process made it."""
    name = f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"
    _made.add(name)
    return path.with_name(name)


def _clean_up(final: Path) -> None:
    """Remove what killed processes of this machine left beside ``final``, or bring the old folder back."""
    prefix = f".{final.name}.{socket.gethostname()}."
    for left in sorted(final.parent.iterdir()):
        pid, _, rest = left.name.removeprefix(prefix).partition(".")
        if not left.name.startswith(prefix) or not pid.isdecimal() or _is_in_use(left.name, int(pid)):
            continue
        if rest.endswith(".old") and not final.exists():
            os.rename(left, final)
        elif rest.endswith((".old", ".tmp")) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif rest.endswith(".tmp"):
            left.unlink(missing_ok=True)


def _is_in_use(name: str, pid: int) -> bool:
    """Whether the process that made a temporary name is still there."""
    if pid == os.getpid():
        return name in _made
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                fsync(path)
        fsync(Path(root))


def fsync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(path: Path, what: str, *, only_known: bool = False) -> Iterator[None]:
    """Turn errors of the file system into a ``StorageError`` about ``path`` that says what to do.

    ``only_known`` lets an OSError that is not about storage (a missing input, say) through as it is.
    """
    try:
        yield
    except L2AError:
        raise
    except OSError as error:
        if only_known and error.errno not in _HINTS:
            raise
        raise _storage_error(path, what, error) from error
    except Exception as error:
        if any(words in str(error) for words in _FULL_DISK_WORDS):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise _storage_error(path, what, full) from error
        raise


def _storage_error(path: Path, what: str, error: OSError) -> StorageError:
    hint = _HINTS.get(error.errno or 0)
    story = f"{path}: {what}: {error.strerror or error}"
    result = StorageError(f"{story}; {hint}" if hint else story)
    result.errno = error.errno
    return result
