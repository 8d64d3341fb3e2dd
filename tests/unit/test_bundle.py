"""Opening a bundle: whatever is in the folder, it opens as a whole or is one error that says where and what."""

import copy
import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutate, write_bundle

from l2a_compress import ARTIFACT_FILE, MANIFEST_FILE, ArtifactConfig, ArtifactError, Budget, Bundle, BundleError
from l2a_compress._cli import main
from l2a_compress.bundle import MOST_VARIANTS, GraphEntry
from l2a_compress.errors import BudgetError
from l2a_compress.limits import limits_of, think_share
from strategies import EXAMPLE_ARTIFACT
from test_artifact import schema

VALIDATOR = jsonschema.Draft202012Validator(schema("manifest"))
DIGEST = "0" * 64
ENTRY = {"sha256": DIGEST, "size": 0}
NESTED: Any = 0
for _ in range(40):
    NESTED = [NESTED]

pytestmark = pytest.mark.timeout(60)  # a pipe that is opened would wait for ever


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(a folder whose manifest tests may overwrite, its manifest)."""
    folder = tmp_path_factory.mktemp("made")
    return folder, write_bundle(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    put(tmp_path, write_bundle(tmp_path))
    return tmp_path


def put(folder: Path, manifest: object) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def changed(manifest: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The manifest with another value at a place; the value may be a function of the old one."""
    found = copy.deepcopy(manifest)
    holder: Any = found
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value(holder[place[-1]]) if callable(value) else value
    return found


def test_a_whole_bundle_opens_and_keeps_its_schema(folder: Path) -> None:
    data = json.loads((folder / MANIFEST_FILE).read_text())
    VALIDATOR.validate(data)
    assert Bundle.load(folder).to_json() == data
    assert Bundle.load(folder) == Bundle.from_json(data)


