"""The figures of a device that costs are computed from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2a_compress import _validate
from l2a_compress.errors import ConfigError

__all__ = ["DeviceProfile", "list_devices"]

_KINDS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Measured or nominal figures of one device.

    Attributes:
        name: What users type, for example ``rtx-4090``.
        kind: ``cpu`` or ``gpu``.
        peak_flops: Dense floating-point operations per second at the precision that weights are computed in.
        memory_bandwidth: Bytes per second between memory and the compute units.
        memory_bytes: Memory of the device in bytes.
        bytes_per_weight: Bytes of one stored weight, 2.0 for bf16; it may be a fraction for packed formats.
        source: Where the figures come from: text that starts with ``nominal`` or ``measured``.

    Raises:
        ConfigError: A figure is not a number above zero, or a text is not one of those named above.
    """

    name: str
    kind: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: int
    bytes_per_weight: float
    source: str

    def __post_init__(self) -> None:
        _validate.text(self.name, "device.name", ConfigError)
        if self.kind not in _KINDS:
            raise ConfigError(f"device.kind must be one of {', '.join(_KINDS)}, found {self.kind!r}")
        for name in ("peak_flops", "memory_bandwidth", "bytes_per_weight"):
            object.__setattr__(self, name, _validate.positive(getattr(self, name), f"device.{name}", ConfigError))
        memory = _validate.integer(self.memory_bytes, "device.memory_bytes", ConfigError, minimum=1)
        object.__setattr__(self, "memory_bytes", memory)
        if not _validate.text(self.source, "device.source", ConfigError).startswith(("nominal", "measured")):
            raise ConfigError(f"device.source must start with 'nominal' or 'measured', found {self.source!r}")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal profile."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> DeviceProfile:
        """Read a profile from a JSON object; an unknown or missing key is a ``ConfigError``."""
        return cls(**_validate.keywords(cls, data, ConfigError, optional=frozenset()))

    @classmethod
    def from_toml(cls, path: str | Path) -> DeviceProfile:
        """Read a profile from a TOML file of your own, one key per attribute."""
        from l2a_compress import profiles

        data = profiles.load_toml(path)
        try:
            return cls.from_json(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def named(cls, name: str) -> DeviceProfile:
        """Read a profile that comes with the package, or a ``ConfigError`` that lists their names."""
        from l2a_compress import profiles

        return cls.from_json(profiles.load("devices", name))


def list_devices() -> tuple[str, ...]:
    """Return the names of the device profiles that come with the package, sorted."""
    from l2a_compress import profiles

    return profiles.names("devices")
