"""Small checks that the frozen value classes share. Each raises the error class it is given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from l2a_compress.errors import L2AError


def integer(value: object, name: str, error: type[L2AError], *, minimum: int) -> int:
    """Return ``value`` as a plain int of at least ``minimum``; a bool or a float is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} must be an integer, found {value!r}")
    if value < minimum:
        raise error(f"{name} must be at least {minimum}, found {value!r}")
    return int(value)


def positive(value: object, name: str, error: type[L2AError]) -> float:
    """Return ``value`` as a finite float above zero; a bool is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} must be a number, found {value!r}")
    number = float(value)
    if not math.isfinite(number) or number <= 0.0:
        raise error(f"{name} must be finite and above 0, found {value!r}")
    return number


def text(value: object, name: str, error: type[L2AError]) -> str:
    """Return ``value`` if it is a string with something in it."""
    if not isinstance(value, str) or not value:
        raise error(f"{name} must be a non-empty string, found {value!r}")
    return value


def keywords(cls: type[Any], data: object, error: type[L2AError], *, optional: frozenset[str]) -> dict[str, Any]:
    """Check that ``data`` is an object with exactly the fields of dataclass ``cls`` and return it as keywords.

    Fields named in ``optional`` may be left out.
    """
    what = cls.__name__
    if not isinstance(data, Mapping):
        raise error(f"{what}: expected a JSON object, found {type(data).__name__}")
    names = {field.name for field in fields(cls)}
    unknown = sorted(str(key) for key in data if key not in names)
    if unknown:
        raise error(f"{what}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(names))}")
    missing = sorted(names - optional - set(data))
    if missing:
        raise error(f"{what}: key {missing[0]!r} is missing")
    return dict(data)


def json_value(value: object, name: str, error: type[L2AError]) -> Any:
    """Copy ``value`` as plain JSON (tuples become lists) so that a round trip through a file is exact.

    NaN, infinity, keys that are not strings and any other type are refused, and the message says where they stand.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise error(f"{name} must be finite, found {value!r}")
        return float(value)
    if isinstance(value, Mapping):
        return {_key(key, name, error): json_value(item, f"{name}.{key}", error) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, f"{name}[{index}]", error) for index, item in enumerate(value)]
    raise error(f"{name} must be JSON (objects, lists, strings, numbers), found {type(value).__name__}")


def _key(key: object, name: str, error: type[L2AError]) -> str:
    if not isinstance(key, str):
        raise error(f"{name}: keys must be strings, found {key!r}")
    return key
