"""How many threads a server gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adaptspec_plugins.engines.llama_cpp.processors import (
    usable_cores,
    usable_processors,
)


def topology(folder: Path, siblings: dict[int, str]) -> Path:
    for number, text in siblings.items():
        place = folder / f"cpu{number}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(text + "\n")
    return folder


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each, of which 0, 1, 4 and 6 may be used: three."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 6}, raising=False)
    pairs = {n: f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(8)}
    return topology(tmp_path / "cpus", pairs)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 3),
        ({"cpu.max": "max 100000"}, 3),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "900000 100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_cores_count_once_and_a_quota_limits_them(
    known: Path, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_cores(known, tmp_path / "cgroup") == cores
    # The fourth processor shares a core with another.
    assert usable_processors(tmp_path / "cgroup") in (cores, 4 if cores == 3 else cores)


def test_without_a_topology_processors_are_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 1
