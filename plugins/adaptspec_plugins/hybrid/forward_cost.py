"""What a verification of so many rows costs now: a measured curve, corrected by use."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable
from math import exp, isfinite, log, sqrt

# Rows whose error of the curve is learnt; between two of them it is a line. With matrix
# units the next step of the curve begins at 17.
KNOTS = (1, 2, 4, 8, 16, 17, 24, 32, 64, 128)
# How far the curve may be wrong, as variances of logarithms: what a knot's error may
# differ from that of the one before. One row's counts as the machine's mood.
SPREADS = (0.0, *4 * (0.06**2,), 0.12**2, *2 * (0.04**2,), *2 * (0.06**2,))
# As variances of logarithms: of the mood before the first forward, of its change from
# one to the next, of one forward's noise at least.
MOOD, DRIFT, NOISE = 0.5**2, 0.03**2, 0.07**2
# The weight of one more forward in what the noise is taken to be.
NEW = 1 / 50
# What is known of an error is kept so from one forward to the next.
KEPT = 0.999
# In standard deviations: a surprise counts as so many at most; one beyond the second is
# a pause that teaches nothing, unless the next forward of that size is another.
SURPRISE, STRAY = 2.5, 4.0
# Two outliers in a row correct the curve if their size was verified less often than
# SELDOM, or if other sizes came as expected in between, and if they are off by at most
# MOST_ERROR. Otherwise they mean that the machine's speed has changed.
SELDOM, MOST_ERROR = 4.0, log(4.5)
# Optimism bonus for sizes not yet seen in use, as a share of one row's time: HOPE from
# HOPED rows on, fewer rows in proportion. Without it, large sizes would never be tried
# if the measured curve were too steep by chance. It halves after HALVED forwards of
# the size. What was seen of one size also bounds the bonus of smaller ones.
HOPE, HOPED, HALVED = 0.15, 16, 4.0


class ForwardCost:
    """Seconds of a verification of so many rows.

    A forward's time is the curve's, times a mood that drifts and is the same for all
    sizes, times the curve's own error at that size; a curve is measured in seconds, and
    on a shared machine 16 rows may seem to take 1.0 or 1.4 times what one takes. Both
    are followed by a Kalman filter over their logarithms: the update goes to the more
    uncertain component, which is the curve's error at a size seldom seen before.

    Args:
        curve: Seconds by rows, non-decreasing.
    """

    def __init__(self, curve: Callable[[int], float]) -> None:
        self._curve = functools.cache(curve)
        self._near = functools.cache(_near)
        sums = [sum(SPREADS[: at + 1]) for at in range(len(KNOTS))]
        # Mood first, then errors: those of two knots share what the smaller one's is.
        self._prior = [
            [sums[min(one, other)] for other in range(len(KNOTS))]
            for one in range(len(KNOTS))
        ]
        self._covariance = [
            [MOOD, *[0.0] * len(KNOTS)],
            *([0.0, *row] for row in self._prior),
        ]
        self._mean = [0.0] * (1 + len(KNOTS))
        self._noise = NOISE
        self._strays: dict[int, float] = {}  # by knot, since a usual forward there
        self._usual = 0  # usual forwards since the last stray
        self._seen = [0.0] * len(KNOTS)
        self._known: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        """Expected seconds, hopeful where it is little known."""
        known = self._known.get(rows)
        if known is None:
            seen = sum(share * max(self._seen[at:]) for at, share in self._near(rows))
            hope = HOPE * min(1.0, (rows - 1) / (HOPED - 1))
            one, known = self._expected(1), self._expected(rows)
            hoped = known - hope * one / (1.0 + seen / HALVED)
            known = self._known[rows] = max(hoped, min(known, one))
        return known

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` took ``seconds``. No time or no end teaches nothing."""
        if not (isfinite(seconds) and seconds > 0):
            return
        near = self._near(rows)
        self._age()
        surprise = log(seconds / self._expected(rows))
        towards = self._towards(near)
        uncertain = _at(towards, near)
        variance = uncertain + self._noise
        seen = min(surprise**2, SURPRISE**2 * variance) - uncertain
        self._noise = max(NOISE, self._noise + NEW * (seen - self._noise))
        knot = max(near, key=lambda pair: pair[1])[0]
        if abs(surprise) > STRAY * sqrt(variance):
            again = surprise * self._strays.get(knot, 0.0) > 0
            self._strays[knot] = surprise
            usual, self._usual = self._usual, 0
            if not again:
                return
            # An error is shared by larger sizes.
            own = (usual > 0 or self._seen[knot] < SELDOM) and knot > 0
            if own and abs(surprise) < MOST_ERROR:
                unsure = range(1 + near[0][0], len(self._mean))
            else:
                unsure = range(1)  # the mood
            for one, other in itertools.product(unsure, repeat=2):
                self._covariance[one][other] += surprise**2
            towards = self._towards(near)
            variance = _at(towards, near) + self._noise
        else:
            self._usual += 1
        self._strays.pop(knot, None)
        most = SURPRISE * sqrt(variance)
        surprise = min(max(surprise, -most), most)
        for one, share in enumerate(towards):
            self._mean[one] += share * surprise / variance
            row = self._covariance[one]
            for other, more in enumerate(towards):
                row[other] -= share * more / variance
        for at, share in near:
            self._seen[at] += share
        self._known.clear()

    def _age(self) -> None:
        """One forward later the mood has drifted and errors are somewhat less known.

        The variance returns to the prior; the mean does not. If the mean returned too,
        the error of the only size verified would slowly be taken for the mood.
        """
        for at, row in enumerate(self._covariance[1:]):
            row[0] *= KEPT
            self._covariance[0][1 + at] *= KEPT
            for other, prior in enumerate(self._prior[at], 1):
                row[other] = KEPT**2 * row[other] + (1 - KEPT**2) * prior
        self._covariance[0][0] += DRIFT

    def _towards(self, near: tuple[tuple[int, float], ...]) -> list[float]:
        """The covariance of all that is followed with what was just seen."""
        return [
            row[0] + sum(share * row[1 + at] for at, share in near)
            for row in self._covariance
        ]

    def _expected(self, rows: int) -> float:
        return self._curve(rows) * exp(_at(self._mean, self._near(rows)))


def _at(values: list[float], near: tuple[tuple[int, float], ...]) -> float:
    """The machine's component plus the size's, interpolated between knots."""
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
