"""How many processors a program of threads may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


def usable_cores(topology: Path = TOPOLOGY, cgroup: Path = CGROUP) -> int:
    """Physical cores that this process may run on, as far as its quota goes.

    Two threads of one core share its arithmetic, which is what decoding waits for.

    Args:
        topology: Linux's folder of what it knows of each processor.
        cgroup: Where the control group of the process is mounted.
    """
    return _within(_quota(cgroup), _cores_of(_allowed(), topology))


def usable_processors(cgroup: Path = CGROUP) -> int:
    """Processors that this process may run on, those that share a core counted each."""
    return _within(_quota(cgroup), len(_allowed()))


def _within(quota: float | None, count: int) -> int:
    return max(1, count if quota is None else min(count, int(quota)))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores_of(processors: set[int], topology: Path) -> int:
    try:
        return len(
            {
                (topology / f"cpu{n}" / "topology" / "thread_siblings_list").read_text()
                for n in processors
            }
        )
    except OSError:
        import psutil  # type: ignore[import-untyped]

        return min(len(processors), psutil.cpu_count(logical=False) or len(processors))


def _quota(cgroup: Path) -> float | None:
    """Processors' time that the control group has; None: no limit, or not told."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        return None if int(limit) < 0 else int(limit) / int(period)
    return None
