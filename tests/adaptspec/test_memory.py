"""How much memory may still be taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.memory import usable_memory

AVAILABLE = 1000
V1 = "4:cpu,memory:/job\n1:cpu:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "usable"),
    [
        ("", {}, 1000),
        ("0::/\n", {}, 1000),
        ("0::/\n", {"memory.max": "max", "memory.current": "700"}, 1000),
        ("0::/\n", {"memory.max": "900"}, 1000),
        ("0::/\n", {"memory.max": "900", "memory.current": "700"}, 200),
        ("0::/\n", {"memory.max": "9000", "memory.current": "700"}, 1000),
        ("0::/\n", {"memory.max": "500", "memory.current": "700"}, 0),
        # Cached files make room, of programs' memory nothing does.
        (
            "0::/\n",
            {
                "memory.max": "900",
                "memory.current": "700",
                "memory.stat": "anon 300\nactive_file 100\ninactive_file 50",
            },
            350,
        ),
        # The least of the group's and of those that it is in.
        (
            "0::/slice/job\n",
            {
                "slice/job/memory.max": "900",
                "slice/job/memory.current": "300",
                "slice/memory.max": "800",
                "slice/memory.current": "400",
            },
            400,
        ),
        # A container's own group is the root, whatever the host calls it.
        ("0::/host/name\n", {"memory.max": "900", "memory.current": "700"}, 200),
        ("0::/../other\n", {"memory.max": "900", "memory.current": "700"}, 200),
        (
            V1,
            {
                "memory/job/memory.limit_in_bytes": "900",
                "memory/job/memory.usage_in_bytes": "700",
                "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 80",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "5000",
            },
            280,
        ),
        # Another controller's group limits nothing.
        (
            "1:cpu:/job\n",
            {
                "memory/memory.limit_in_bytes": "1",
                "memory/memory.usage_in_bytes": "0",
            },
            1000,
        ),
    ],
)
def test_memory_is_what_the_machine_has_and_groups_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    usable: int,
) -> None:
    machine = SimpleNamespace(available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "groups").write_text(groups)
    assert usable_memory(tmp_path / "cgroup", tmp_path / "groups") == usable


def test_without_control_groups_the_machine_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SimpleNamespace(available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert usable_memory(tmp_path, tmp_path / "none") == AVAILABLE
