"""The error tree."""

import pytest

import l2a_compress
from l2a_compress import errors


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "L2AError"])
def test_every_error_is_ours_and_a_builtin_one(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.L2AError)
    assert issubclass(error, ValueError | OSError | RuntimeError)


def test_the_package_gives_every_error() -> None:
    assert [name for name in errors.__all__ if name not in l2a_compress.__all__] == []


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert [name for name in errors.__all__ if name not in errors.__doc__] == []


def test_storage_error_prints_its_message_and_keeps_the_number() -> None:
    error = errors.StorageError("out/: the disk is full")
    error.errno = 28
    assert str(error) == "out/: the disk is full"
    assert error.errno == 28