FIELDS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("schema_version",), 2, "schema_version 2 is newer"),
    (("schema_version",), True, "schema_version must be an integer, found True"),
    (("schema_version",), 0, "schema_version must be at least 1"),
    (("base",), [], "base must be an object of name, family, digest"),
    (("base",), {"name": "x", "family": "y"}, "base must be an object of name, family, digest"),
    (("base", "digest"), "", r"base\.digest must be a non-empty string"),
    (("base", "name"), 3, r"base\.name must be a non-empty string, found 3"),
    (("artifact",), "0" * 63, "artifact must be 64 hexadecimal digits"),
    (("artifact",), "A" * 64, "artifact must be 64 hexadecimal digits"),
    (("artifact",), DIGEST + "\n", "artifact must be 64 hexadecimal digits"),
    (("shape",), None, "shape: ModelShape: expected a JSON object"),
    (("shape", "num_layers"), 1.0, r"shape\.num_layers must be an integer"),
    (("shape", "num_layers"), 1025, r"shape\.num_layers must be at most 1024"),
    (("shape", "num_groups"), 2**40, r"shape\.num_groups must be at most 1024"),
    (("shape", "num_heads"), 3, r"shape\.num_heads must be a multiple"),
    (("shape", "hidden_size"), 2**63, "shape: the cost of all layers"),
    (("shape", "tied"), 1, r"shape\.tied must be true or false"),
    (("dialect",), ["ort"], "dialect must be one of ort, standard"),
    (("precision",), {}, "precision must be one of fp32"),
    (("gates",), [], "gates must be an object"),
    (("gates", "stem_layers"), None, r"gates\.stem_layers must be an integer"),
    (("gates", "stem_layers"), 0, r"gates\.stem_layers must be at least 1"),
    (("gates", "stem_layers"), 3, r"gates\.stem_layers must be at most 2"),
    (("gates", "think_reference"), 0, r"gates\.think_reference must be at least 1"),
    (("gates", "think_reference"), True, r"gates\.think_reference must be an integer"),
    (("gates", "tokens"), 1, r"gates\.tokens must be true or false"),
    (("gates", "input_blind"), ["cap", "other"], r"gates\.input_blind must list some of cap, mean"),
    (("gates", "more"), {"a": [0, float("nan")]}, r"gates\.more\.a\[1\] must be finite"),
    (("gates", "more"), NESTED, r"gates\.more\[0\].* stands deeper than 32 levels"),
    (("gates", "more"), 2**64, r"gates\.more must be an integer of 64 bits"),
    (("gates", "more"), -(2**63) - 1, r"gates\.more must be an integer of 64 bits"),
    (("gates", "more"), "\ud800", r"gates\.more must be Unicode text"),
    (("gates", "\ud800"), 1, "gates must be Unicode text"),
    (("tags",), {"think": 1}, "tags must be an object of think, end_think, answer, end_answer"),
    (("tags", "more"), 1, "tags must be an object of think"),
    (("tags", "answer"), -1, r"tags\.answer must be at least 0"),
    (("tags", "answer"), 11, r"tags\.answer must be at most 10"),
    (("tags", "answer"), "9", r"tags\.answer must be an integer"),
    (("tags", "answer"), 7, "tags must be four different tokens"),
    (("positions",), 0, "positions must be at least 1"),
    (("positions",), 2**31, "positions must be at most 2147483647"),
    (("positions",), 10**400, "positions must be an integer of 64 bits"),
    (("positions",), float("inf"), "positions must be finite"),
    (("widths",), "12", "widths must be a list"),
    (("widths",), [], "widths must ascend and end with all 2 groups"),
    (("widths",), [2, 1], "widths must ascend"),
    (("widths",), [1, 1, 2], "widths must ascend"),
    (("widths",), [1], "widths must ascend and end with all 2 groups"),
    (("widths",), [1, 3], "widths must be at most 2"),
    (("widths",), [0, 2], "widths must be at least 1"),
    (("widths",), [True, 2], "widths must be an integer"),
    (("whole_cache",), "yes", "whole_cache must be true or false"),
    (("prices",), {"0.5": 1}, "prices must be a list of"),
    (("prices",), [[0.5, 1, 2]], "prices must be a list of"),
    (("prices",), ["ab"], "prices must be a list of"),
    (("prices",), [[0.5, None]], "prices: a price must be a number"),
    (("prices",), [[0.5, float("-inf")]], r"prices\[0\]\[1\] must be finite"),
    (("prices",), [[0.5, 10**400]], r"prices\[0\]\[1\] must be an integer of 64 bits"),
    (("prices",), [[1.5, 0]], r"prices: a budget must lie within \(0, 1\]"),
    (("prices",), [[0.5, 1], [0.5, 1]], "prices: budgets must ascend"),
    (("graphs",), {}, "graphs must be a list"),
    (("graphs",), [], "graphs must be at least one"),
    (("graphs",), [3], r"graphs\[0\]: GraphEntry: expected a JSON object, found int"),
    (("graphs", 1, "name"), "if", "graphs must be at least one, each of its own name"),
    (("graphs", 1, "name"), "\x1b[2J", r"graph\.name must be at most 255 characters, none of control"),
    (("graphs", 1, "name"), "x" * 256, r"graph\.name must be at most 255 characters"),
    (("graphs", 1, "name"), None, r"graph\.name must be a non-empty string"),
    (("graphs", 1, "file"), "b2.onnx", r"graph b1: its file 'b2\.onnx' is not listed in files"),
    (("graphs", 1, "file"), "../b1.onnx", r"graph b1: its file '\.\./b1\.onnx' is not listed in files"),
    (("graphs", 1, "kind"), ["variant"], "graph b1: kind must be one of"),
    (("graphs", 1, "kind"), "if", "graph b1: a variant has a budget and an allocation, other graphs neither"),
    (("graphs", 1, "budget"), 0.4, "graph b0.5: its budget is above that of a variant before it"),
    (("graphs", 1, "budget"), 1.1, r"graph b1: budget must lie within \(0, 1\]"),
    (("graphs", 1, "budget"), True, "graph b1: budget must be a number"),
    (("graphs", 1, "cost"), 0, r"graph b1: cost must lie within \(0, 1\]"),
    (("graphs", 1, "cost"), 10**400, r"graphs\[1\]\.cost must be an integer of 64 bits"),
    (("graphs", 1, "allocation"), [], r"graphs\[1\]: allocation: Allocation: expected a JSON object"),
    (("graphs", 1, "allocation", "groups"), [[0, 2]], r"graphs\[1\]: allocation: groups\[0\] names a group beyond 1"),
    (("graphs", 1, "allocation", "groups"), [[0, 1]], "graph b1: its allocation is of another model shape"),
    (("graphs", 1, "allocation", "groups", 2), [0], "graph b0.5: is not a part of a variant before it"),
    (("graphs", 2, "allocation", "groups", 1), [0], "graph b0.5.decode: has fixed shapes of an allocation"),
    (("graphs", 3, "sizes"), [], "graph b0.5.decode: sizes must be an object of batch"),
    (("graphs", 3, "sizes", "more"), 1, "graph b0.5.decode: sizes must be an object of batch"),
    (("graphs", 3, "sizes", "batch"), 0, "graph b0.5.decode: batch must be at least 1"),
    (("graphs", 3, "sizes", "past"), -1, "graph b0.5.decode: past must be at least 0"),
    (("quality",), {}, "quality must be a list"),
    (("quality",), [1], r"quality\[0\] must be an object"),
    (("quality", 0, "accuracy"), float("nan"), r"quality\[0\]\.accuracy must be finite"),
    (("versions",), None, "versions must be an object"),
    (("versions", "onnx"), 1.2, r"versions\.onnx must be a non-empty string"),
    (("files",), [], "files must be an object"),
    (("files", "if.onnx", "size"), True, r"files\.if\.onnx\.size must be an integer"),
    (("files", "if.onnx", "size"), -1, r"files\.if\.onnx\.size must be at least 0"),
    (("files", "if.onnx", "sha256"), None, r"files\.if\.onnx\.sha256 must be 64 hexadecimal digits"),
    (("files", "if.onnx"), {"size": 0}, r"files\.if\.onnx must hold exactly sha256 and size"),
    (("files",), lambda files: {k: v for k, v in files.items() if k != "weights.bin"}, "files must list weights.bin"),
    (("surprise",), 1, "unknown key 'surprise'"),
]


