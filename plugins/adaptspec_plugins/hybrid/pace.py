"""How many tokens a step emits, and what a step costs, lately."""

from __future__ import annotations


class Pace:
    """Tokens per second of a sequence's steps, which begins with earlier ones'.

    Args:
        tokens: In the time of a step without drafts, to begin with.
        steps: As if seen in so many.
        kept: Steps it remembers. That of all sequences remembers many, so that the last
            answer, perhaps of another kind, isn't the measure of the next.
        longest: A step counts as so many plain ones at most: pauses and first calls.
    """

    def __init__(
        self,
        tokens: float = 1.0,
        steps: float = 0.0,
        kept: float = 1000.0,
        longest: float = 6.0,
    ) -> None:
        self.tokens = tokens
        self._steps, self._kept, self._longest = steps, kept, longest

    def add(self, tokens: float, plain_steps: float) -> None:
        """A step emitted ``tokens`` in the time of ``plain_steps``."""
        passed = min(plain_steps, self._longest)
        self._steps = min(self._steps, self._kept) + passed
        self.tokens += (tokens - self.tokens * passed) / max(self._steps, 1.0)

    def fresh(self, begins_with: float = 4.0, kept: float = 40.0) -> Pace:
        """A new sequence's.

        Args:
            begins_with: Steps of this pace that count in it.
            kept: Steps it remembers.
        """
        return Pace(self.tokens, min(self._steps, begins_with), kept)
