"""The model of ratios against its integral done by brute force, and spreads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptspec_tuner.deciding.pooling import Beliefs, Pooling
from adaptspec_tuner.deciding.spread import moderated

BELIEFS = Beliefs(
    level=0.5,
    classes=((0.0, 0.5), (0.2, 0.5)),
    settings=((0.0, 0.7), (0.3, 0.3)),
    both=((0.05, 0.4), (0.2, 0.6)),
)


def drawn(count: int) -> NDArray[np.float64]:
    """Truths of two classes by two settings, as believed before anything is seen."""
    random = np.random.default_rng(0)

    def spread(
        which: tuple[tuple[float, float], ...], size: int
    ) -> NDArray[np.float64]:
        values, weights = zip(*which, strict=True)
        scale = random.choice(values, count, p=np.array(weights) / sum(weights))
        return scale[:, None] * random.standard_normal((count, size))

    level = BELIEFS.level * random.standard_normal((count, 1))
    of_class = np.repeat(spread(tuple(BELIEFS.classes), 2), 2, axis=1)
    of_setting = np.tile(spread(tuple(BELIEFS.settings), 2), 2)
    return np.asarray(level + of_class + of_setting + spread(tuple(BELIEFS.both), 4))


def test_results_are_the_means_of_truths_weighted_by_what_was_seen() -> None:
    classes, settings = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    errors = np.array([0.1, 0.2, 0.3, 0.15])
    covariance = np.diag(errors**2)
    wanted = np.vstack([np.eye(4), [[0.5, 0, 0.5, 0]]])
    seen = np.array([0.4, 0.1, 0.2, -0.1])
    pooling = Pooling(classes, settings, covariance, wanted, BELIEFS)
    (mean,), (deviation,) = pooling.of(seen[None])
    truths = drawn(400_000)
    log = -(((truths - seen) / errors) ** 2).sum(axis=1) / 2
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    results = truths @ wanted.T
    expected = weight @ results
    assert mean == pytest.approx(expected, abs=0.01)
    spread = np.sqrt(weight @ (results - expected) ** 2)
    assert deviation == pytest.approx(spread, rel=0.05)
    again, same, across = pooling.with_covariance(seen)
    assert again == pytest.approx(mean)
    assert same == pytest.approx(np.sqrt(np.diag(across)))


def test_classes_that_differ_are_believed_and_classes_alike_share() -> None:
    def of(seen: list[float]) -> NDArray[np.float64]:
        count = len(seen)
        pooling = Pooling(
            np.arange(count), np.zeros(count, int), 0.01 * np.eye(count), np.eye(count)
        )
        return np.asarray(pooling.of(np.array([seen]))[0][0])

    alike = of([0.2, 0.25, 0.15, 0.2, 0.3])
    assert np.ptp(alike) < 0.3 * 0.15
    apart = of([0.0, 1.0, 0.5, -0.5, 1.5])
    assert np.ptp(apart) > 0.9 * 2.0


@pytest.mark.parametrize("freedom", [1.0, 3.0, 19.0])
def test_equal_spreads_are_pooled_and_unequal_ones_are_not(freedom: float) -> None:
    random = np.random.default_rng(1)
    count = 24
    degrees = np.full(count, freedom)

    def found(truth: np.ndarray) -> NDArray[np.float64]:
        variance = truth**2 * random.chisquare(freedom, count) / freedom
        return np.sqrt(moderated(variance, degrees, np.ones(count)).variance)

    same = found(np.full(count, 0.15))
    assert same == pytest.approx(np.full(count, 0.15), rel=0.6)
    assert np.ptp(np.log(same)) < 1.0
    uneven = np.array(list(itertools.islice(itertools.cycle([0.02, 0.5]), count)))
    told = found(uneven)
    if freedom > 1:
        assert told[1::2].mean() > 3 * told[::2].mean()


def test_a_group_of_one_prompt_has_what_the_others_have_in_common() -> None:
    variance, freedom = np.array([0.04, 0.04, 0.0]), np.array([5.0, 5.0, 0.0])
    found = moderated(variance, freedom, np.ones(3))
    assert found.variance[2] == pytest.approx(0.04, rel=0.3)
    assert (found.freedom <= 10).all()
    with pytest.raises(ValueError, match="two prompts"):
        moderated(variance, np.zeros(3), np.ones(3))
