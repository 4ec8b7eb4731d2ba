"""A hierarchical model of log ratios, which estimates all settings together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Beliefs:
    """What is taken as possible before anything is measured, in logarithms of ratios.

    The three spreads are each ``(value, how likely)``; what was measured says which of
    them hold. No difference at all is made as likely as the others together: then
    classes that seem alike are told by the prompts of all.

    Args:
        level: Spread of the mean of all settings and classes around plain decoding.
        classes: Spread of the classes, the same for all settings.
        settings: Spread of the settings, the same in all classes.
        both: Spread of what a setting brings in one class and not in the others.
    """

    level: float = 0.5
    classes: Sequence[tuple[float, float]] = ((0.0, 0.5), (0.1, 0.25), (0.3, 0.25))
    settings: Sequence[tuple[float, float]] = ((0.0, 0.4), (0.1, 0.3), (0.3, 0.3))
    both: Sequence[tuple[float, float]] = (
        (0.0, 0.4),
        (0.05, 0.15),
        (0.1, 0.15),
        (0.2, 0.15),
        (0.4, 0.15),
    )


class Pooling:
    """A hierarchical normal model of log ratios (Gelman et al., Bayesian Data Analysis,
    chapter 5; a grid over its variances in place of sampling).

    Args:
        classes: ``[groups]``, which class each group is of.
        settings: ``[groups]``, which setting.
        covariance: ``[groups, groups]`` of the groups' means around the truth.
        wanted: ``[results, groups]``: the results that are asked for, as weighted sums
            of groups.
    """

    def __init__(
        self,
        classes: NDArray[np.int64],
        settings: NDArray[np.int64],
        covariance: Floats,
        wanted: Floats,
        beliefs: Beliefs | None = None,
    ) -> None:
        believed = beliefs or Beliefs()
        of_class = (classes[:, None] == classes).astype(float)
        of_setting = (settings[:, None] == settings).astype(float)
        alone = np.eye(len(classes))
        priors, likely = [], []
        for of_classes, p in believed.classes:
            for of_settings, q in believed.settings:
                for of_both, r in believed.both:
                    priors.append(
                        believed.level**2
                        + of_classes**2 * of_class
                        + of_settings**2 * of_setting
                        + of_both**2 * alone
                    )
                    likely.append(p * q * r)
        prior = np.array(priors)
        total = prior + covariance
        self._inverse = np.linalg.inv(total)
        self._known = np.log(likely) - np.linalg.slogdet(total)[1] / 2
        gain = prior @ self._inverse
        self._gain = wanted @ gain
        self._across = wanted @ (prior - gain @ prior) @ wanted.T
        self._left = np.einsum("krr->kr", self._across)

    def of(self, means: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each result.

        Args:
            means: ``[cases, groups]``: log ratios that were measured.

        Returns:
            Two of ``[cases, results]``.
        """
        weight = self._weights(means)
        each = np.einsum("kri,bi->kbr", self._gain, means, optimize=True)
        mean = np.einsum("kb,kbr->br", weight, each)
        square = np.einsum("kb,kbr->br", weight, self._left[:, None] + each**2)
        return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))

    def with_covariance(self, means: Floats) -> tuple[Floats, Floats, Floats]:
        """The same of one case, ``[groups]``, and how the results vary together.

        Returns:
            Two of ``[results]``, and ``[results, results]``.
        """
        (mean,), (deviation,) = self.of(means[None])
        weight = self._weights(means[None])[:, 0]
        rest = self._gain @ means - mean
        across = np.einsum("k,krs->rs", weight, self._across)
        across += np.einsum("k,kr,ks->rs", weight, rest, rest)
        return mean, deviation, across

    def _weights(self, means: Floats) -> Floats:
        """How likely each combination of spreads is, ``[combinations, cases]``."""
        rotated = np.einsum("kij,bj->kbi", self._inverse, means, optimize=True)
        log = self._known[:, None] - np.einsum("kbi,bi->kb", rotated, means) / 2
        weight = np.exp(log - log.max(axis=0))
        return np.asarray(weight / weight.sum(axis=0))
