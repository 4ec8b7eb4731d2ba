"""What is believed of a setting's speed, against the normal distribution's algebra."""

from __future__ import annotations

import math
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.choosing.belief import Belief, moved_by, shift, tuned_belief
from adaptspec.profile import Pick, Use

PRIOR = Belief(mean=0.4, requests=3.0, shape=4.0, scale=0.16)


def seen(logs: list[float]) -> Use:
    """Requests of these log ratios, each of weight 1."""
    return Use(
        *(1, "chat", len(logs), 9, 9, 9, 9, 0.5, 2.0),
        *(sum(logs), sum(x * x for x in logs), float(len(logs))),
    )


def pick(ratio: float, low: float, high: float) -> Pick:
    return Pick("a", {}, "measured", ratio, low, high)


_logs = st.lists(st.floats(-2, 2), min_size=1, max_size=8)


@given(_logs, _logs)
def test_it_is_the_same_one_after_the_other_and_all_at_once(
    one: list[float], two: list[float]
) -> None:
    step = PRIOR.given(seen(one)).given(seen(two))
    both = PRIOR.given(seen(one + two))
    for name in ("mean", "requests", "shape", "scale"):
        assert getattr(step, name) == pytest.approx(getattr(both, name), abs=1e-9)


def test_it_is_the_posterior_of_the_densities() -> None:
    """Against the product of prior and likelihood, summed over a grid."""
    logs = [0.1, 0.9, 0.35]
    found = PRIOR.given(seen(logs))
    total = mean = 0.0
    for i in range(-300, 500):
        middle = i / 200
        for j in range(1, 400):
            variance = j / 1000
            # Normal-inverse-gamma, then a normal density for each request.
            log = -(PRIOR.shape + 1.5) * math.log(variance) - (
                2 * PRIOR.scale + PRIOR.requests * (middle - PRIOR.mean) ** 2
            ) / (2 * variance)
            for x in logs:
                log -= math.log(variance) / 2 + (x - middle) ** 2 / (2 * variance)
            total += math.exp(log)
            mean += middle * math.exp(log)
    assert found.mean == pytest.approx(mean / total, abs=1e-3)
    assert found.requests == 6.0


def test_nothing_seen_changes_nothing() -> None:
    assert PRIOR.given(None) == PRIOR
    assert PRIOR.given(Use(1, "chat", 9, 9, 9, 9, 9, 0.5, 2.0)) == PRIOR


def test_a_single_request_that_fades_leaves_the_prior() -> None:
    use = Use(1, "chat", 1, 9, 9, 9, 9, 0.5, 2.0, -1e-9, 1e-9, 1e-9)
    faded = PRIOR.given(use)
    assert faded.mean == pytest.approx(PRIOR.mean, abs=1e-6)
    assert faded.error == pytest.approx(PRIOR.error, rel=1e-6)


def test_draws_spread_as_far_as_it_is_unsure() -> None:
    random = Random(1)
    sure = Belief(0.4, 300.0, 200.0, 8.0)
    for belief in (PRIOR, sure):
        draws = [belief.draw(random) for _ in range(20_000)]
        freedom = 2 * belief.shape
        spread = belief.error * math.sqrt(freedom / (freedom - 2))  # of a t
        assert fmean(draws) == pytest.approx(belief.mean, abs=4 * spread / 140)
        assert pstdev(draws) == pytest.approx(spread, rel=0.05)
    assert sure.error < PRIOR.error


def test_a_profile_counts_the_less_the_less_sure_it_was() -> None:
    sure = tuned_belief(pick(1.5, 1.45, 1.55), 12, moved=0.15)
    unsure = tuned_belief(pick(1.5, 1.1, 2.0), 12, moved=0.15)
    assert sure.mean == unsure.mean == pytest.approx(math.log(1.5))
    assert sure.error < unsure.error
    # What use may differ by is there however well it was tuned.
    assert sure.error >= 0.15
    free = tuned_belief(pick(1.5, 1.45, 1.55), 12, moved=0.01)
    assert free.error < 0.05


@pytest.mark.parametrize("prompts", [0, 1, 2, 500])
@pytest.mark.parametrize("ends", [(1.5, 1.5), (0.0, 3.0), (1.1, 9.0)])
def test_a_profile_of_few_prompts_or_no_interval_is_a_prior_too(
    prompts: int, ends: tuple[float, float]
) -> None:
    belief = tuned_belief(pick(1.5, *ends), prompts, moved=0.15)
    assert 0.1 < belief.error < 2
    assert math.isfinite(belief.draw(Random(0)))


def test_a_shift_of_all_settings_is_that_of_a_joint_normal_distribution() -> None:
    """Against the same product of densities on a grid."""
    tuned = [PRIOR, Belief(0.2, 2.0, 4.0, 0.3)]
    logs = [[0.1, -0.1, 0.0], [-0.2]]
    total = mean = square = 0.0
    for i in range(-2000, 2000):
        off = i / 1000
        density = math.exp(-(off**2) / (2 * 0.3**2))
        for belief, values in zip(tuned, logs, strict=True):
            # A mean of values about a mean that is itself off by its own.
            spread = belief.scale / belief.shape
            variance = spread / len(values) + spread / belief.requests
            seen_mean = fmean(values) - belief.mean - off
            density *= math.exp(-(seen_mean**2) / (2 * variance))
        total, mean = total + density, mean + density * off
        square += density * off**2
    uses: list[Use | None] = [seen(values) for values in logs]
    found, deviation = shift(tuned, [*uses, None], 0.3)
    assert found == pytest.approx(mean / total, abs=1e-4)
    expected = math.sqrt(square / total - (mean / total) ** 2)
    assert deviation == pytest.approx(expected, rel=1e-3)


def test_without_evidence_nothing_is_shifted_and_without_a_share_never() -> None:
    assert shift([PRIOR], [None], 0.2) == pytest.approx((0.0, 0.2))
    assert shift([PRIOR], [seen([-1.0] * 9)], 0.0) == (0.0, 0.0)
    assert moved_by(PRIOR, -0.1).mean == pytest.approx(0.3)
