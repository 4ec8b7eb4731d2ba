"""What a verification of so many rows costs now: a measured curve, corrected by use."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import exp, isfinite, log, sqrt

# Sizes whose error of the curve is learnt, and how far it may be from that of the one
# before, as a standard deviation of logarithms; between two of them it is a line. With
# matrix units the next step of the curve begins at 17.
KNOTS = (1, 2, 4, 8, 16, 17, 24, 32, 64, 128)
SPREADS = (0.0, 0.06, 0.06, 0.06, 0.06, 0.12, 0.04, 0.04, 0.06, 0.06)


class ForwardCost:
    """Seconds of a verification of so many rows.

    A forward's time is the curve's, times a mood that drifts and is the same for all
    sizes, times the curve's own error at that size; a curve is measured in seconds, and
    on a shared machine 16 rows may seem to take 1.0 or 1.4 times what one takes. Both
    are followed by a Kalman filter over their logarithms: a surprise is put down to
    what was less certain, in a size seldom seen before to the curve. All deviations are
    standard deviations of logarithms.

    Args:
        curve: Seconds by rows, non-decreasing.
        mood: Deviation of the machine's mood before the first forward.
        drift: Of its change from one forward to the next.
        noise: Of one forward's time.
        kept: What is known of an error is kept so from one forward to the next.
        most: A surprise counts as so many deviations at most, and a lasting change is
            followed within some forwards.
    """

    def __init__(
        self,
        curve: Callable[[int], float],
        mood: float = 0.5,
        drift: float = 0.03,
        noise: float = 0.07,
        kept: float = 0.999,
        most: float = 2.5,
    ) -> None:
        self._curve = functools.cache(curve)
        self._near = functools.cache(_near)
        self._drift, self._noise = drift**2, noise**2
        self._kept, self._most = kept, most
        sums = list(accumulate(spread**2 for spread in SPREADS))
        # Mood first, then errors: those of two knots share what the smaller one's is.
        self._prior = [[min(one, other) for other in sums] for one in sums]
        self._covariance = [
            [mood**2, *[0.0] * len(KNOTS)],
            *([0.0, *row] for row in self._prior),
        ]
        self._mean = [0.0] * (1 + len(KNOTS))
        self._known: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        """Expected seconds."""
        known = self._known.get(rows)
        if known is None:
            error = _at(self._mean, self._near(rows))
            known = self._known[rows] = self._curve(rows) * exp(error)
        return known

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` took ``seconds``. No time or no end teaches nothing."""
        if not (isfinite(seconds) and seconds > 0):
            return
        self._age()
        near = self._near(rows)
        towards = self._towards(near)
        variance = _at(towards, near) + self._noise
        surprise = log(seconds / self(rows))
        most = self._most * sqrt(variance)
        surprise = min(max(surprise, -most), most)
        for one, share in enumerate(towards):
            self._mean[one] += share * surprise / variance
            row = self._covariance[one]
            for other, more in enumerate(towards):
                row[other] -= share * more / variance
        self._known.clear()

    def _age(self) -> None:
        """One forward later the mood has drifted and errors are somewhat less known.

        The variance returns to the prior; the mean does not. If the mean returned too,
        the error of the only size verified would slowly be taken for the mood.
        """
        kept = self._kept
        for at, row in enumerate(self._covariance[1:]):
            row[0] *= kept
            self._covariance[0][1 + at] *= kept
            for other, prior in enumerate(self._prior[at], 1):
                row[other] = kept**2 * row[other] + (1 - kept**2) * prior
        self._covariance[0][0] += self._drift

    def _towards(self, near: Sequence[tuple[int, float]]) -> list[float]:
        """The covariance of all that is followed with what was just seen."""
        return [_at(row, near) for row in self._covariance]


def _at(values: Sequence[float], near: Sequence[tuple[int, float]]) -> float:
    """The mood's with a size's, of what is followed."""
    return values[0] + sum(share * values[1 + at] for at, share in near)


def _near(rows: int) -> tuple[tuple[int, float], ...]:
    """The knots around and their shares."""
    high = bisect.bisect_left(KNOTS, rows)
    if high == len(KNOTS):
        return ((high - 1, 1.0),)
    if KNOTS[high] == rows or high == 0:
        return ((high, 1.0),)
    share = (rows - KNOTS[high - 1]) / (KNOTS[high] - KNOTS[high - 1])
    return ((high - 1, 1.0 - share), (high, share))
