"""The commonest tokens of late."""

from __future__ import annotations

from collections.abc import Iterable

# A token counts this much less for each later one: half after 1400.
KEPT = 0.9995
LARGEST = 1e100


class Commonest:
    """The ``width`` tokens counted most, late ones weighing more; commonest first.

    A token takes about a microsecond. Memory is bounded by the vocabulary.
    """

    def __init__(self, width: int) -> None:
        self.tokens: list[int] = []
        self._width = width
        self._weights: dict[int, float] = {}
        self._one = 1.0  # what a token weighs now; grows in place of all else fading

    def count(self, tokens: Iterable[int]) -> None:
        """Take in ``tokens``, in the order of the text."""
        for token in tokens:
            self._one /= KEPT
            self._weights[token] = self._weights.get(token, 0.0) + self._one
            self._raise(token)
        if self._one > LARGEST:
            self._weights = {t: w / self._one for t, w in self._weights.items()}
            self._one = 1.0

    def _raise(self, token: int) -> None:
        best, weights = self.tokens, self._weights
        if token in best:
            at = best.index(token)
        elif len(best) < self._width:
            at = len(best)
            best.append(token)
        elif best and weights[token] > weights[best[-1]]:
            at = len(best) - 1
            best[at] = token
        else:
            return
        while at and weights[best[at - 1]] < weights[token]:
            best[at - 1], best[at] = best[at], best[at - 1]
            at -= 1
