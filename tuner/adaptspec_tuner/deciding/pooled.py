"""Tests which settings are reliably faster, against simulated tunes without a gain."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy import special, stats

from adaptspec.profile import EVERY_CLASS
from adaptspec_tuner.deciding.evidence import Evidence
from adaptspec_tuner.deciding.pooling import Pooling
from adaptspec_tuner.deciding.rule import Candidate, Found, Power, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


MOST_PROMPTS = 1_000_000  # that a class is ever said to need


class Pooled:
    """Each setting in each class, and those measured in most classes over these.

    Args:
        seed: Of the tunes that are drawn.
    """

    def __init__(
        self,
        evidence: Evidence,
        candidates: Mapping[str, Candidate],
        rule: Rule,
        seed: int,
    ) -> None:
        self._evidence, self._rule = evidence, rule
        groups = list(evidence.groups)
        names = list(dict.fromkeys(name for name, _ in groups))
        keys = list(dict.fromkeys(key for _, key in groups))
        self._rows = {group: index for index, group in enumerate(groups)}
        weights = list(np.eye(len(groups)))
        of_key = {
            key: [index for index, group in enumerate(groups) if group[1] == key]
            for key in keys
        }
        most = max(map(len, of_key.values()), default=0)
        for key, indices in of_key.items():
            # One that most classes lack says nothing of all of them.
            if len(indices) == most and 2 * most >= len(names):
                self._rows[EVERY_CLASS, key] = len(weights)
                weights.append(np.bincount(indices, minlength=len(groups)) / most)
        self._weights = np.array(weights).reshape(len(weights), len(groups))
        self._own = self._weights @ evidence.mean
        self._known = bool(groups) and bool(np.isfinite(evidence.spread).all())
        if not self._known:
            return
        self._error = np.sqrt(
            np.einsum("rg,gh,rh->r", self._weights, evidence.covariance, self._weights)
        )
        # What luck brings is drawn, so this only shares out what may be wrong.
        self._freedom = _satterthwaite(self._weights, evidence)
        self._reach = _reach(self._weights, evidence, self._error, self._freedom)
        class_of = np.array([names.index(name) for name, _ in groups])
        key_of = np.array([keys.index(key) for _, key in groups])
        self._pooling = Pooling(
            *(class_of, key_of, evidence.covariance, self._weights), rule.beliefs
        )
        mean, deviation, across = self._pooling.with_covariance(evidence.mean)
        self._mean, self._deviation, self._across = mean, deviation, across
        self._choosable = np.array([candidates[key].choosable for _, key in self._rows])
        # A class of more prompts, which can show more, gets more of what may be wrong:
        # by their cube a class of twenty sees a gain of 1.15 beside seven of four.
        prompts = (self._weights > 0) @ evidence.prompts.astype(float)
        prompts /= (self._weights > 0).sum(axis=1)
        self._share = prompts**3 / max(1.0, (prompts[self._choosable] ** 3).sum())
        self._lucky = self._drawn(seed)
        self._bar, self._own_bar = self._bars()
        faster = self._passes(mean[None], deviation[None], self._own[None])[0]
        self._faster = faster & self._choosable

    def found(self, name: str, *, corrected: bool = True) -> dict[str, Found]:
        """What each setting of a class, or of ``EVERY_CLASS``, is worth.

        Args:
            corrected: Whether other classes and settings count.
        """
        found = {}
        for (of, key), row in self._rows.items():
            if of != name:
                continue
            used = self._weights[row] > 0
            prompts, classes = int(self._evidence.prompts[used].sum()), int(used.sum())
            if not self._known:
                ratio = math.exp(self._own[row])
                found[key] = Found(ratio, None, None, prompts, False, classes)
                continue
            low, high = self._interval(row)
            log = min(max(self._mean[row], low), high) if corrected else self._own[row]
            found[key] = Found(
                *(math.exp(log), math.exp(low), math.exp(high), prompts),
                faster=bool(self._faster[row]),
                classes=classes,
            )
        return found

    def likely(self, name: str, key: str) -> float:
        """How likely a setting is faster than plain decoding in a class."""
        row = self._rows[name, key]
        return float(stats.norm.cdf(self._mean[row] / self._deviation[row]))

    def apart(self, name: str, one: str, other: str) -> float:
        """By how many standard deviations one setting is above another."""
        a, b = self._rows[name, one], self._rows[name, other]
        square = self._across[a, a] + self._across[b, b] - self._across[a, b] * 2
        return float((self._mean[a] - self._mean[b]) / math.sqrt(max(square, 1e-12)))

    def power(self, name: str) -> Power | None:
        """What a class's prompts could have shown; None where it isn't known."""
        rows = [
            row
            for (of, _), row in self._rows.items()
            if of == name and self._known and self._choosable[row]
        ]
        if not rows or self._rule.gain is None:
            return None
        row, gain = rows[0], math.log(self._rule.gain)
        used = self._weights[row] > 0
        shifted = self._lucky[:500] + gain * used
        mean, deviation = self._pooling.of(shifted)
        passed = self._passes(mean, deviation, shifted @ self._weights.T)
        return Power(
            self._rule.gain,
            float(passed[:, row].mean()),
            self._enough(row, gain, len(rows)),
            self._rule.power,
        )

    def _enough(self, row: int, gain: float, settings: int) -> int:
        """How many prompts of a class, or of each class, show a gain often enough.

        More prompts make the error smaller, its degrees of freedom more and, of one
        class alone, its share of what may be wrong larger.

        Args:
            gain: In logarithms.
            settings: Of the class, that may be chosen.
        """
        used = self._weights[row] > 0
        now = float(self._evidence.prompts[used].mean())
        alone = used.sum() == 1 < used.size
        # The share is a cube over the sum of all cubes.
        others = now**3 * (1 / self._share[row] - settings)

        def shows(count: int) -> bool:
            share = self._share[row]
            if alone:
                share = count**3 / (others + settings * count**3)
            freedom = self._freedom[row] + max(0.0, count - now)
            needed = stats.t.isf(self._own_bar * share, freedom)
            needed += stats.norm.ppf(self._rule.power)
            return bool(needed * self._error[row] * math.sqrt(now / count) <= gain)

        counts = range(2, MOST_PROMPTS)
        return 2 + bisect.bisect_left(counts, True, key=shows)

    def _interval(self, row: int) -> tuple[float, float]:
        reach = self._reach[row]
        return self._own[row] - reach, self._own[row] + reach

    def _drawn(self, seed: int) -> Floats:
        """Means of tunes with the same prompts and no gain, ``[draws, groups]``.

        A spread is known as well as its degrees of freedom tell, so they follow a t
        distribution: with one spread for all groups where they may have one.
        """
        random = np.random.default_rng(seed)
        groups = len(self._evidence.groups)
        drawn = random.standard_normal((self._rule.draws, groups))
        drawn = drawn @ np.linalg.cholesky(self._evidence.covariance).T
        freedom = self._evidence.freedom
        one = self._evidence.common == math.inf
        freedom = freedom[:1] if one else freedom
        size = (self._rule.draws, len(freedom))
        return np.asarray(drawn * np.sqrt(freedom / random.chisquare(freedom, size)))

    def _bars(self) -> tuple[float, float]:
        """What the pooled and the own evidence must reach."""
        rule, usable = self._rule, self._choosable
        if not usable.any():
            return math.inf, 0.0
        mean, deviation = self._pooling.of(self._lucky)
        pooled = (mean / deviation)[:, usable].max(axis=1)
        own = self._chance(self._lucky @ self._weights.T)[:, usable].min(axis=1)
        rank = np.minimum(_rank(-pooled) / (1 - rule.own), _rank(own) / rule.own)
        part = float(np.quantile(rank, rule.wrong))
        bar = float(np.quantile(pooled, 1 - min(1.0, part * (1 - rule.own))))
        bar = max(bar, float(stats.norm.ppf(rule.sure)))
        return bar, float(np.quantile(own, min(1.0, part * rule.own)))

    def _chance(self, own: Floats) -> Floats:
        """How likely luck brings as much, in units of each row's share."""
        chance = special.stdtr(self._freedom, -own / self._error)
        return np.asarray(chance / self._share)

    def _passes(
        self, mean: Floats, deviation: Floats, own: Floats
    ) -> NDArray[np.bool_]:
        pooled = mean / deviation > self._bar
        return np.asarray(pooled | (self._chance(own) < self._own_bar))


