"""Device profiles and the settings files that ship with the package."""

import json
import re
from pathlib import Path

import pytest

from l2a_compress import ConfigError, DeviceProfile, list_devices, profiles
from l2a_compress.device import DTYPES

L4 = DeviceProfile.named("l4").to_json()
CAPABILITIES = {
    "a100-80gb": "8.0",
    "b200": "10.0",
    "generic-cpu": None,
    "h100-sxm": "9.0",
    "h200-sxm": "9.0",
    "jetson-agx-orin": "8.7",
    "l4": "8.9",
    "l40s": "8.9",
    "rtx-4090": "8.9",
    "rtx-5090": "12.0",
    "t4": "7.5",
}


@pytest.mark.parametrize("name", list_devices())
def test_shipped_profiles_are_valid_and_carry_their_own_name(name: str) -> None:
    device = DeviceProfile.named(name)
    assert device.name == name
    assert device.source.startswith("nominal")
    assert DeviceProfile.from_json(json.loads(json.dumps(device.to_json()))) == device
    assert device.link is not None


@pytest.mark.parametrize("name", list_devices())
def test_shipped_figures_are_plausible(name: str) -> None:
    device = DeviceProfile.named(name)
    assert 8 * 2**30 <= device.memory_bytes <= 200 * 2**30
    assert device.memory_bytes % 2**30 == 0
    assert 1e10 < device.memory_bandwidth < 1e13
    peaks = device.peak_flops
    assert all(1e11 < peak < 1e16 for peak in peaks.values())
    narrowing = [
        ("fp32", "fp16"),
        ("fp32", "bf16"),
        ("fp16", "fp8"),
        ("fp16", "int8"),
        ("fp8", "fp4"),
        ("int8", "int4"),
    ]
    for wide, narrow in narrowing:
        if narrow in peaks:
            assert peaks[narrow] > peaks[wide]
    if device.kind == "gpu":
        assert re.fullmatch(r"\d{1,2}\.\d", device.compute_capability or "")
        assert {"fp16", "int8"} <= set(peaks)
        major, minor = map(int, (device.compute_capability or "").split("."))
        assert ("bf16" in peaks) == (major >= 8)
        assert ("fp8" in peaks) == ((major, minor) >= (8, 9))
        assert ("fp4" in peaks) == (major >= 10)


@pytest.mark.parametrize("name", list_devices())
def test_the_table_of_the_documentation_is_that_of_the_profiles(name: str) -> None:
    device = DeviceProfile.named(name)
    peaks = (f"{device.peak_flops[dtype] / 1e12:g}" if dtype in device.peak_flops else "-" for dtype in DTYPES)
    memory, bandwidth = f"{device.memory_bytes // 2**30}", f"{device.memory_bandwidth / 1e9:g}"
    row = " | ".join([f"| `{name}`", device.compute_capability or "-", memory, bandwidth, *peaks])
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    assert f"{row} | [{device.source.removeprefix('nominal: ')}]({device.link}) |" in page


def test_the_promised_devices_are_there_with_their_capability() -> None:
    assert {name: DeviceProfile.named(name).compute_capability for name in list_devices()} == CAPABILITIES


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("l4", "int8", "int8"),
        ("l4", "int4", "fp16"),
        ("l4", "fp4", "fp8"),
        ("a100-80gb", "int4", "int4"),
        ("a100-80gb", "fp4", "fp16"),
        ("t4", "bf16", "fp32"),
        ("generic-cpu", "int4", "fp32"),
        ("generic-cpu", "bf16", "fp32"),
    ],
)
def test_numbers_are_widened_to_what_the_device_computes_in(name: str, dtype: str, expected: str) -> None:
    assert DeviceProfile.named(name).computes_in(dtype) == expected


@pytest.mark.parametrize("name", list_devices())
def test_every_format_has_a_peak(name: str) -> None:
    device = DeviceProfile.named(name)
    assert {device.computes_in(dtype) for dtype in DTYPES} <= set(device.peak_flops)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of fp32.*found 'fp64'"):
        DeviceProfile.named("l4").computes_in("fp64")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'h300'.*a100-80gb.*l4"):
        DeviceProfile.named("h300")


def test_a_file_of_your_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in L4.items() if key != "peak_flops"]
    lines += ["[peak_flops]\n", *(f"{dtype} = {peak}\n" for dtype, peak in L4["peak_flops"].items())]
    path.write_text("".join(lines))
    assert DeviceProfile.from_toml(path) == DeviceProfile.named("l4")
    assert profiles.load_device(path) == profiles.load_device("l4")


def test_capability_and_link_may_be_left_out() -> None:
    device = DeviceProfile.from_json({key: L4[key] for key in L4 if key not in ("compute_capability", "link")})
    assert (device.compute_capability, device.link) == (None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tpu"},
        {"peak_flops": 1e12},
        {"peak_flops": {}},
        {"peak_flops": {"fp16": 1e12}},
        {"peak_flops": {"fp32": 0}},
        {"peak_flops": {"fp32": True}},
        {"peak_flops": {"fp32": float("nan")}},
        {"peak_flops": {"fp32": 1e12, "fp64": 1e12}},
        {"memory_bandwidth": "fast"},
        {"memory_bandwidth": 0},
        {"memory_bytes": 1.5},
        {"compute_capability": 8.9},
        {"compute_capability": "sm_89"},
        {"compute_capability": "8.9", "kind": "cpu"},
        {"link": "data sheet"},
        {"link": 1},
        {"source": "guessed"},
        {"name": ""},
        {"bytes_per_weight": 2.0},
    ],
)
def test_bad_figures_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        DeviceProfile.from_json(L4 | change)


def test_a_missing_figure_is_refused_by_name_and_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml.*'kind' is missing"):
        DeviceProfile.from_toml(path)


def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = \n")
    with pytest.raises(ConfigError, match=r"mine\.toml: not a TOML file"):
        profiles.load_recipe(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read"):
        DeviceProfile.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("name", profiles.names("recipes"))
def test_shipped_recipes_are_toml(name: str) -> None:
    assert profiles.load_recipe(name)


def test_a_kind_that_does_not_exist_has_no_names() -> None:
    assert profiles.names("nothing") == ()
