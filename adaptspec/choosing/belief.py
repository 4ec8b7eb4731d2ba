"""What is believed of settings' speeds: what was tuned, corrected by what was seen.

The logarithm of how many times as fast as plain decoding a request is counts as normal
with unknown mean and variance. Their conjugate prior is normal-inverse-gamma, and the
mean's posterior a t distribution (Murphy, "Conjugate Bayesian analysis of the Gaussian
distribution", 2007, section 3).

Where the kind of requests changes, all settings' ratios tend to move together. So what
was seen of one moves what is expected of the others: their means share a normal shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from adaptspec.profile import Pick, Use


@dataclass(frozen=True)
class Belief:
    """Of the mean and the variance of a request's log ratio to plain decoding.

    Args:
        mean: Expected.
        requests: As many are behind the mean.
        shape: Of the variance's inverse gamma distribution; half of the requests that
            are behind it.
        scale: Of the same; the variance is about ``scale / shape``.
    """

    mean: float
    requests: float
    shape: float
    scale: float

    @property
    def error(self) -> float:
        """Standard error of the mean, the scale of its t distribution."""
        return math.sqrt(self.scale / (self.shape * self.requests))

    @property
    def spread(self) -> float:
        """By which a next request's log ratio is about off the mean."""
        return math.sqrt(self.scale / self.shape * (1 + 1 / self.requests))

    def draw(self, random: Random) -> float:
        """A mean that may be the true one, by how likely it is."""
        squared = random.gammavariate(self.shape, 1 / self.shape)
        return self.mean + self.error * random.normalvariate(0, 1) / math.sqrt(squared)

    def given(self, seen: Use | None) -> Belief:
        """What is believed once these sums are seen."""
        if seen is None or seen.weight <= 0:
            return self
        weight, mean = seen.weight, seen.log_ratio / seen.weight
        requests = self.requests + weight
        # Rounding may make it negative.
        within = max(0.0, seen.log_ratio_squared - weight * mean**2)
        between = self.requests * weight * (mean - self.mean) ** 2 / requests
        return Belief(
            (self.requests * self.mean + seen.log_ratio) / requests,
            requests,
            self.shape + weight / 2,
            self.scale + (within + between) / 2,
        )


def tuned_belief(pick: Pick, prompts: int, *, moved: float) -> Belief:
    """What a tune makes believe of a setting that it found faster.

    Args:
        prompts: On how many it rests.
        moved: Standard deviation of what the log ratio in use differs from the tuned
            one by, since prompts and machines differ.
    """
    mean = math.log(pick.ratio)
    width = math.log(pick.high / pick.low) if 0 < pick.low <= pick.high else 0.0
    # Without an interval it is as unsure as it may have moved.
    error = width / (2 * 1.96) or moved
    spread = min(max(error * math.sqrt(prompts), 0.05), 1.0)
    # As if the spread were known from eight prompts: few prompts' own says little.
    shape = 4.0
    requests = spread**2 / (spread**2 / max(prompts, 1) + moved**2)
    return Belief(mean, requests, shape, shape * spread**2)


def shift(
    tuned: Sequence[Belief], seen: Sequence[Use | None], shared: float
) -> tuple[float, float]:
    """By how much all settings together are off what was tuned: mean and deviation.

    Args:
        tuned: Of each setting, before anything was seen.
        seen: Of each, perhaps followed by those of others.
        shared: Standard deviation that is expected of it.
    """
    if not shared:
        return 0.0, 0.0
    certainty, total = 1 / shared**2, 0.0
    for belief, use in zip(tuned, seen, strict=False):
        if use is not None and use.weight > 0:
            variance = belief.scale / belief.shape
            variance *= 1 / use.weight + 1 / belief.requests
            certainty += 1 / variance
            total += (use.log_ratio / use.weight - belief.mean) / variance
    return total / certainty, certainty**-0.5


def moved_by(belief: Belief, log: float) -> Belief:
    """The same with its mean moved."""
    return replace(belief, mean=belief.mean + log)
