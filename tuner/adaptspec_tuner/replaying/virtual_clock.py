"""A clock that runs on the measured costs of forward passes."""

from __future__ import annotations

from time import perf_counter


class VirtualClock:
    """Real time, but for what stands in for forwards."""

    def __init__(self) -> None:
        self._offset = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return perf_counter() + self._offset

    def replace(self, started: float, seconds: float) -> None:
        """Let the time since ``started`` (real) count as ``seconds``."""
        self._offset += seconds - (perf_counter() - started)
