"""Small checks that the frozen value classes share. Each raises the error class it is given."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from l2a_compress.errors import L2AError

_DEEPEST = 32  # levels of objects and lists
_INTEGERS = range(-(2**63), 2**64)  # what 64 bits hold, with a sign or without
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_LINE = 255
_MOST_SHOWN = 100


def shown(value: object) -> str:
    """Return ``value`` as a message shows it: a long one is cut."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def integer(
    value: object, name: str, error: type[L2AError], *, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return ``value`` as a plain int of at least ``minimum`` and at most ``maximum``; a bool or a float is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} must be an integer, found {shown(value)}")
    found = int(value)
    if minimum is not None and found < minimum:
        raise error(f"{name} must be at least {minimum}, found {shown(value)}")
    if maximum is not None and found > maximum:
        raise error(f"{name} must be at most {maximum}, found {shown(value)}")
    return found


def number(value: object, name: str, error: type[L2AError]) -> float:
    """Return ``value`` as a finite float; a bool is refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} must be a number, found {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise error(f"{name} must be finite, found {shown(value)}")
    return found


def positive(value: object, name: str, error: type[L2AError]) -> float:
    """Return ``value`` as a finite float above zero; a bool is refused."""
    found = number(value, name, error)
    if found <= 0.0:
        raise error(f"{name} must be finite and above 0, found {shown(value)}")
    return found


def share(value: object, name: str, error: type[L2AError]) -> float:
    """Return ``value`` as a float within (0, 1]; a bool is refused."""
    found = number(value, name, error)
    if not 0.0 < found <= 1.0:
        raise error(f"{name} must lie within (0, 1], found {shown(value)}")
    return found


def flag(value: object, name: str, error: type[L2AError]) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise error(f"{name} must be true or false, found {shown(value)}")
    return value


def text(value: object, name: str, error: type[L2AError]) -> str:
    """Return ``value`` if it is a string with something in it."""
    if not isinstance(value, str) or not value:
        raise error(f"{name} must be a non-empty string, found {shown(value)}")
    return value


def line(value: object, name: str, error: type[L2AError]) -> str:
    """Return ``value`` if it is a string of 1 to 255 characters, none of them a control character."""
    found = text(value, name, error)
    if len(found) > _LONGEST_LINE or _CONTROL.search(found):
        raise error(f"{name} must be at most {_LONGEST_LINE} characters, none of control, found {shown(value)}")
    return found


def sha256(value: object, name: str, error: type[L2AError]) -> str:
    """Return ``value`` if it is the digest of a file: 64 lower-case hexadecimal digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise error(f"{name} must be 64 hexadecimal digits, found {shown(value)}")
    return value


def json_object(value: object, name: str, error: type[L2AError]) -> dict[str, Any]:
    """Return a copy of a JSON object, checked by ``json_value``."""
    if not isinstance(value, Mapping):
        raise error(f"{name} must be an object, found {shown(value)}")
    copied: dict[str, Any] = json_value(value, name, error)
    return copied


def price_pairs(value: object, name: str, error: type[L2AError]) -> tuple[tuple[float, float], ...]:
    """Return a list of ``[budget, price]`` as pairs of floats: budgets ascend within (0, 1], prices are finite."""
    pairs = value if isinstance(value, tuple | list) else (None,)
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise error(f"{name} must be a list of [budget, price] pairs, found {shown(value)}")
    of_budget, of_price = f"{name}: a budget", f"{name}: a price"
    found = tuple((share(budget, of_budget, error), number(price, of_price, error)) for budget, price in pairs)
    budgets = [budget for budget, _ in found]
    if budgets != sorted(set(budgets)):
        raise error(f"{name}: budgets must ascend, found {shown(budgets)}")
    return found


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
        raise error(f"{what}: unknown key {shown(unknown[0])}; known keys are {', '.join(sorted(names))}")
    missing = sorted(names - optional - set(data))
    if missing:
        raise error(f"{what}: key {missing[0]!r} is missing")
    return dict(data)


def json_value(value: object, name: str, error: type[L2AError]) -> Any:
    """Copy ``value`` as plain JSON (tuples become lists) so that a round trip through a file is exact.

    NaN, infinity, integers beyond 64 bits, text that is not Unicode, keys that are not strings, more than 32 levels and
    any other type are refused, and the message says where they stand, below ``name``.
    """
    return _copy(value, (name,), error)


def _copy(value: object, place: tuple[object, ...], error: type[L2AError]) -> Any:
    """``place`` is the name and the keys down to ``value``; the text is made of it only where something is wrong."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _unicode(value, place, error)
    if isinstance(value, numbers.Integral):
        if int(value) not in _INTEGERS:
            raise error(f"{_at(place)} must be an integer of 64 bits, found one of {int(value).bit_length()} bits")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else number(value, _at(place), error)
    if not isinstance(value, Mapping | list | tuple):
        raise error(f"{_at(place)} must be JSON (objects, lists, strings, numbers), found {type(value).__name__}")
    if len(place) > _DEEPEST:
        raise error(f"{_at(place)} stands deeper than {_DEEPEST} levels of objects and lists")
    if isinstance(value, Mapping):
        return {_key(key, place, error): _copy(item, (*place, key), error) for key, item in value.items()}
    return [_copy(item, (*place, index), error) for index, item in enumerate(value)]


def _key(key: object, place: tuple[object, ...], error: type[L2AError]) -> str:
    if not isinstance(key, str):
        raise error(f"{_at(place)}: keys must be strings, found {shown(key)}")
    return _unicode(key, place, error)


def _unicode(value: str, place: tuple[object, ...], error: type[L2AError]) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"{_at(place)} must be Unicode text, found {shown(value)} with half a character") from None
    return value


def _at(place: tuple[object, ...]) -> str:
    """``gates.a[3]``; a long one is cut."""
    text = str(place[0])
    for key in place[1:]:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if str(key).isprintable() else f".{key!r}"
    text = text.removeprefix(".")
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
