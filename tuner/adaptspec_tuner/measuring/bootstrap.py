"""Bootstrap intervals of ratios paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

LEVEL = 0.95
RESAMPLES = 4000


def overall(ratios: Sequence[Sequence[float]]) -> float:
    """The geometric mean over prompts of the median over repeats.

    Args:
        ratios: ``[prompts][repeats]``, positive, a repeat each at least.
    """
    return math.exp(sum(math.log(median(repeats)) for repeats in ratios) / len(ratios))


def interval(ratios: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of :func:`overall`.

    Prompts are drawn with replacement, and of each drawn prompt its repeats (Efron and
    Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13): both what prompts
    differ by and what the machine's noise adds counts. The same for the same seed and
    ratios, whatever their order. Of one prompt nothing is known: 0 to infinity.

    Args:
        ratios: As for :func:`overall`; prompts may have different numbers of repeats.
    """
    if len(ratios) < 2:
        return 0.0, math.inf
    import numpy as np

    ordered = sorted(sorted(repeats) for repeats in ratios)
    counts = np.array([len(repeats) for repeats in ordered])
    most = int(counts.max())
    table = np.zeros((len(ordered), most))
    for row, repeats in enumerate(ordered):
        table[row, : len(repeats)] = np.log(repeats)
    random = np.random.default_rng(seed)
    prompts = random.integers(len(ordered), size=(RESAMPLES, len(ordered)))
    places = random.random((RESAMPLES, len(ordered), most)) * counts[prompts, None]
    drawn = table[prompts[:, :, None], places.astype(int)]
    means = np.median(drawn, axis=2).mean(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
    return float(low), float(high)
