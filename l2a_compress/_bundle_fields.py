"""Checks of single fields of a bundle's manifest; each returns the field as it is kept, or is a ``BundleError``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from l2a_compress import _validate
from l2a_compress.cost import CostModel, ModelShape
from l2a_compress.errors import BundleError
from l2a_compress.limits import Contract

_TAGS = ("think", "end_think", "answer", "end_answer")


def keys(value: object, names: Collection[str], name: str) -> dict[str, Any]:
    """An object of exactly these keys."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise BundleError(f"{name} must be an object of {', '.join(names)}, found {_validate.shown(value)}")
    return dict(value)


def texts(value: object, name: str, only: Collection[str] | None = None) -> dict[str, str]:
    """An object of non-empty texts, of exactly these keys where they are given."""
    found = _validate.json_object(value, name, BundleError) if only is None else keys(value, only, name)
    return {key: _validate.text(text, f"{name}.{key}", BundleError) for key, text in found.items()}


def shape(value: object) -> ModelShape:
    """Sizes of the decoder, of no more cost than a bundle can have."""
    if not isinstance(value, ModelShape):
        raise BundleError(f"shape must be a ModelShape, found {_validate.shown(value)}")
    if CostModel(shape=value).dense_units >= 2**63:  # graphs take limits of 64 bits
        raise BundleError("shape: the cost of all layers must be an integer of 64 bits with a sign, found more")
    return value


def gates(value: object, shape: ModelShape) -> dict[str, Any]:
    """Settings of the gates; a runtime reads these four, of which the last may be missing."""
    found = _validate.json_object(value, "gates", BundleError)
    stem, reference = found.get("stem_layers"), found.get("think_reference")
    _validate.integer(stem, "gates.stem_layers", BundleError, minimum=1, maximum=shape.num_layers - 1)
    _validate.integer(reference, "gates.think_reference", BundleError, minimum=1)
    _validate.flag(found.get("tokens"), "gates.tokens", BundleError)
    blind = found.get("input_blind", [])
    if not isinstance(blind, list) or any(each not in get_args(Contract) for each in blind):
        known = ", ".join(get_args(Contract))
        raise BundleError(f"gates.input_blind must list some of {known}, found {_validate.shown(blind)}")
    return found


def tags(value: object, shape: ModelShape) -> dict[str, int]:
    """Ids of the four tags."""
    last = shape.vocab_size - 1
    found = {
        name: _validate.integer(token, f"tags.{name}", BundleError, minimum=0, maximum=last)
        for name, token in keys(value, _TAGS, "tags").items()
    }
    if len(set(found.values())) < len(found):
        raise BundleError(f"tags must be four different tokens, found {found}")
    return found


def widths(value: object, shape: ModelShape) -> tuple[int, ...]:
    """KV groups that a layer can run with, the last all of them."""
    groups = shape.num_groups
    if not isinstance(value, tuple | list):
        raise BundleError(f"widths must be a list, found {_validate.shown(value)}")
    found = tuple(_validate.integer(width, "widths", BundleError, minimum=1, maximum=groups) for width in value)
    if list(found) != sorted(set(found)) or found[-1:] != (groups,):
        raise BundleError(f"widths must ascend and end with all {groups} groups, found {_validate.shown(found)}")
    return found
