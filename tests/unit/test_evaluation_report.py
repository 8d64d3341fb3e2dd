"""From an artifact to its report: every point is there, and the files are whole, valid and self-contained."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from l2a_compress.errors import BudgetError, ConfigError, StorageError
from l2a_compress.evaluation.console import print_report, progress_bar
from l2a_compress.evaluation.drawings import heat_map
from l2a_compress.evaluation.frontier import evaluate, metric_for
from l2a_compress.evaluation.page import page
from l2a_compress.evaluation.report import Report, validate, write_report
from l2a_compress.training.data_config import DataConfig, MixtureConfig
from toy_evaluation import SETTINGS, new_artifact

FILES = ["report.json", "frontier.svg", "frontier.png", "report.html"]


@pytest.fixture(scope="module")
def report() -> Report:
    return evaluate(new_artifact())


@pytest.fixture(scope="module")
def likely() -> Report:
    return evaluate(new_artifact(problems=4, contracts=("cap",), baselines=("block_influence",)), metric="nll")


def test_every_point_is_measured(report: Report) -> None:
    asked = [(point.contract, point.budget) for point in report.points]
    assert asked == [(contract, budget) for contract in ("cap", "mean") for budget in (1.0, 0.7, 0.5)]
    assert [point.think_cap for point in report.think_points] == [8, 4]
    assert {point.name for point in report.baselines} == {"uniform"}
    assert report.dense_short is not None
    assert {point.n for point in report.everything} == {9}
    assert {point.over_budget for point in report.everything} == {0}
    assert set(report.frontier) == {"cap", "mean"}


def test_cap_and_mean_meet_at_the_whole_budget(report: Report) -> None:
    cap, mean = (next(p for p in report.points if p.contract == c and p.budget == 1.0) for c in ("cap", "mean"))
    assert dataclasses.replace(mean, contract="cap", mean_error=None) == cap
    assert cap.cost == 1.0


def test_baselines_cost_what_cap_cost_and_no_layer_more(report: Report) -> None:
    layers = report.model["shape"]["num_layers"]
    costs = {p.cost for p in report.points if p.contract == "cap" and p.cost < 1}
    assert {len(p.dropped_layers) for p in report.baselines} == {int((1 - c + 0.006) * layers) for c in costs} - {0}
    assert report.baselines


def test_nll_is_measured_at_every_budget(likely: Report) -> None:
    assert likely.metric == "agreement"
    assert likely.dense.accuracy == likely.dense.agreement == 1.0
    assert likely.dense.kl == pytest.approx(0.0, abs=1e-5)
    assert likely.think_points == ()
    for point in likely.points + likely.baselines:
        assert point.accuracy == point.agreement < 1.0
        assert (point.kl or 0) > 0 < (point.nll or 0)


def test_the_files_are_whole(report: Report, tmp_path: Path) -> None:
    files = write_report(report, tmp_path / "deep" / "folder")
    assert list(files) == FILES
    content = json.loads(files["report.json"].read_text())
    validate(content)
    assert Report.from_json(content) == report
    assert ET.fromstring(files["frontier.svg"].read_text()).tag.endswith("svg")
    with Image.open(io.BytesIO(files["frontier.png"].read_bytes())) as picture:
        assert picture.width > 1200
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 100  # something is drawn
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == sorted(FILES)


def test_by_difficulty_agrees_with_the_points(report: Report) -> None:
    content = report.to_json()["by_difficulty"]
    assert sum(part["n"] for part in content.values()) == 9
    for name, part in content.items():
        for point, shown in zip(report.points, part["points"], strict=True):
            assert shown["accuracy"] == point.by_difficulty[name].accuracy
            assert (shown["budget"], shown["contract"]) == (point.budget, point.contract)


class _Page(HTMLParser):
    """Collects what a page would load, and checks that its elements close."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escaped(report: Report) -> None:
    model = {**report.model, "name": "<script>alert(1)</script>"}
    text = page(dataclasses.replace(report, model=model), "<?xml?>\n<svg><title>frontier</title></svg>")
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert [target for target in parsed.loads if not target.startswith("#")] == []
    assert "script" not in parsed.tags
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    # The frontier, a heat map per contract, and a histogram per generated point that is no baseline.
    assert parsed.tags["svg"] == 1 + 2 + len(report.points) + len(report.think_points) + 2


