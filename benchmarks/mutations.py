"""Manifests that are almost right: a bundle of a few bytes, and random changes to its ``manifest.json``."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

_FULL = {"num_groups": 2, "groups": [[0, 1], [0, 1], [0, 1]], "think_tokens": None}
_HALF = {"num_groups": 2, "groups": [[0, 1], [], [1]], "think_tokens": 64}
_SIZES = {"batch": 1, "sequence": 1, "total": 8, "past": 8, "present": 8}
_FILES = {name: name.encode() for name in ("weights.bin", "if.onnx", "b1.onnx", "b0.5.onnx", "s/b0.5.onnx")}
_TOKENS = (b"NaN", b"1e999", b"-0", b"[" * 5000, b'"\\ud800"', b"\xff", b"\0", b"\xef\xbb\xbf", b"9" * 5000)
_DEEP = 200  # what json.dumps still writes
_JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 5e-324, 1.8e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "1", "if", "static", "ort", "0" * 64, "x" * 300, "a" * 5000, "\0", "\x1b[2J", "\ud800", "\ue000"),
    *("..", "../x", "/", "/etc/passwd", "a//b", "a\\b", "c:x", ".", "manifest.json", "weights.bin", "weights.bin/x"),
    *([], {}, [[]], [None], [0, 1], [[0.5, 0.25]], {"": 0}, {"size": 0}, [{}]),
)


def write_bundle(folder: Path) -> dict[str, Any]:
    """Writes the small bundle, all but the manifest, and returns the manifest. Its graphs are no graphs."""
    for name, data in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {
        "schema_version": 1,
        "base": {"name": "tiny", "family": "llama", "digest": "0" * 64},
        "artifact": "a" * 64,
        "shape": {
            "num_layers": 3,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 4,
            "num_groups": 2,
            "head_dim": 2,
            "vocab_size": 11,
            "tied": True,
        },
        "dialect": "ort",
        "precision": "fp32",
        "gates": {"mode": "stem", "stem_layers": 1, "heads": True, "tokens": True, "think_reference": 128},
        "tags": {"think": 7, "end_think": 8, "answer": 9, "end_answer": 10},
        "positions": 256,
        "widths": [1, 2],
        "whole_cache": True,
        "prices": [[0.5, 1.25], [1.0, -2.0]],
        "graphs": [
            _graph("if", "if.onnx", "if", None, None),
            _graph("b1", "b1.onnx", "variant", 1.0, _FULL),
            _graph("b0.5", "b0.5.onnx", "variant", 0.5, _HALF),
            _graph("b0.5.decode", "s/b0.5.onnx", "static", 0.5, _HALF, _SIZES),
        ],
        "quality": [{"budget": 0.5, "accuracy": 0.75}],
        "versions": {"onnx": "1.21.0"},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in _FILES.items()
        },
    }


def _graph(
    name: str, file: str, kind: str, budget: float | None, allocation: Any, sizes: dict[str, int] | None = None
) -> dict[str, Any]:
    cost = 0.5 if budget == 0.5 else 1.0
    graph = {"name": name, "file": file, "kind": kind, "budget": budget, "allocation": allocation, "cost": cost}
    return copy.deepcopy(graph | {"sizes": sizes})


def mutate(draw: random.Random, manifest: dict[str, Any]) -> bytes:
    """One to three random changes of values, or of the text itself; what comes out may still be a good manifest."""
    found: Any = copy.deepcopy(manifest)
    how = draw.randrange(10)
    if how < 7:
        for _ in range(draw.randint(1, 3)):
            found = _change(draw, found)
    text = json.dumps(found)
    if how == 7:
        return _twice(draw, text).encode()
    return _scramble(draw, text.encode()) if how > 7 else text.encode()


def _change(draw: random.Random, root: Any) -> Any:
    """``root`` with one value removed, replaced, exchanged, doubled, renamed, wrapped, or another number."""
    places = _places(root)
    if not places or draw.random() < 0.01:
        return copy.deepcopy(draw.choice(_JUNK))
    holder, key = draw.choice(places)
    value, how = holder[key], draw.randrange(7)
    if how == 0:
        del holder[key]
    elif how == 1:
        holder[key] = copy.deepcopy(draw.choice(_JUNK))
    elif how == 2:
        other, at = draw.choice(places)
        holder[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(value)
    elif how == 3 and isinstance(holder, list):
        holder.insert(draw.randint(0, len(holder)), copy.deepcopy(value))
    elif how == 3:
        holder[str(draw.choice(_JUNK))] = copy.deepcopy(value)
    elif how == 4 and isinstance(holder, dict):
        holder[str(draw.choice((*_JUNK, *holder)))] = holder.pop(key)
    elif how == 5:
        for _ in range(draw.choice((1, 2, 31, 32, _DEEP))):
            value = draw.choice(([value], {"x": value}))
        holder[key] = value
    elif isinstance(value, int | float):
        holder[key] = draw.choice((-value, value + 1, value - 1, value / 2, float(value), 2**40 + value, bool(value)))
    return root


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON value."""
    found, left = list[tuple[Any, Any]](), [root]
    while left:
        holder = left.pop()
        keys: Any = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        left += [holder[key] for key in keys]
    return found


def _twice(draw: random.Random, text: str) -> str:
    """One key stands twice."""
    key = draw.choice(list(re.finditer(r'"[^"]*": ', text)))
    return text[: key.start()] + key[0] + draw.choice(("null, ", "1, ", '"x", ', "{}, ")) + text[key.start() :]


def _scramble(draw: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut out, repeated, put in, or all behind a place cut off."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(data))
        end = min(len(data), start + draw.choice((1, 2, 8, 100)))
        how = draw.randrange(6)
        if how == 0:
            data = data[:start]
        elif how == 1:
            data = data[:start] + data[end:]
        elif how == 2:
            data = data[:end] + data[start:]
        elif how == 3:
            data = data[:start] + draw.randbytes(end - start) + data[end:]
        elif how == 4:
            data = data[:start] + draw.choice(_TOKENS) + data[draw.choice((start, end)) :]
        elif start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << draw.randrange(8)]) + data[start + 1 :]
    return data
