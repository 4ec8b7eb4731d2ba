"""How much memory programs may still take: of the machine, and of control groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
# Limit, use, and what begins the names of the same file's counts: of versions 2 and 1.
FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def usable_memory(cgroup: Path = CGROUP, groups: Path = GROUPS) -> int:
    """Bytes that are available, as far as limits of control groups go.

    Files that are kept in memory make room for programs, so they count as available,
    of the machine as of a group.

    Args:
        cgroup: Where control groups are mounted.
        groups: Where those of this process are named.
    """
    import psutil  # type: ignore[import-untyped]

    left = [_left(folder) for folder in _folders(cgroup, groups)]
    known = [size for size in left if size is not None]
    return max(0, min([int(psutil.virtual_memory().available), *known]))


def _folders(cgroup: Path, groups: Path) -> Iterator[Path]:
    """Of the groups that count this process's memory, and of all that they are in."""
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = cgroup / "memory" if controllers else cgroup
            # In a container the path may be the host's; the root is its own group then.
            inner = root / path.lstrip("/")
            yield inner
            yield from (up for up in inner.parents if root in (up, *up.parents))


def _left(folder: Path) -> int | None:
    """Bytes that a group may still take; None: no limit, or not told."""
    for limit, usage, prefix in FILES:
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            return most - used + _cached(folder, prefix)
    return None


def _cached(folder: Path, prefix: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        told = dict(line.split() for line in lines)
        names = (f"{prefix}{kind}_file" for kind in ("active", "inactive"))
        return sum(int(told.get(name, 0)) for name in names)
    return 0
