"""A running mean: of all observations at first, then mostly of the last ones."""

from __future__ import annotations


class RunningMean:
    """A mean of all observations at first, then of the last ones.

    Args:
        value: What it begins with.
        count: As of so many observations.
        newest: Least weight of a new observation.
    """

    def __init__(
        self, value: float = 0.0, count: int = 0, newest: float = 1 / 16
    ) -> None:
        self.value = value
        self.count = count
        self._newest = newest

    def add(self, value: float) -> None:
        """Take in one observation."""
        self.count += 1
        self.value += (value - self.value) * max(self._newest, 1 / self.count)

    def add_seconds(self, value: float) -> None:
        """Take in a duration; a pause counts as four times the mean at most."""
        self.add(min(value, 4 * self.value) if self.count >= 3 else value)
