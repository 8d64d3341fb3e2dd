"""The core and the command line work, fast, on a machine without any deep-learning framework."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from l2a_compress._cli.extras import EXTRAS, optional_packages
from l2a_compress.errors import ConfigError

ROOT = Path(__file__).parents[2]

HIDE = """
import json, sys, time

HIDDEN = {"torch", "transformers", "peft", "datasets", "accelerate", "onnx", "onnxruntime", "matplotlib", "pandas"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)

sys.meta_path.insert(0, Hide())
"""
IMPORT = """
start = time.process_time()
import l2a_compress, l2a_compress.profiles, l2a_compress.embedded
import l2a_compress._cli
print(json.dumps({"all": time.process_time() - start}))
"""


def run(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, check=check, timeout=60)


def test_the_core_and_the_command_line_import_in_under_a_second() -> None:
    # Of processor time, which another process does not stretch much; the best of three.
    seconds = [json.loads(run(IMPORT).stdout)["all"] for _ in range(3)]
    assert min(seconds) < 1.0


def test_the_core_works() -> None:
    done = run(
        "from l2a_compress import *\n"
        "shape = ModelShape(num_layers=12, hidden_size=96, intermediate_size=256, num_heads=8, num_groups=4, "
        "head_dim=16, vocab_size=64, tied=True)\n"
        "dense = Allocation.dense(12, 4)\n"
        "print(CostModel(shape=shape).fits(dense, Budget()), DeviceProfile.named(list_devices()[0]).kind)\n"
    )
    assert done.stdout.split() == ["True", "gpu"]


@pytest.mark.parametrize("module", ["torch", "transformers.models.llama"])
def test_the_frameworks_are_really_hidden(module: str) -> None:
    done = run(f"import {module}", check=False)
    assert done.returncode == 1
    assert "hidden: " in done.stderr


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train", "torch", "train"),
        ("evaluate -a artifact", "torch", "train"),
        ("export --artifact artifact --out bundle", "onnx", "export"),
        ("verify bundle", "onnx", "export"),
    ],
)
def test_a_command_without_its_packages_names_the_extra(command: str, package: str, extra: str) -> None:
    done = run(f"from l2a_compress._cli import main; sys.exit(main(['compress', *{command.split()!r}]))", check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the package {package}")
    assert f"pip install 'l2a-compress[{extra}]'" in line


@pytest.mark.parametrize("command", [["run", "bundle", "a prompt"], ["select", "bundle"], ["bench", "bundle"]])
def test_serving_without_onnxruntime_names_both_of_its_extras(command: list[str]) -> None:
    done = run(f"from l2a_compress._cli import main; sys.exit(main({command!r}))", check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "onnxruntime is not installed" in line
    assert "l2a-compress[serve]" in line
    assert "[gpu]" in line


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("sys.modules['lm_eval'] = None", "lm-eval is not installed: pip install 'l2a-compress[train,lm-eval]'"),
        ("import importlib.util; importlib.util.find_spec = bool", "the package torch is not installed"),
    ],
)
def test_the_harness_without_its_packages_is_one_line(before: str, said: str) -> None:
    done = run(f"{before}\nfrom l2a_compress._cli.lm_eval import main\nsys.exit(main())", check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")


def test_the_commands_that_are_installed_are_there() -> None:
    """Each is light: it can be looked up where no framework is."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    places = [place.split(":") for place in scripts.values()]
    run(f"import importlib\nfor module, name in {places!r}: getattr(importlib.import_module(module), name)")


def test_a_module_that_no_extra_installs_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere"), optional_packages():
        raise ModuleNotFoundError("nowhere", name="nowhere")
    with pytest.raises(ConfigError, match=r"package onnx is not installed.*\[export\]"), optional_packages():
        raise ModuleNotFoundError("onnx.reference", name="onnx.reference")


def test_every_package_of_an_extra_is_known() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("train", "export", "serve", "lm-eval"):
        for line in extras[extra]:
            package = line.partition(">")[0].strip().replace("-", "_")
            assert EXTRAS[package] in extras, line
            assert any(line.partition(">")[0] in other for other in extras[EXTRAS[package]]), line
