"""A world with fake servers and routers, for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from upstreams import World


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()
