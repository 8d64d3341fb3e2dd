"""The figures of a device that costs are computed from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2a_compress import _validate
from l2a_compress.errors import ConfigError

__all__ = ["DTYPES", "DeviceProfile", "list_devices"]

DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")

_KINDS = ("cpu", "gpu")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
# What numbers are widened to where a device does not compute in them; integers need a float beside them anyway.
_WIDER = {"fp4": "fp8", "fp8": "fp16", "int4": "fp16", "int8": "fp16", "fp16": "fp32", "bf16": "fp32"}


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Measured or nominal figures of one device.

    Attributes:
        name: What users type, for example ``rtx-4090``.
        kind: ``cpu`` or ``gpu``.
        memory_bytes: Memory of the device in bytes.
        memory_bandwidth: Bytes per second between memory and the compute units.
        peak_flops: Operations per second of dense matrices, without sparsity, by number format: ``fp32`` and those of
            ``DTYPES`` that the device computes in.
        source: Where the figures come from: text that starts with ``nominal`` or ``measured``.
        compute_capability: Of an NVIDIA GPU, as text: ``8.9``.
        link: The data sheet, an https address.

    Raises:
        ConfigError: A figure is not a number above zero, or a text is not one of those named above.
    """

    name: str
    kind: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: dict[str, float]
    source: str
    compute_capability: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        _validate.text(self.name, "device.name", ConfigError)
        if self.kind not in _KINDS:
            raise ConfigError(f"device.kind must be one of {', '.join(_KINDS)}, found {self.kind!r}")
        bandwidth = _validate.positive(self.memory_bandwidth, "device.memory_bandwidth", ConfigError)
        object.__setattr__(self, "memory_bandwidth", bandwidth)
        object.__setattr__(self, "peak_flops", _peaks(self.peak_flops))
        memory = _validate.integer(self.memory_bytes, "device.memory_bytes", ConfigError, minimum=1)
        object.__setattr__(self, "memory_bytes", memory)
        if not _validate.text(self.source, "device.source", ConfigError).startswith(("nominal", "measured")):
            raise ConfigError(f"device.source must start with 'nominal' or 'measured', found {self.source!r}")
        _check_capability(self.compute_capability, self.kind)
        if self.link is not None and not _validate.text(self.link, "device.link", ConfigError).startswith("https://"):
            raise ConfigError(f"device.link must start with 'https://', found {_validate.shown(self.link)}")

    def computes_in(self, dtype: str) -> str:
        """Return the format of ``peak_flops`` that numbers of ``dtype`` are computed in: itself, or a wider one.

        Raises:
            ConfigError: ``dtype`` is none of ``DTYPES``.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, found {_validate.shown(dtype)}")
        while dtype not in self.peak_flops:
            dtype = _WIDER[dtype]
        return dtype

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal profile."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> DeviceProfile:
        """Read a profile from a JSON object; an unknown or missing key is a ``ConfigError``."""
        return cls(**_validate.keywords(cls, data, ConfigError, optional=frozenset({"compute_capability", "link"})))

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


def _peaks(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping) or "fp32" not in value:
        raise ConfigError(f"device.peak_flops must be a table with at least fp32, found {_validate.shown(value)}")
    strange = sorted(str(dtype) for dtype in value if dtype not in DTYPES)
    if strange:
        raise ConfigError(f"device.peak_flops: unknown format {strange[0]!r}; known are {', '.join(DTYPES)}")
    return {dtype: _validate.positive(peak, f"device.peak_flops.{dtype}", ConfigError) for dtype, peak in value.items()}


def _check_capability(value: object, kind: str) -> None:
    if value is None:
        return
    if kind != "gpu" or not isinstance(value, str) or not _CAPABILITY.fullmatch(value):
        raise ConfigError(
            f"device.compute_capability must be text such as '8.9', and of a gpu, found {_validate.shown(value)} of a "
            f"{kind}"
        )
