"""How many tokens a step emits, and what a step costs, lately."""

from __future__ import annotations

# Weight of a new observation in running means.
NEW = 1 / 16


# Averaging windows in steps: of one sequence; of all sequences, long, so that one
# answer doesn't decide the next one's pace; and the weight of the pace of all at the
# start of a sequence.
STEPS_KEPT, STEPS_OF_ALL, STEPS_BEFORE = 40, 1000, 4


class Mean:
    """A mean that follows: of all observations at first, then a running one.

    Args:
        value: What it begins with.
        count: As of so many observations.
    """

    def __init__(self, value: float = 0.0, count: int = 0) -> None:
        self.value = value
        self.count = count

    def add(self, value: float) -> None:
        """Take in one observation."""
        self.count += 1
        self.value += (value - self.value) * max(NEW, 1 / self.count)

    def add_seconds(self, value: float) -> None:
        """Take in a duration; a stray pause counts as four times the mean at most."""
        self.add(min(value, 4 * self.value) if self.count >= 3 else value)


class Pace:
    """Tokens per second of a sequence's steps, which begins with earlier ones'.

    Args:
        tokens: In the time of a step without drafts, to begin with.
        steps: As if seen in so many.
        kept: Steps it remembers.
    """

    def __init__(
        self, tokens: float = 1.0, steps: float = 0.0, kept: float = STEPS_OF_ALL
    ) -> None:
        self.tokens = tokens
        self._steps, self._kept = steps, kept

    def add(self, tokens: float, plain_steps: float) -> None:
        """A step emitted ``tokens`` in the time of ``plain_steps``."""
        self._steps = min(self._steps, self._kept) + plain_steps
        self.tokens += (tokens - self.tokens * plain_steps) / max(self._steps, 1.0)

    def fresh(self) -> Pace:
        """A new sequence's."""
        return Pace(self.tokens, min(self._steps, STEPS_BEFORE), STEPS_KEPT)
