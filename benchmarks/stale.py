"""What was made or measured with other settings is not taken for what is asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a_compress.artifact import ArtifactConfig
from l2a_compress.files import write_atomic

if TYPE_CHECKING:
    from l2a_compress.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
CODE = ("exporters", "l2a_compress/modeling")  # what decides on the graphs of a bundle
# What a trained artifact does not depend on.
_FREE = {f"optim.{name}" for name in ("threads", "save_steps", "log_steps")} | {
    f"evaluation.{name}"
    for name in ("budgets", "contracts", "problems", "baselines", "max_think_tokens", "max_answer_tokens")
}


def trained_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings that training depends on, by dotted name; of files and folders the last part of the name."""
    found = {name: value for name, value in _flat(recipe.to_json()).items() if name not in _FREE}
    return {name: Path(one).name if isinstance(one, str) and "/" in one else one for name, one in found.items()}


def differences(noted: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """``name: was this, now is that`` of every setting that differs."""
    noted, asked = (json.loads(json.dumps(_flat(dict(side)))) for side in (noted, asked))
    return [
        f"{name}: was {noted.get(name)!r}, now is {asked.get(name)!r}"
        for name in sorted(noted.keys() | asked.keys())
        if noted.get(name) != asked.get(name)
    ]


def told(found: Sequence[str], most: int = 4) -> str:
    """The first differences, and how many more there are."""
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def refuse_other(artifact: Path, recipe: Recipe) -> None:
    """Ends the command where an artifact was trained by other settings than these."""
    from l2a_compress.training.recipe import Recipe

    noted = trained_settings(Recipe.from_json(ArtifactConfig.load(artifact).training))
    found = differences(noted, trained_settings(recipe))
    if found:
        raise SystemExit(f"{artifact}: was trained with other settings ({told(found)}). Ask for those, or remove it")


def made(folder: Path, settings: Mapping[str, Any], make: Callable[[], object]) -> Path:
    """The folder that ``make`` writes, made again where it was made with other settings or by other code."""
    noted = folder.with_name(f"{folder.name}.made.json")
    wanted = json.dumps({**settings, "code": _digest()}, sort_keys=True, default=str)
    if folder.exists():
        if noted.is_file() and noted.read_text() == wanted:
            return folder
        print(f"{folder}: was made with other settings or by other code; made anew", flush=True)
        shutil.rmtree(folder)
    make()
    write_atomic(noted, wanted)
    return folder


def _digest() -> str:
    files = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: one
        for part, inner in value.items()
        for key, one in _flat(inner, f"{name}.{part}" if name else part).items()
    }
