"""What a wheel holds: everything the library needs, and one name at the top."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import l2a_compress

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "l2a_compress", "exporters", "profiles")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of the checkout, built from a copy so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", copy, copy]
    subprocess.run(command, check=True, timeout=300)
    return zipfile.ZipFile(next(copy.glob("*.whl")))


def expected() -> set[str]:
    """Every file of the library and its two outlying folders, by its place in the wheel."""
    library = {path.relative_to(ROOT).as_posix() for path in files_of(ROOT / "l2a_compress")}
    for name in ("exporters", "profiles"):
        library |= {f"l2a_compress/{path.relative_to(ROOT).as_posix()}" for path in files_of(ROOT / name)}
    return library


def files_of(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def test_one_name_reaches_site_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"l2a_compress", f"l2a_compress-{l2a_compress.__version__}.dist-info"}


def test_the_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.startswith("l2a_compress/")}
    assert held == expected()


def test_the_parts_from_other_folders_are_there(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    assert {
        "l2a_compress/exporters/__init__.py",
        "l2a_compress/profiles/__init__.py",
        "l2a_compress/profiles/devices/generic-cpu.toml",
        "l2a_compress/schemas/artifact.schema.json",
        "l2a_compress/schemas/report.schema.json",
        "l2a_compress/py.typed",
    } <= held


def test_the_command_and_the_licence_are_declared(wheel: zipfile.ZipFile) -> None:
    info = f"l2a_compress-{l2a_compress.__version__}.dist-info"
    assert b"l2a = l2a_compress._cli:main" in wheel.read(f"{info}/entry_points.txt")
    assert b"License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA")
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
