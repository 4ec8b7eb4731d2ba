"""Estimates the spread between a class's prompts where few were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spreads:
    """Variances of log ratios between the prompts of each group.

    A group is one setting in one class.

    Args:
        variance: ``[groups]``, each drawn toward what the groups have in common.
        freedom: ``[groups]``, degrees of freedom of the t distribution to be used.
        common: Degrees of freedom of the part that all groups have in common: infinite
            where they may have one variance.
    """

    variance: Floats
    freedom: Floats
    common: float


def moderated(variance: Floats, freedom: Floats, weight: Floats) -> Spreads:
    """Moderated variances of groups, those with few prompts borrowing from the others.

    Variances of groups are taken as drawn from a scaled inverse chi-square whose scale
    and degrees of freedom are the most likely ones (Smyth, "Linear models and empirical
    Bayes methods for assessing differential expression", 2004, section 6.2; as in
    limma, no group gets more degrees of freedom than all have together).

    Args:
        variance: ``[groups]``, of each group's own prompts.
        freedom: ``[groups]``, prompts - 1.
        weight: ``[groups]``, below 1 where groups tell the same: settings measured on
            the same prompts.

    Raises:
        ValueError: if no group has two prompts.
    """
    told = freedom > 0
    if not told.any():
        raise ValueError("a spread takes two prompts of some class")
    pooled = float((freedom * variance).sum() / freedom.sum())
    # Equal ratios on all prompts have no spread; one still can't be sure of them.
    pooled = max(pooled, 1e-6)
    own = np.where(told, np.maximum(variance, 1e-6 * pooled), pooled)
    together = max(1.0, float((freedom * weight).sum()))
    scales = pooled * np.exp(np.linspace(-1.5, 0.5, 21))
    degrees = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
    ratio, of = own[told] / scales[:, None], freedom[told]
    likely = _log_f(ratio, of, degrees[:, None, None]) - np.log(scales)[:, None]
    total = likely @ weight[told] + np.log([0.5, 0.7, 0.9, 1.0, 1.0])[:, None]
    # One variance for all: the pooled one is then the most likely.
    one = _log_chi2(own[told] / pooled, of) - np.log(pooled)
    if one @ weight[told] >= total.max():
        return Spreads(np.full_like(own, pooled), np.full_like(own, together), np.inf)
    best, at = np.unravel_index(int(np.argmax(total)), total.shape)
    common = float(degrees[best])
    shared = (common * scales[at] + freedom * own) / (common + freedom)
    return Spreads(shared, np.minimum(common + freedom, together), common)


def _log_f(ratio: Floats, one: Floats, other: Floats) -> Floats:
    """Logarithm of the density of an F distribution with ``one`` and ``other`` degrees
    of freedom."""
    return np.asarray(
        (other * np.log(other) + one * np.log(one)) / 2
        + (one / 2 - 1) * np.log(ratio)
        - (one + other) / 2 * np.log(other + one * ratio)
        - special.betaln(one / 2, other / 2)
    )


def _log_chi2(ratio: Floats, freedom: Floats) -> Floats:
    """The same of a chi-square by its degrees of freedom: an F distribution's limit."""
    half = freedom / 2
    return np.asarray(
        half * np.log(half)
        - special.gammaln(half)
        + (half - 1) * np.log(ratio)
        - half * ratio
    )
