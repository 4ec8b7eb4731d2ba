"""Most frequent recent tokens, by counts that decay exponentially."""

from __future__ import annotations

from collections.abc import Sequence

# Factor on a token's count for each later token: its weight halves after 1400.
KEPT = 0.9995
LARGEST = 1e100


class Commonest:
    """The ``width`` most frequent tokens, most frequent first; recent ones weigh more.

    Memory is bounded by the vocabulary.
    """

    def __init__(self, width: int) -> None:
        self.tokens: list[int] = []
        self._width = width
        self._weights: dict[int, float] = {}
        self._one = 1.0  # weight of a new token; grows while others stay

    def count(self, tokens: Sequence[int]) -> None:
        """Take in ``tokens``, in the order of the text."""
        for token in tokens:
            self._one /= KEPT
            self._weights[token] = self._weights.get(token, 0.0) + self._one
        # All others fade alike, so none of them comes in.
        candidates = dict.fromkeys([*self.tokens, *tokens])
        ranked = sorted(candidates, key=self._weights.__getitem__, reverse=True)
        self.tokens = ranked[: self._width]
        if self._one > LARGEST:
            self._weights = {t: w / self._one for t, w in self._weights.items()}
            self._one = 1.0