def _rank(values: Floats) -> Floats:
    """Which part of the values is smaller."""
    return np.asarray((np.argsort(np.argsort(values)) + 0.5) / len(values))


def _satterthwaite(weights: Floats, evidence: Evidence) -> Floats:
    """Degrees of freedom of each weighted sum of groups (Satterthwaite, 1946)."""
    if evidence.common == math.inf:
        return np.full(len(weights), evidence.freedom[0])
    variance = weights**2 * np.diag(evidence.covariance)
    return np.asarray(
        variance.sum(axis=1) ** 2 / (variance**2 / evidence.freedom).sum(axis=1)
    )


def _reach(
    weights: Floats, evidence: Evidence, error: Floats, freedom: Floats
) -> Floats:
    """Half of each weighted sum's 95% interval, ``[results]``.

    Where groups have spreads of their own, a sum of several is one of t distributions;
    the t distribution with its variance and kurtosis stands for it (as in Patil,
    "Approximation to the Behrens-Fisher distributions", 1965). Satterthwaite's takes
    variances that were drawn toward each other for unbiased ones: its intervals over
    classes of unlike spreads cover the truth in 90%. Of a group with fewer degrees than
    have a kurtosis, its own 95% interval counts.

    Args:
        weights: ``[results, groups]``; no two groups of a result are of one class.
        error: ``[results]``, standard errors.
        freedom: ``[results]``, their degrees of freedom.
    """
    reach = np.asarray(error * stats.t.ppf(0.975, freedom))
    if evidence.common == math.inf:
        return reach
    own = np.maximum(evidence.freedom, 5.0)
    same = stats.t.ppf(0.975, evidence.freedom) / stats.t.ppf(0.975, own)
    scale = np.diag(evidence.covariance) * same**2
    variance = weights**2 * (scale * own / (own - 2))
    total = variance.sum(axis=1)
    degrees = 4 + total**2 / (variance**2 / (own - 4)).sum(axis=1)
    sums = np.sqrt(total * (degrees - 2) / degrees) * stats.t.ppf(0.975, degrees)
    return np.where((weights > 0).sum(axis=1) == 1, reach, sums)
