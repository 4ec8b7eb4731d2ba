"""How far prompts of a class lie from each other, where few of each were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

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
    best, scale, common = -np.inf, pooled, np.inf
    for tried, belief in ((2, 0.5), (4, 0.7), (8, 0.9), (16, 1), (32, 1), (np.inf, 1)):
        # Of one common variance the pooled one is the most likely.
        for at in [pooled] if tried == np.inf else scales:
            likely = _log_density(own[told] / at, freedom[told], tried) - np.log(at)
            total = float((weight[told] * likely).sum()) + np.log(belief)
            if total > best:
                best, scale, common = total, float(at), float(tried)
    if common == np.inf:
        shared = np.full_like(own, scale)
    else:
        shared = (common * scale + freedom * own) / (common + freedom)
    return Spreads(shared, np.minimum(common + freedom, together), common)


def _log_density(ratio: Floats, freedom: Floats, common: float) -> Floats:
    """Of a group's variance relative to the common one."""
    if common == np.inf:
        density = stats.chi2.logpdf(ratio * freedom, freedom) + np.log(freedom)
    else:
        density = stats.f.logpdf(ratio, freedom, common)
    return np.asarray(density)
