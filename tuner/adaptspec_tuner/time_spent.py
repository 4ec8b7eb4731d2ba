"""What tuning took, by part; kept with the run, so that continued runs add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from adaptspec_tuner.records import SPENT


class Records(Protocol):
    """As much of a store as this uses."""

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """A run's JSON record."""

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a run's JSON record."""


class Spending:
    """Seconds by part: one part at a time, written down when it ends.

    Args:
        started: When the first part, ``loading``, began.
    """

    def __init__(
        self, store: Records, run: str, clock: Callable[[], float], started: float
    ) -> None:
        self._store, self._run, self._clock = store, run, clock
        earlier = (store.record(run, SPENT) or {}).get("parts")
        self.parts: dict[str, float] = {
            str(name): float(seconds)
            for name, seconds in (earlier if isinstance(earlier, dict) else {}).items()
            if isinstance(seconds, int | float)  # not where it was damaged
        }
        self._part, self._since = "loading", started

    @property
    def seconds(self) -> float:
        """All of it, earlier runs included, the current part not."""
        return sum(self.parts.values())

    def begin(self, part: str) -> None:
        """End the current part and begin another."""
        now = self._clock()
        taken = now - self._since
        self.parts[self._part] = self.parts.get(self._part, 0.0) + taken
        self._part, self._since = part, now
        value = {"seconds": self.seconds, "parts": dict(self.parts)}
        self._store.put_record(self._run, SPENT, value)

    def end(self) -> None:
        """End the current part; nothing counts until another begins."""
        self.begin("")
        self.parts.pop("", None)
