"""Charts are whole SVG, with all points inside and names as text."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.charts import HEIGHT, WIDTH, Series, chart, key, marks

HOSTILE = "</svg><script>x</script> & \"quoted\" 'too'"
values = st.floats(-1e6, 1e6, allow_subnormal=False)
points = st.lists(st.tuples(values, values), min_size=1, max_size=6)


def parsed(html: str) -> Any:
    return ElementTree.fromstring(f"<div>{html}</div>")


@given(st.lists(points, min_size=1, max_size=3), st.booleans(), st.none() | values)
def test_every_point_is_inside_the_axes(
    drawn: list[list[tuple[float, float]]], from_zero: bool, level: float | None
) -> None:
    series = [Series(str(number), number, found) for number, found in enumerate(drawn)]
    page = parsed(
        chart(series, "across", "up", title="t", from_zero=from_zero, level=level)
    )
    places = [(float(u.get("x")), float(u.get("y"))) for u in page.iter("use")]
    of_keys = len(series)
    assert len(places) == sum(map(len, drawn)) + of_keys
    for x, y in places[: len(places) - of_keys]:
        assert 40 <= x <= WIDTH - 5
        assert 5 <= y <= HEIGHT - 35


def test_names_and_notes_stay_text() -> None:
    series = Series(HOSTILE, 0, [(1, 2)], [HOSTILE])
    page = parsed(chart([series], HOSTILE, HOSTILE, title=HOSTILE))
    assert not list(page.iter("script"))
    assert [title.text for title in page.iter("title")] == [HOSTILE]
    assert next(page.iter("svg")).get("aria-label") == HOSTILE
    (item,) = page.iter("li")
    assert "".join(item.itertext()) == HOSTILE


def test_marks_are_those_that_the_page_holds() -> None:
    held = {shape.get("id") for shape in parsed(marks()).iter("path")}
    series = [Series(str(n), n, [(1, 1)], crossed=frozenset({0})) for n in range(9)]
    shown = chart(series, "", "", title="") + key(None)
    used = {use.get("href")[1:] for use in parsed(shown).iter("use")}
    assert used == held


def test_nothing_is_drawn_of_nothing() -> None:
    assert chart([Series("a", 0, [])], "across", "up", title="t") == ""


@pytest.mark.parametrize(("high", "labels"), [(4, "1 2 3 4"), (40, "0 10 20 30 40")])
def test_whole_numbers_have_whole_marks(high: int, labels: str) -> None:
    page = parsed(chart([Series("a", 0, [(1, 1), (high, 1)])], "x", "y", title="t"))
    texts = [t.text for t in page.iter("text") if t.get("text-anchor") == "middle"]
    assert texts[: len(labels.split())] == labels.split()
