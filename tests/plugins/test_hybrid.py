"""The hybrid against brute force, simulated drafters and a clock of our own."""

from __future__ import annotations

import itertools

import pytest

from adaptspec.testing import StrategyContract
from adaptspec_plugins.hybrid import Hybrid


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it a millisecond on: runs repeat exactly."""
    ticks = itertools.count()
    for module in ("engine", "latency"):
        monkeypatch.setattr(
            f"adaptspec.decoding.{module}.perf_counter", lambda: next(ticks) / 1e3
        )


class TestHybrid(StrategyContract):
    strategy = Hybrid
    params = ({}, {"use_draft": False, "max_nodes": 6})
