"""Ranks the settings of a class's race, and tells which are so slow as to be dropped.

A race measures all candidates on the same prompts and drops one as soon as its paired
differences to the leader show it slower, so that time goes to close rivals (Maron and
Moore 1994; F-race, Birattari et al. 2002; irace's t-test, López-Ibáñez et al. 2016).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from adaptspec_tuner.measuring.profiler import Setting


class Standings:
    """What the settings of a class reached so far: log ratios to plain decoding.

    Args:
        spread: Standard deviation of the log of two settings' ratio from prompt to
            prompt, as expected before any was seen.
        strength: As many observations that expectation counts.
        level: How sure it must be that a setting is slower.
    """

    def __init__(
        self, *, spread: float = 0.15, strength: float = 3.0, level: float = 0.9
    ) -> None:
        self._spread, self._strength, self._level = spread, strength, level
        # setting key -> prompt id -> a log ratio per repeat
        self._logs: dict[str, dict[str, list[float]]] = {}
        self._dropped: set[str] = set()
        self._strategies: dict[str, str] = {}  # setting key -> strategy
        self._middles: dict[str, float] = {}  # strategy -> its median setting's mean

    def add(
        self,
        key: str,
        prompts: Sequence[str],
        ratios: Sequence[float],
        dropped: bool = False,
    ) -> None:
        """Take in what a setting reached, each ratio measured beside plain decoding."""
        found = self._logs.setdefault(key, {})
        self._strategies[key] = name = Setting.from_key(key).strategy
        self._middles.pop(name, None)
        for prompt, ratio in zip(prompts, ratios, strict=True):
            found.setdefault(prompt, []).append(math.log(ratio))
        if dropped:
            self.drop(key)

    def drop(self, key: str) -> None:
        """Leave a setting behind all others."""
        self._dropped.add(key)

    def __contains__(self, key: str) -> bool:
        """Whether anything is known of a setting."""
        return bool(self._logs.get(key))

    def logs(self) -> dict[str, dict[str, float]]:
        """Setting key -> prompt id -> mean log ratio, of what was measured."""
        return {key: self._means(key) for key, found in self._logs.items() if found}

    def repeats(self, key: str, prompt: str) -> int:
        """How often a setting was measured on a prompt."""
        return len(self._logs.get(key, {}).get(prompt, ()))

    def estimate(self, key: str, doubt: float = 1.0) -> float:
        """The ratio to expect of a setting: what it reached, less its likely luck.

        Of many settings of a strategy the best measured was lucky, too, and the more
        so the fewer prompts it saw. So it is drawn towards the strategy's median
        setting.

        Args:
            doubt: As many prompts that the median counts.
        """
        logs = self._means(key)
        middle = self._middle(self._strategies[key])
        return math.exp((sum(logs.values()) + doubt * middle) / (len(logs) + doubt))

    def _middle(self, strategy: str) -> float:
        if strategy not in self._middles:
            means = sorted(
                fmean(self._means(key).values())
                for key, name in self._strategies.items()
                if name == strategy and self._logs[key]
            )
            self._middles[strategy] = means[len(means) // 2]
        return self._middles[strategy]

    def ranked(self, keys: Iterable[str] | None = None) -> list[str]:
        """Setting keys, best first; those that were dropped behind all others."""
        known = [key for key in (self._logs if keys is None else keys) if key in self]
        return sorted(
            known, key=lambda key: (key in self._dropped, -self.estimate(key))
        )

    def rivals(self, most: int) -> list[str]:
        """The leader and those that may yet be faster, best first."""
        ranked = [key for key in self.ranked() if key not in self._dropped]
        return [
            key for key in ranked if key == ranked[0] or not self.behind(key, ranked[0])
        ][:most]

    def behind(self, key: str, leader: str) -> bool:
        """Whether the prompts that both saw show ``key`` slower than ``leader``."""
        ours, theirs = self._means(key), self._means(leader)
        return self.shown_slower([ours[p] - theirs[p] for p in ours if p in theirs])

    def slower_than(self, leader: str, ratios: Mapping[str, float]) -> bool:
        """The same of ratios by prompt id that aren't in here."""
        theirs = self._means(leader)
        return self.shown_slower(
            [
                math.log(ratio) - theirs[prompt]
                for prompt, ratio in ratios.items()
                if prompt in theirs
            ]
        )

    def shown_slower(self, differences: Sequence[float]) -> bool:
        """Whether paired log ratios, one a prompt, are below zero beyond chance.

        The upper end of a t interval, whose variance begins at what is expected: after
        one prompt there is none of one's own.
        """
        count = len(differences)
        if not count:
            return False
        centre = fmean(differences)
        squares = sum((value - centre) ** 2 for value in differences)
        freedom = self._strength + count - 1
        variance = (self._strength * self._spread**2 + squares) / freedom
        error = math.sqrt(variance / count)
        return centre + _quantile(self._level, freedom) * error < 0

    def _means(self, key: str) -> dict[str, float]:
        return {prompt: fmean(logs) for prompt, logs in self._logs[key].items()}


@functools.cache
def _quantile(level: float, freedom: float) -> float:
    """Of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf(level, freedom))