def test_the_heat_map_has_a_cell_per_layer_and_row(report: Report) -> None:
    rows = [("0.5", name, heat.n, heat.layers, heat.groups) for name, heat in report.points[2].heat.items()]
    drawn = ET.fromstring(heat_map(rows))
    titles = [element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 6 * len(rows)
    shown = {int(title.split(": ")[1].split(" ")[0]) for title in titles}
    assert 100 in shown  # the stem
    assert len(shown) > 1


def test_a_long_model_still_has_a_heat_map() -> None:
    drawn = ET.fromstring(heat_map([("0.5", "all", 3, [0.5] * 80, [0.25] * 80)]))
    assert float(drawn.attrib["width"]) < 1500


def test_the_table_names_every_point(report: Report, likely: Report, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_report(report, {"report.json": tmp_path / "report.json"}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("dense short", "L2A cap 0.7", "L2A mean 0.5", "think <= 4", "uniform -3", "frontier under cap"):
        assert expected in text
    assert "\u2026" not in text  # nothing is cut off in a terminal of 80 columns
    assert str(tmp_path / "report.json") in text
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_report(likely, {}, console)
    assert "NLL" in console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_reaches_its_end() -> None:
    told: list[tuple[int, int]] = []
    settings = dataclasses.replace(SETTINGS, budgets=(0.6,), contracts=("cap",), problems=5, baselines=())
    evaluate(new_artifact(), settings, think_shares=(), progress=lambda label, done, total: told.append((done, total)))
    assert told[0][0] == 0
    assert told[-1] == (15, 15)  # dense, dense short and one budget
    assert told == sorted(told)
    with progress_bar(Console(file=io.StringIO())) as bar:
        assert bar is not None
        bar("cap 0.6", 3, 15)


def test_the_seed_chooses_the_problems() -> None:
    settings = dataclasses.replace(SETTINGS, budgets=(0.6,), contracts=("cap",), problems=6, baselines=())
    first, again, other = (
        evaluate(new_artifact(), settings, think_shares=(), metric="nll", seed=seed) for seed in (0, 0, 1)
    )
    assert first.points[0].nll == again.points[0].nll != other.points[0].nll
    assert (first.points[0].seed, other.points[0].seed) == (0, 1)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"budgets": (1.5,)}, ConfigError, "1.5"),
        ({"budgets": (0.01,)}, BudgetError, "always-on"),
        ({"budgets": (float("nan"),)}, ConfigError, "nan"),
        ({"budgets": ()}, ConfigError, "budgets"),
        ({"problems": 0}, ConfigError, "evaluation.problems must be at least 1"),
        ({"contracts": ("best",)}, ConfigError, "'best'"),
        ({"baselines": ("magic",)}, ConfigError, "'magic'"),
    ],
)
def test_wrong_settings_are_one_clear_error(change: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        evaluate(new_artifact(), dataclasses.replace(SETTINGS, **change))  # type: ignore[arg-type]


def test_mean_without_prices_says_what_to_do() -> None:
    artifact = new_artifact()
    artifact.gated.prices = ()
    with pytest.raises(BudgetError, match="calibrat"):
        evaluate(artifact, dataclasses.replace(SETTINGS, contracts=("mean",)))


@pytest.mark.parametrize(("kinds", "metric"), [(("embedded", "gsm8k"), "accuracy"), (("gsm8k", "text"), "nll")])
def test_a_mixture_is_compared_by_answers_where_all_of_it_has_them(kinds: tuple[str, ...], metric: str) -> None:
    sources = [DataConfig(kind=kind) if kind == "embedded" else DataConfig(source="f", kind=kind) for kind in kinds]
    assert metric_for(MixtureConfig(sources=tuple(sources))) == metric


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ConfigError, match="'speed'"):
        evaluate(new_artifact(), metric="speed")  # type: ignore[arg-type]


def test_a_report_out_of_shape_is_refused(report: Report) -> None:
    content = report.to_json()
    content["points"][1]["cost"] = 55.0
    with pytest.raises(ConfigError, match=r"points\[1\]\.cost"):
        Report.from_json(content)


def test_a_folder_that_cannot_be_made(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        write_report(report, tmp_path / "file" / "folder")
