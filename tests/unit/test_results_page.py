"""docs/results.md says what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest
from frontier_summary import compared, mixture
from frontier_tables import fill, page_tables

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    tables = page_tables(ROOT / "benchmarks/results")
    page = (ROOT / "docs/results.md").read_text()
    assert fill(page, tables) == page
    assert "| cap | 1 |" in tables["frontier"]


def test_a_table_is_put_where_its_name_stands() -> None:
    page = "a\n<!-- table: x -->\nold\n<!-- end: x -->\nb\n"
    assert fill(page, {"x": "| new |"}) == "a\n<!-- table: x -->\n\n| new |\n\n<!-- end: x -->\nb\n"


@pytest.mark.parametrize("page", ["", "<!-- table: x -->", "<!-- table: x --><!-- end: x --><!-- table: y -->"])
def test_a_page_without_the_right_places_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="the page"):
        fill(page, {"x": "| new |"})


def _point(cost: float, outcomes: str) -> dict[str, object]:
    return {"cost": cost, "accuracy": outcomes.count("1") / len(outcomes), "outcomes": outcomes, "layer_sparsity": 0.0}


@pytest.mark.parametrize(
    ("cost", "outcomes"),
    [
        (0.7, [0.75, 1.0, 0.75, 0.0]),  # of the ends: the point between them is worse than both together
        (0.4, [0.0, 1.0, 0.0, 0.0]),
        (0.398, [0.0, 1.0, 0.0, 0.0]),  # costs that are as good as even
        (0.8, [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_a_model_of_one_allocation_a_budget_reaches_costs_between_them_by_drawing(
    cost: float, outcomes: list[float]
) -> None:
    side = [_point(0.4, "0100"), _point(0.6, "0010"), _point(0.8, "1110")]
    found = mixture(side, cost)
    assert found is not None
    assert found["outcomes"] == pytest.approx(outcomes)
    assert found["cost"] == pytest.approx(max(cost, 0.4))


def test_seeds_on_the_same_problems_are_not_more_problems() -> None:
    pairs = [(_point(0.5, "1110"), _point(0.6, "0110")) for _ in range(2)]
    once, twice = compared(pairs[:1]), compared(pairs)
    assert (once["low"], once["delta"], once["high"]) == (twice["low"], twice["delta"], twice["high"])
    assert twice["n"] == 4
    assert twice["by_seed"] == [0.25, 0.25]


@pytest.mark.parametrize("cost", [0.39, 0.81])
def test_no_drawing_costs_less_than_the_least_or_more_than_the_most(cost: float) -> None:
    assert mixture([_point(0.4, "01"), _point(0.8, "11")], cost) is None
