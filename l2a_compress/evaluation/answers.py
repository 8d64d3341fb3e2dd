"""Whether an answer is right: exact match on the text, or on the value where both are numbers."""

from __future__ import annotations

import re
from decimal import Context, Decimal

__all__ = ["matches", "normalized"]

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalized(text: str) -> str:
    """An answer in the form that is compared: one space for any white space, and no full stop at the end.

    A number also loses its dollar sign, thousands commas and trailing zeros: ``$1,250.50`` is ``1250.5``.
    """
    words = " ".join(text.split())
    bare = words.rstrip(".").rstrip()
    number = _THOUSANDS.sub("", bare.replace("$", "")).strip()
    if not _NUMBER.fullmatch(number):
        return bare
    value = Decimal(number).normalize(Context(prec=len(number)))
    return f"{value if value else Decimal(0):f}"


def matches(found: str, expected: str) -> bool:
    """Whether two answers are equal once normalized; an empty answer is never right."""
    return bool(found.strip()) and normalized(found) == normalized(expected)
