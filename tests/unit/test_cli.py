"""The command line: help, version, errors as one line, and ``compress inspect``."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from l2a_compress import ArtifactConfig, __version__
from l2a_compress._cli import main
from l2a_compress._cli.app import compress
from l2a_compress.artifact import describe_files
from strategies import EXAMPLE_ARTIFACT, artifacts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact folder with one file."""
    (tmp_path / "gates.safetensors").write_bytes(b"gates")
    dataclasses.replace(EXAMPLE_ARTIFACT, files=describe_files(tmp_path)).write(tmp_path)
    return tmp_path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"l2a {__version__}\n"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert [
        entry for entry in compress.registered_commands if entry.callback is None or not entry.callback.__doc__
    ] == []
    assert main(["compress", "--help"]) == 0
    assert "inspect" in capsys.readouterr().out


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "inspect"]) == 2
    assert "folder" in capsys.readouterr().err.lower()


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "inspect", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path / 'none'}: no such folder; give the folder that training wrote\n"


def test_the_traceback_is_there_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2A_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        main(["compress", "inspect", str(tmp_path / "none")])


def test_control_c_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ArtifactConfig, "load", interrupt)
    assert main(["compress", "inspect", str(folder)]) == 130


def test_inspect_as_json_is_the_artifact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "inspect", str(folder), "--json"]) == 0
    assert ArtifactConfig.from_json(json.loads(capsys.readouterr().out)) == ArtifactConfig.load(folder)


def test_inspect_shows_what_matters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for expected in ("qwen3", "num_groups", "gates.safetensors", "0.5: 0.25", "accuracy"):
        assert expected in out


@settings(
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=artifacts)
def test_inspect_prints_any_artifact(config: ArtifactConfig, tmp_path: Path) -> None:
    dataclasses.replace(config, files={}).write(tmp_path)
    assert main(["compress", "inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize("command", [["cli.py"], ["-m", "l2a_compress"]])
def test_the_launchers_are_l2a(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--version"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"l2a {__version__}\n"
