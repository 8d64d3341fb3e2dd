"""The rules of a selector, as a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from l2a_compress import _validate
from l2a_compress.errors import ConfigError

KINDS = ("fixed", "min", "slack")


def _number(value: Any, name: str, least: float, most: float | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, found {value!r}")
    number = float(value)
    if not least <= number or (most is not None and number > most) or number == float("inf"):
        bound = f"from {least:g} to {most:g}" if most is not None else f"at least {least:g}"
        raise ConfigError(f"{name} must be {bound}, found {value!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Between what a class of requests is served.

    Attributes:
        floor: No signal but memory takes a request below this share of the dense compute.
        ceiling: Most of it.

    Raises:
        ConfigError: not 0 < floor <= ceiling <= 1.
    """

    floor: float = 0.0
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("floor", "ceiling"):
            object.__setattr__(self, name, _number(getattr(self, name), name, 0.0, 1.0))
        if self.ceiling == 0 or self.floor > self.ceiling:
            raise ConfigError(
                f"floor = {self.floor:g}, ceiling = {self.ceiling:g}: the ceiling must be above 0 and the floor"
            )


TIERS = MappingProxyType({"priority": Tier(floor=0.8), "default": Tier(), "flex": Tier(ceiling=0.6)})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How signals become a budget.

    Attributes:
        kind: ``fixed`` (the ceiling of the tier, as far as memory goes), ``min`` (what all signals allow), or ``slack``
            (the largest budget that meets the earliest deadline, by latency buckets).
        time_margin: Share of the time that is left which is not planned with.
        spot_grace_seconds: Before the machine ends, in which nothing is planned to run; what still runs is not stopped.
        target_seconds: Within which a request that waits should be done.
        tpot_seconds: Most time per output token; 0 for any.
        short_share: Share of its reasoning that a request may keep where time is short; 1 never shortens it. Models are
            trained to write tersely for a share below the recipe's ``condensed_below``; between that and 1 they would
            be cut off.
        pressure_low: Share from which on contention lowers the budget.
        pressure_high: Share at which it is at the floor.
        pressures: Signals of contention, each a share; the highest counts.
        memories: Signals of memory that is left; the lowest counts.
        memory_reserve_bytes: Kept free.
        patience_seconds: How long a request may wait for memory before it ends with an error.
        dwell_seconds: How long more must be allowed before the budget rises by one step.
        buckets: Latency buckets of ``slack``.
        stale_seconds: A reading that is older decides nothing.
        tiers: By the name of the tier. ``priority``, ``default`` and ``flex`` are always there; a tier decides how much
            a request gets, not when.

    Raises:
        ConfigError: a value out of range.
    """

    kind: str = "min"
    time_margin: float = 0.1
    spot_grace_seconds: float = 5.0
    target_seconds: float = 10.0
    tpot_seconds: float = 0.0
    short_share: float = 0.5
    pressure_low: float = 0.2
    pressure_high: float = 0.8
    pressures: tuple[str, ...] = ("pressure.cpu_some", "gpu.throttled", "service.contention")
    memories: tuple[str, ...] = ("gpu.memory_free", "cgroup.memory_available", "host.memory_available")
    memory_reserve_bytes: float = 0.0
    patience_seconds: float = 30.0
    dwell_seconds: float = 4.0
    buckets: int = 8
    stale_seconds: float = 30.0
    tiers: Mapping[str, Tier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"policy.kind must be one of {', '.join(KINDS)}, found {self.kind!r}")
        most = {"time_margin": 0.99, "short_share": 1.0, "pressure_low": 1.0, "pressure_high": 1.0}
        for item in fields(self):
            if item.type == "float":
                value = _number(getattr(self, item.name), f"policy.{item.name}", 0.0, most.get(item.name))
                object.__setattr__(self, item.name, value)
        if not self.pressure_low < self.pressure_high:
            raise ConfigError(
                f"policy.pressure_low = {self.pressure_low:g} must be below pressure_high = {self.pressure_high:g}"
            )
        object.__setattr__(self, "buckets", _validate.integer(self.buckets, "policy.buckets", ConfigError, minimum=1))
        object.__setattr__(self, "tiers", MappingProxyType({**TIERS, **self.tiers}))

    def tier(self, name: str) -> Tier:
        """The tier of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.tiers:
            raise ConfigError(f"tier {name!r}: the policy has {', '.join(sorted(self.tiers))}")
        return self.tiers[name]

    @classmethod
    def from_json(cls, data: object) -> Policy:
        """Read a policy from a JSON object or a parsed TOML table; every key may be left out."""
        values = _validate.keywords(cls, data, ConfigError, optional=frozenset(item.name for item in fields(cls)))
        for name in ("pressures", "memories"):
            if name in values:
                values[name] = _names(values[name], f"policy.{name}")
        tiers = values.get("tiers", {})
        if not isinstance(tiers, Mapping):
            raise ConfigError(f"policy.tiers must be a table, found {type(tiers).__name__}")
        optional = frozenset({"floor", "ceiling"})
        values["tiers"] = {
            str(name): Tier(**_validate.keywords(Tier, tier, ConfigError, optional=optional))
            for name, tier in tiers.items()
        }
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a TOML file.

        Raises:
            ConfigError: it cannot be read, or a key or value is not known.
        """
        try:
            return cls.from_json(tomllib.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from error


def _names(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} must be a list of signal names, found {value!r}")
    return tuple(value)
