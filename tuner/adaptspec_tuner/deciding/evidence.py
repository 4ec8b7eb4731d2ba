"""Mean, spread and covariance of log ratios, for each setting in each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from adaptspec_tuner.deciding.spread import moderated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Class -> setting key -> prompt id -> ratio to plain decoding per repeat.
Ratios = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

# A generation that ended at once has speed 0, of which there is no logarithm.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What a tune measured, as a vector of group means in logarithms.

    Args:
        groups: ``(class, setting key)`` of each.
        prompts: ``[groups]``.
        mean: ``[groups]``, over the prompts.
        spread: ``[groups]``, standard deviation between prompts; NaN where nothing is
            known of it.
        freedom: ``[groups]``, degrees of freedom of that.
        common: Degrees of freedom of the distribution that the spreads come from.
        covariance: ``[groups, groups]`` of the means around the truth: settings that
            were measured on the same prompts go up and down together.
    """

    groups: Sequence[tuple[str, str]]
    prompts: NDArray[np.int64]
    mean: Floats
    spread: Floats
    freedom: Floats
    common: float
    covariance: Floats

    @property
    def error(self) -> Floats:
        """Standard error of each mean, ``[groups]``."""
        return np.sqrt(np.diag(self.covariance))


def gathered(ratios: Ratios) -> Evidence:
    """The groups of ``ratios`` that have a prompt.

    A prompt counts by the mean over its repeats, in logarithms.
    """
    values = {
        (name, key): {
            prompt: float(np.mean(np.log(np.maximum(repeats, SMALLEST))))
            for prompt, repeats in prompts.items()
            if len(repeats)
        }
        for name, settings in ratios.items()
        for key, prompts in settings.items()
    }
    values = {group: found for group, found in values.items() if found}
    groups = list(values)
    count = np.array([len(found) for found in values.values()], dtype=np.int64)
    mean = np.array([np.mean(list(found.values())) for found in values.values()])
    rest = [
        {prompt: value - mean[index] for prompt, value in found.items()}
        for index, found in enumerate(values.values())
    ]
    freedom = np.maximum(count - 1.0, 0.0)
    squares = np.array([sum(x * x for x in found.values()) for found in rest])
    own = squares / np.maximum(freedom, 1.0)
    pairs = [
        (a, b)
        for a in range(len(groups))
        for b in range(a)
        if groups[a][0] == groups[b][0]
    ]
    alike = _correlation(rest, pairs)
    if (freedom > 0).any():
        beside = np.ones(len(groups))
        for pair in pairs:
            beside[list(pair)] += alike**2
        spreads = moderated(own, freedom, 1 / beside)
        variance, freedom, common = spreads.variance, spreads.freedom, spreads.common
    else:
        variance, common = np.full(len(groups), np.nan), np.inf
    covariance = np.diag(variance / np.maximum(count, 1))
    for a, b in pairs:
        shared = len(rest[a].keys() & rest[b].keys()) / (count[a] * count[b])
        # Of two unlike spreads the smaller: were the larger one in it, a setting would
        # be taken for as far off as its prompts spread more than the other's, and both
        # be estimated outside of what was measured of either (Lyons, Gibaut and
        # Clifford, "How to combine correlated estimates", 1988).
        covariance[a, b] = covariance[b, a] = (
            alike * shared * min(variance[a], variance[b])
        )
    return Evidence(groups, count, mean, np.sqrt(variance), freedom, common, covariance)


def _correlation(
    rest: Sequence[Mapping[str, float]], pairs: Sequence[tuple[int, int]]
) -> float:
    """Of two settings over the prompts of a class: one number for the tune."""
    product = power = 0.0
    for a, b in pairs:
        for prompt in rest[a].keys() & rest[b].keys():
            product += rest[a][prompt] * rest[b][prompt]
            power += (rest[a][prompt] ** 2 + rest[b][prompt] ** 2) / 2
    return min(0.95, max(0.0, product / power)) if power else 0.0


def quantile(level: float, freedom: Floats) -> Floats:
    """Of the t distribution, in standard errors."""
    return np.asarray(stats.t.ppf(level, np.maximum(freedom, 1e-3)))
