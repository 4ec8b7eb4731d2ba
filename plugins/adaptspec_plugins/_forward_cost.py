"""What a verification of so many rows costs now: a measured curve, corrected by use."""

from __future__ import annotations

import bisect
import functools
from collections import deque
from collections.abc import Callable
from math import exp, log
from statistics import median

# Steps whose median says how far forwards are from the measured curve: context, load.
RECENT = 9
# Rows whose error of the curve is learnt; between two of them it is a line. With matrix
# units the next step of the curve begins at 17.
KNOTS = (1, 2, 4, 8, 16, 17, 24, 32, 64)
# What the curve counts for at a knot, in forwards; the least weight of a later one.
CURVE_SEEN, LEAST_WEIGHT = 4.0, 1 / 128
# Most that one forward is taken to differ from what was expected, as a logarithm.
SURPRISE = 0.3
# Of one row's time: how much less than the curve says sixteen rows and more may cost,
# fewer in proportion, while that is only measured and not seen in use: of a curve too
# steep by chance, large sizes would never be tried. What is seen of one size bounds
# what smaller ones may be hoped to cost.
HOPE, HOPED = 0.15, 16


class ForwardCost:
    """Seconds of a verification of so many rows.

    How fast the machine is now is one factor for all sizes, the median over the last
    forwards. What is left is the curve's own error; a curve is measured in seconds,
    and on a shared machine 16 rows may seem to take 1.0 or 1.4 times what one takes.

    Args:
        curve: Seconds by rows, non-decreasing.
    """

    def __init__(self, curve: Callable[[int], float]) -> None:
        self._curve = functools.cache(curve)
        self._near = functools.cache(_near)
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._scale = 1.0
        self._errors = [0.0] * len(KNOTS)
        self._seen = [0.0] * len(KNOTS)
        self._known: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        """Expected seconds, hopeful where it is little known."""
        known = self._known.get(rows)
        if known is None:
            near = self._near(rows)
            seen = sum(share * max(self._seen[at:]) for at, share in near)
            hope = HOPE * min(1.0, (rows - 1) / (HOPED - 1))
            one, known = self._expected(1), self._expected(rows)
            hoped = known - hope * one / (1.0 + seen / CURVE_SEEN)
            known = self._known[rows] = max(hoped, min(known, one)) * self._scale
        return known

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` took ``seconds``."""
        ratio = max(seconds, 1e-9) / self._expected(rows)
        self._ratios.append(ratio)
        self._scale = median(self._ratios)
        surprise = min(max(log(ratio / self._scale), -SURPRISE), SURPRISE)
        for at, share in self._near(rows):
            self._seen[at] += share
            weight = max(1 / (CURVE_SEEN + self._seen[at]), LEAST_WEIGHT)
            self._errors[at] += share * weight * surprise
        self._known.clear()

    def _expected(self, rows: int) -> float:
        error = sum(share * self._errors[at] for at, share in self._near(rows))
        return self._curve(rows) * exp(error)


def _near(rows: int) -> tuple[tuple[int, float], ...]:
    """The knots around and their shares."""
    high = bisect.bisect_left(KNOTS, rows)
    if high == len(KNOTS):
        return ((high - 1, 1.0),)
    if KNOTS[high] == rows or high == 0:
        return ((high, 1.0),)
    share = (rows - KNOTS[high - 1]) / (KNOTS[high] - KNOTS[high - 1])
    return ((high - 1, 1.0 - share), (high, share))
