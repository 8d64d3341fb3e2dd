"""docs/results.md says what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest
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
