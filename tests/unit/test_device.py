"""Device profiles and the settings files that ship with the package."""

import json
from pathlib import Path

import pytest

from l2a_compress import ConfigError, DeviceProfile, list_devices, profiles

L4 = DeviceProfile.named("l4").to_json()


@pytest.mark.parametrize("name", list_devices())
def test_shipped_profiles_are_valid_and_carry_their_own_name(name: str) -> None:
    device = DeviceProfile.named(name)
    assert device.name == name
    assert device.source.startswith("nominal")
    assert DeviceProfile.from_json(json.loads(json.dumps(device.to_json()))) == device


def test_the_promised_devices_are_there() -> None:
    assert {"generic-cpu", "rtx-4090", "l4", "a100-80gb", "h100-sxm"} <= set(list_devices())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'h200'.*a100-80gb.*l4"):
        DeviceProfile.named("h200")


def test_a_file_of_your_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in L4.items()))
    assert DeviceProfile.from_toml(path) == DeviceProfile.named("l4")
    assert profiles.load_device(path) == profiles.load_device("l4")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tpu"},
        {"peak_flops": 0},
        {"memory_bandwidth": "fast"},
        {"bytes_per_weight": float("nan")},
        {"memory_bytes": 1.5},
        {"peak_flops": True},
        {"source": "guessed"},
        {"name": ""},
        {"extra": 1},
    ],
)
def test_bad_figures_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        DeviceProfile.from_json(L4 | change)


def test_a_missing_figure_is_refused_by_name_and_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml.*'bytes_per_weight' is missing"):
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
