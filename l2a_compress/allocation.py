"""What will run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from l2a_compress import _validate
from l2a_compress.errors import AllocationError

__all__ = ["Allocation"]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What will run: the kept KV groups of each layer and a limit on thinking. Integers only, hashable.

    A KV group is one key/value head together with the query heads it serves. A layer without a kept group is
    skipped as a whole, its MLP included.

    Attributes:
        num_groups: KV groups of a dense layer.
        groups: Per layer the kept KV groups, ascending; ``()`` means that the layer is skipped.
        think_tokens: Most tokens between ``<think>`` and ``</think>``; ``None`` is unlimited.

    Raises:
        AllocationError: A group does not exist, stands twice or out of order, or there is no layer.
    """

    num_groups: int
    groups: tuple[tuple[int, ...], ...]
    think_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "num_groups", _validate.integer(self.num_groups, "num_groups", AllocationError, minimum=1)
        )
        object.__setattr__(self, "groups", _layers(self.groups, self.num_groups))
        if self.think_tokens is not None:
            limit = _validate.integer(self.think_tokens, "think_tokens", AllocationError, minimum=0)
            object.__setattr__(self, "think_tokens", limit)

    @classmethod
    def dense(cls, num_layers: int, num_groups: int, think_tokens: int | None = None) -> Allocation:
        """Return the allocation that runs every layer with every KV group."""
        return cls.of_layers(range(num_layers), num_layers, num_groups, think_tokens)

    @classmethod
    def of_layers(
        cls, layers: Iterable[int], num_layers: int, num_groups: int, think_tokens: int | None = None
    ) -> Allocation:
        """Return the allocation that runs these layers, each with every KV group, and skips the others."""
        kept = set(layers)
        strange = sorted(layer for layer in kept if layer not in range(num_layers))
        if strange:
            raise AllocationError(f"layer {strange[0]} does not exist: the model has layers 0 to {num_layers - 1}")
        every = tuple(range(num_groups))
        groups = tuple(every if layer in kept else () for layer in range(num_layers))
        return cls(num_groups=num_groups, groups=groups, think_tokens=think_tokens)

    @property
    def num_layers(self) -> int:
        """Layers of the dense model."""
        return len(self.groups)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the kept layers, ascending."""
        return tuple(index for index, kept in enumerate(self.groups) if kept)

    @property
    def num_kept_groups(self) -> int:
        """KV groups that run, summed over all layers."""
        return sum(len(kept) for kept in self.groups)

    @property
    def layer_sparsity(self) -> float:
        """Share of all layers that are skipped, in [0, 1]."""
        return (self.num_layers - len(self.layers)) / self.num_layers

    @property
    def head_sparsity(self) -> float:
        """Share of the kept layers' KV groups that are pruned, in [0, 1); 0.0 when no layer is kept."""
        possible = len(self.layers) * self.num_groups
        return (possible - self.num_kept_groups) / possible if possible else 0.0

    @property
    def key(self) -> tuple[int, tuple[tuple[int, ...], ...], int]:
        """A sort key: equal for equal allocations, and ordered even where one limit is ``None``."""
        return self.num_groups, self.groups, sys.maxsize if self.think_tokens is None else self.think_tokens

    def is_subset(self, other: Allocation) -> bool:
        """Tell whether every layer and KV group that runs here also runs in ``other``.

        Raises:
            AllocationError: The two belong to models of different shape.
        """
        if (self.num_layers, self.num_groups) != (other.num_layers, other.num_groups):
            raise AllocationError(
                f"cannot compare allocations of different models: {self.num_layers} layers with {self.num_groups} "
                f"groups against {other.num_layers} layers with {other.num_groups} groups"
            )
        return all(set(mine) <= set(theirs) for mine, theirs in zip(self.groups, other.groups, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal allocation."""
        return {
            "num_groups": self.num_groups,
            "groups": [list(kept) for kept in self.groups],
            "think_tokens": self.think_tokens,
        }

    @classmethod
    def from_json(cls, data: object) -> Allocation:
        """Read an allocation from a JSON object; an unknown or missing key is an ``AllocationError``."""
        return cls(**_validate.keywords(cls, data, AllocationError, optional=frozenset({"think_tokens"})))

    def __str__(self) -> str:
        """Return short text such as ``8/12 layers, 30/32 groups``; the groups are those of the kept layers."""
        kept = len(self.layers)
        short = f"{kept}/{self.num_layers} layers, {self.num_kept_groups}/{kept * self.num_groups} groups"
        return short if self.think_tokens is None else f"{short}, <= {self.think_tokens} think tokens"


def _layers(groups: object, num_groups: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(groups, tuple | list) or not groups:
        found = _validate.shown(groups)
        raise AllocationError(f"groups must list the kept KV groups of at least one layer, found {found}")
    return tuple(_kept(kept, index, num_groups) for index, kept in enumerate(groups))


def _kept(kept: object, layer: int, num_groups: int) -> tuple[int, ...]:
    if not isinstance(kept, tuple | list):
        raise AllocationError(f"groups[{layer}] must be a list of KV groups, found {_validate.shown(kept)}")
    numbers = tuple(_validate.integer(group, f"groups[{layer}]", AllocationError, minimum=0) for group in kept)
    if any(group >= num_groups for group in numbers):
        raise AllocationError(
            f"groups[{layer}] names a group beyond {num_groups - 1}, found {_validate.shown(numbers)}"
        )
    if list(numbers) != sorted(set(numbers)):
        raise AllocationError(f"groups[{layer}] must be ascending without repeats, found {_validate.shown(numbers)}")
    return numbers
