"""What a request may spend."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

from l2a_compress import _validate
from l2a_compress.errors import BudgetError, ConfigError

__all__ = ["Budget", "budgets_of"]

_CAPS = {"layers": 1, "heads": 1, "think_tokens": 0}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a request may spend: a share of the dense model's compute, and optional caps per axis.

    The scalar stands for general pressure; a cap lets a squeeze of memory, throughput or latency act on its own axis.
    ``None`` means that the axis has no cap of its own.

    Attributes:
        compute: Share of the dense decoder's compute, in (0, 1]. 1.0 is the dense model.
        layers: Most decoder layers that may run, at least 1.
        heads: Most KV groups that may run, summed over all layers, at least 1.
        think_tokens: Most tokens between ``<think>`` and ``</think>``, at least 0.

    Raises:
        BudgetError: A value is out of range, not a number, NaN or a bool.
    """

    compute: float = 1.0
    layers: int | None = None
    heads: int | None = None
    think_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute", _compute(self.compute))
        for name, minimum in _CAPS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _validate.integer(value, f"budget.{name}", BudgetError, minimum=minimum))

    def tighter(self, other: Budget) -> Budget:
        """Return the budget that keeps both: of every axis the lower limit."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("compute", *_CAPS)}
        return Budget(**{name: min(values, key=_limit) for name, values in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal budget."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Budget:
        """Read a budget from a JSON object; every key may be left out, an unknown one is a ``BudgetError``."""
        return cls(**_validate.keywords(cls, data, BudgetError, optional=frozenset({"compute", *_CAPS})))

    def __str__(self) -> str:
        """Return short text such as ``0.6, layers <= 8``."""
        caps = [f"{name} <= {getattr(self, name)}" for name in _CAPS if getattr(self, name) is not None]
        return ", ".join([f"{self.compute:g}", *caps])


def budgets_of(table: dict[str, Any]) -> tuple[float, ...]:
    """Return the budgets of a ladder file, checked: falling, within (0, 1].

    A ladder may also name ``static_shapes``, as the option of export does.

    Raises:
        ConfigError: There is another key, or the budgets are not a falling list.
        BudgetError: A budget is out of range.
    """
    unknown = sorted(set(table) - {"budgets", "static_shapes"})
    if unknown or not isinstance(table.get("budgets"), list) or not table["budgets"]:
        raise ConfigError(f"a ladder holds `budgets = [...]` and maybe `static_shapes`, found {sorted(table)}")
    if not isinstance(table.get("static_shapes", ""), str):
        raise ConfigError(f"a ladder's static_shapes is a text as of --static-shapes, found {table['static_shapes']!r}")
    budgets = tuple(Budget(compute=value).compute for value in table["budgets"])
    if list(budgets) != sorted(set(budgets), reverse=True):
        raise ConfigError(f"a ladder's budgets must fall from one to the next, found {list(budgets)}")
    return budgets


def _limit(value: float | None) -> float:
    return math.inf if value is None else value


def _compute(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"budget.compute must be a number in (0, 1], found {value!r}")
    number = float(value)
    if math.isnan(number) or not 0.0 < number <= 1.0:
        raise BudgetError(f"budget.compute must be in (0, 1], found {value!r}; 1.0 is the dense model")
    return number
