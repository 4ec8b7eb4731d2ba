"""The strategy keeps the contract of all strategies, and drafts what it promises."""

from __future__ import annotations

import pytest
from adaptspec_echo.strategy import Echo, repeated

from adaptspec.host import Host
from adaptspec.testing import StrategyContract


class TestEcho(StrategyContract):
    """Lossless, deterministic, well-behaved in hostile contexts."""

    strategy = Echo
    params = ({}, {"period": 1, "draft_length": 16})


@pytest.mark.parametrize(
    ("ids", "piece"),
    [
        ([1, 2, 3], []),
        ([5, 5], [5]),
        ([9, 1, 2, 1, 2], [1, 2]),
        ([1, 2, 3, 1, 2, 3], []),  # longer than looked for
        ([1, 1, 2, 1, 1, 2, 2], [2]),
    ],
)
def test_the_shortest_piece_that_stands_twice_is_found(
    ids: list[int], piece: list[int]
) -> None:
    assert repeated(ids, longest=2) == piece


def test_it_is_found_by_its_entry_point() -> None:
    host = Host.installed()
    assert host.strategy("echo") is Echo
    assert host.origin("echo") == "echo"