@pytest.mark.parametrize(("place", "value", "says"), FIELDS)
def test_a_wrong_field_is_one_error_that_names_it(folder: Path, place: tuple[Any, ...], value: Any, says: str) -> None:
    put(folder, changed(write_bundle(folder), place, value))
    with pytest.raises(
        BundleError, match=rf"manifest\.json: .*{says}.*; if manifest\.json was changed, copy the folder"
    ):
        Bundle.load(folder)


@pytest.mark.parametrize("key", list(Bundle.__dataclass_fields__))
def test_a_missing_field_is_named(made: tuple[Path, dict[str, Any]], key: str) -> None:
    with pytest.raises(BundleError, match=f"key '{key}' is missing"):
        Bundle.from_json({name: value for name, value in made[1].items() if name != key})


@pytest.mark.parametrize("name", ["../x", "a/../x", "/etc/passwd", "a//b", "a/", "./a", ".", "", "a\\b", "c:x", "a\0b"])
def test_a_path_that_may_leave_the_folder_is_refused(folder: Path, name: str) -> None:
    put(folder, changed(write_bundle(folder), ("files",), lambda files: files | {name: ENTRY}))
    with pytest.raises(BundleError, match=r"manifest\.json: files: "):
        Bundle.load(folder)


def test_a_message_is_short_however_long_what_it_found_is(made: tuple[Path, dict[str, Any]]) -> None:
    for place, value in ((("widths",), "x" * 10**6), (("gates", "x" * 10**6), 2**64), (("x" * 10**6,), 1)):
        with pytest.raises(BundleError) as caught:
            Bundle.from_json(changed(made[1], place, value))
        assert len(str(caught.value)) < 500


def test_a_long_key_over_many_values_takes_no_longer_than_the_file_is_long(made: tuple[Path, dict[str, Any]]) -> None:
    data = changed(made[1], ("quality",), [{"x" * 10**6: [0.5] * 10**5}])
    assert Bundle.from_json(data).quality == tuple(data["quality"])


def test_variants_are_counted(made: tuple[Path, dict[str, Any]]) -> None:
    variant = made[1]["graphs"][1]
    many = [{**variant, "name": f"b1-{number}"} for number in range(MOST_VARIANTS + 1)]
    assert len(Bundle.from_json(made[1] | {"graphs": many[:-1]}).variants) == MOST_VARIANTS
    with pytest.raises(BundleError, match="at most 256 variants, found 257"):
        Bundle.from_json(made[1] | {"graphs": many})


def test_an_entry_alone_is_checked_too(made: tuple[Path, dict[str, Any]]) -> None:
    entry = made[1]["graphs"][1]
    for change in ({"cost": 10**5000}, {"budget": float("nan")}, {"name": NESTED}):
        with pytest.raises(BundleError, match=next(iter(change))):
            GraphEntry.from_json(entry | change)


TEXTS: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda text: b"", "not JSON"),
    (lambda text: text[:-1], "not JSON"),
    (lambda text: text + b"]", "not JSON"),
    (lambda text: b"\xef\xbb\xbf" + text, "not JSON.*BOM"),
    (lambda text: text.decode().encode("utf-16"), "not JSON.*utf-8"),
    (lambda text: text.replace(b"tiny", b"\xff"), "not JSON.*utf-8"),
    (lambda text: text.replace(b"256", b"NaN"), "positions must be finite, found nan"),
    (lambda text: text.replace(b"256", b"-Infinity"), "positions must be finite, found -inf"),
    (lambda text: text.replace(b"256", b"1e999"), "positions must be finite"),
    (lambda text: text.replace(b"256", b"9" * 5000), "not JSON.*digits"),
    (lambda text: text.replace(b"256", b"[" * 100_000), "not JSON.*recursion"),
    (lambda text: text.replace(b"256", b"[" * 500 + b"]" * 500), r"positions\[0\].* stands deeper than 32 levels"),
    (lambda text: text.replace(b'"positions"', b'"positions": 1, "positions"'), "key 'positions' stands twice"),
    (lambda text: text.replace(b'"think"', b'"think": 7, "think"'), "key 'think' stands twice"),
    (lambda text: b"[]", "expected a JSON object, found list"),
    (lambda text: b"null", "expected a JSON object, found NoneType"),
]


