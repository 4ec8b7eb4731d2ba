"""Durations and sizes are read as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.cli.quantities import clock_time, duration, parse_memory
from adaptspec.errors import AdaptSpecError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("600", 600),
        ("90s", 90),
        ("10m", 600),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("2 h", 7200),
        (" 1h 5m 30s ", 3930),
        ("2 hours 1 minute", 7260),
        ("5 min", 300),
        ("1H", 3600),
        ("0.5", 0.5),
    ],
)
def test_a_time_means_what_it_looks_like(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_parts_add_up(hours: int, minutes: int, seconds: int) -> None:
    expected = 3600 * hours + 60 * minutes + seconds
    assert duration(f"{hours}h{minutes}m{seconds}s") == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "0m", "-1m", "soon", "h", "1h30", "30m1h", "1m1m", "1d"),
        *("1e3", "inf", "nan", "1.2.3s", "1,5h", "9" * 400),
    ],
)
def test_what_is_no_time_is_none(text: str) -> None:
    assert duration(text) is None


def test_a_time_is_shown_as_a_clock_shows_it() -> None:
    shown = {0.4: "0:00", 65: "1:05", 3599.6: "1:00:00", 5430: "1:30:30", -3: "0:00"}
    assert {seconds: clock_time(seconds) for seconds in shown} == shown


def test_memory_is_read_in_the_usual_units() -> None:
    sizes = {"6GiB": 6 * 2**30, "1.5G": 3 * 2**29, "800 MB": 800 * 2**20, "17": 17}
    assert {text: parse_memory(text) for text in sizes} == sizes
    for text in ("0", "much", "-1G", ""):
        with pytest.raises(AdaptSpecError, match="--max-memory must be"):
            parse_memory(text)
