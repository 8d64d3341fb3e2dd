"""Settings that come with the package: devices, ladders and training recipes, as TOML files."""

from __future__ import annotations

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from l2a_compress.errors import ConfigError

__all__ = ["load", "load_device", "load_ladder", "load_recipe", "load_toml", "names"]


def names(kind: str) -> tuple[str, ...]:
    """Return the names of the shipped files of one kind (``devices``, ``ladders`` or ``recipes``), sorted."""
    folder = _folder(kind)
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load(kind: str, name: str) -> dict[str, Any]:
    """Read a shipped file by its name.

    Raises:
        ConfigError: There is no such name; the message lists those there are.
    """
    known = names(kind)
    if name not in known:
        raise ConfigError(
            f"unknown {kind.removesuffix('s')} {name!r}; known: {', '.join(known) or 'none'}; a path to a .toml file "
            "works as well"
        )
    return _parse(_folder(kind).joinpath(f"{name}.toml").read_bytes(), f"{kind}/{name}.toml")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of the user's own.

    Raises:
        ConfigError: The file is missing, not readable or not TOML.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the settings file: {error.strerror}") from error
    return _parse(data, str(path))


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Read a training recipe by name, or from a path (whatever ends in ``.toml`` or holds a separator)."""
    return _by_name_or_path("recipes", name_or_path)


def load_device(name_or_path: str | Path) -> dict[str, Any]:
    """Read a device's figures by name, or from a path (whatever ends in ``.toml`` or holds a separator)."""
    return _by_name_or_path("devices", name_or_path)


def load_ladder(name_or_path: str | Path) -> dict[str, Any]:
    """Read a ladder by name, or from a path (whatever ends in ``.toml`` or holds a separator)."""
    return _by_name_or_path("ladders", name_or_path)


def _by_name_or_path(kind: str, name_or_path: str | Path) -> dict[str, Any]:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return load_toml(name_or_path)
    return load(kind, text)


def _folder(kind: str) -> Traversable:
    return resources.files(__name__).joinpath(kind)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{where}: not a TOML file: {error}") from error