@pytest.mark.parametrize(("damage", "says"), TEXTS)
def test_a_manifest_that_is_no_plain_json_is_refused(folder: Path, damage: Any, says: str) -> None:
    path = folder / MANIFEST_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=rf"(?s)manifest\.json: .*{says}.*copy the folder or export it again"):
        Bundle.load(folder)


def test_every_altered_byte_is_found(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(BundleError, match=f"{path.name}: is corrupt: its SHA-256"):
                Bundle.load(folder)
        path.write_bytes(data)
    Bundle.load(folder)


def outside_of(folder: Path) -> Path:
    """What lies beside the folder: copies of its files."""
    return folder.parent / f"{folder.name}-outside"


def linked_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(outside_of(folder) / name)


def linked_folder(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    (folder / name).symlink_to(outside_of(folder) / name)


def linked_inside(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "kept")
    (folder / name).symlink_to("kept")


def dangling(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")


def loop(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)


def device_link(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/null")


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def listening(folder: Path, name: str) -> None:
    (folder / name).unlink()
    before = Path.cwd()
    os.chdir(folder)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    finally:
        os.chdir(before)


def directory(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def missing(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str) -> None:
    os.truncate(folder / name, 3)


def file_for_folder(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    (folder / name).write_bytes(b"")


LINK = "leaves the bundle folder, or may come to: it is a link"
ODD = "is a folder, a pipe or a device and not a file"
DAMAGES: list[tuple[Callable[[Path, str], None], str, str]] = [
    *((damage, "if.onnx", LINK) for damage in (linked_file, linked_inside, dangling, loop, device_link)),
    *((damage, "if.onnx", ODD) for damage in (pipe, listening, directory)),
    (linked_folder, "s", LINK),
    (linked_inside, "s", LINK),
    (file_for_folder, "s", r"b0\.5\.onnx: the file is missing"),
    (missing, "if.onnx", "the file is missing"),
    (missing, "s/b0.5.onnx", "the file is missing"),
    (cut, "if.onnx", "has 3 bytes instead of 7"),
    *((damage, MANIFEST_FILE, LINK) for damage in (linked_file, linked_inside, dangling, loop, device_link)),
    *((damage, MANIFEST_FILE, ODD) for damage in (pipe, listening, directory)),
    (cut, MANIFEST_FILE, "not JSON"),
]


@pytest.mark.parametrize(("damage", "name", "says"), DAMAGES)
def test_what_is_not_the_listed_file_is_refused_by_name(folder: Path, damage: Any, name: str, says: str) -> None:
    shutil.copytree(folder, outside_of(folder))
    damage(folder, name)
    with pytest.raises(BundleError, match=f"{name}.*{says}"):
        Bundle.load(folder)


def test_no_manifest_and_no_folder_say_what_to_give(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(
        BundleError, match=r"not a bundle: it holds no manifest\.json; give the folder that export wrote"
    ):
        Bundle.load(folder)
    for nowhere in (folder / "nowhere", folder / "if.onnx", folder / ("x" * 300), folder / "\0", folder / "\ud800"):
        with pytest.raises(BundleError, match="no such folder; give the folder that export wrote"):
            Bundle.load(nowhere)


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_not_opened(folder: Path) -> None:
    (folder / "if.onnx").unlink()
    os.mknod(folder / "if.onnx", 0o666 | 0o020000, os.makedev(1, 5))
    with pytest.raises(BundleError, match=rf"if\.onnx: {ODD}"):
        Bundle.load(folder)


def test_a_manifest_of_more_than_16_mib_is_not_read(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    text = path.read_bytes()
    path.write_bytes(text + b" " * (2**24 - len(text)))
    Bundle.load(folder)
    os.truncate(path, 2**24 + 1)
    with pytest.raises(BundleError, match=r"manifest\.json: has 16777217 bytes, more than 16777216"):
        Bundle.load(folder)


def test_a_name_too_long_for_the_disk_is_one_error(folder: Path) -> None:
    name = "ä" * 200
    put(folder, changed(write_bundle(folder), ("files",), lambda files: files | {name: ENTRY}))
    with pytest.raises(BundleError, match="ä: cannot be read: File name too long; copy the folder"):
        Bundle.load(folder)


def test_a_graph_that_is_not_listed_is_refused_and_other_files_are_let_be(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    Bundle.load(folder)
    (folder / "b0.7.onnx").write_bytes(b"left over")
    with pytest.raises(BundleError, match=r"b0\.7\.onnx: a graph that manifest\.json does not list; remove it"):
        Bundle.load(folder)


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("links") / "current"
    link.symlink_to(folder)
    assert Bundle.load(link) == Bundle.load(folder)


def test_hard_links_open_and_their_content_is_verified(folder: Path) -> None:
    other = folder.parent / f"{folder.name}-store"
    os.link(folder / "weights.bin", other)
    Bundle.load(folder)
    other.write_bytes(b"Weights.bin")
    with pytest.raises(BundleError, match=r"weights\.bin: is corrupt"):
        Bundle.load(folder)


@pytest.mark.parametrize("damage", [linked_inside, dangling, loop, device_link, pipe, directory])
@pytest.mark.parametrize("name", ["gates.safetensors", ARTIFACT_FILE])
def test_artifacts_keep_to_the_same_rules(tmp_path: Path, damage: Any, name: str) -> None:
    (tmp_path / "gates.safetensors").write_bytes(b"")
    data = EXAMPLE_ARTIFACT.to_json() | {"files": {"gates.safetensors": ENTRY}}
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps(data))
    damage(tmp_path, name)
    with pytest.raises(ArtifactError, match=rf"{name}: (is a folder, a pipe|leaves the artifact folder)"):
        ArtifactConfig.load(tmp_path)


def test_inspect_says_what_is_wrong_with_a_manifest_that_is_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(folder, MANIFEST_FILE)
    assert main(["compress", "inspect", str(folder)]) != 0
    assert ODD in capsys.readouterr().err


def opened(folder: Path, data: bytes) -> Bundle | str:
    """The bundle, or what the error says."""
    (folder / MANIFEST_FILE).write_bytes(data)
    try:
        return Bundle.load(folder)
    except BundleError as error:
        return str(error)


@pytest.mark.parametrize("costs", [b"\xff", b"{}", b'{"graphs": [1]}', b'{"graphs": {"b1": {"decode_seconds": "1"}}}'])
def test_inspect_says_what_is_wrong_with_costs(folder: Path, costs: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "costs.json").write_bytes(costs)
    entry = {"sha256": hashlib.sha256(costs).hexdigest(), "size": len(costs)}
    put(folder, changed(write_bundle(folder), ("files", "costs.json"), entry))
    assert main(["compress", "inspect", str(folder)]) != 0
    assert "costs.json: not what calibration wrote" in capsys.readouterr().err


def test_inspect_shows_names_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, changed(changed(write_bundle(folder), ("graphs", 1, "name"), "[/b]"), ("base", "name"), "[/red]"))
    assert main(["compress", "inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "[/b]" in shown
    assert "[/red]: ort, fp32" in shown


def check(folder: Path, data: bytes) -> None:
    """A manifest that opens is one the schema allows, that comes back as it is, and that a runtime can compute with."""
    bundle = opened(folder, data)
    if isinstance(bundle, str):
        assert bundle.startswith(f"{folder}")
        assert len(bundle) < 1000
        return
    VALIDATOR.validate(bundle.to_json())
    assert Bundle.from_json(json.loads(json.dumps(bundle.to_json(), allow_nan=False))) == bundle
    for compute in (1.0, 0.7, 0.4):
        budget = Budget(compute=compute, think_tokens=16)
        try:
            spend = limits_of(budget, bundle.cost, bundle.gates["stem_layers"], contract="mean", prices=bundle.prices)
        except BudgetError:
            continue
        assert np.array([spend.units, spend.layers, spend.heads, *bundle.tags.values()], dtype=np.int64).min() >= 0
        assert 0 < think_share(budget, bundle.gates["think_reference"]) <= 1


@settings(max_examples=1500)
@given(st.randoms(use_true_random=False))
def test_no_manifest_is_more_than_one_error(made: tuple[Path, dict[str, Any]], draw: random.Random) -> None:
    check(made[0], mutate(draw, made[1]))


def test_no_flipped_bit_of_a_manifest_is_more_than_one_error(made: tuple[Path, dict[str, Any]]) -> None:
    data = json.dumps(made[1]).encode()
    for at in range(len(data)):
        check(made[0], data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
