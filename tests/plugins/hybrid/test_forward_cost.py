"""What the hybrid takes a forward to cost: a wrong curve is found out by use."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from adaptspec_plugins.hybrid.forward_cost import ForwardCost

SIZES = (1, 2, 3, 5, 8, 12, 16, 17, 20, 30, 60, 100)


def truth(rows: int) -> float:
    """A step at 17, as with matrix units."""
    return 0.2 * (1 + 0.01 * rows) * (1.4 if rows > 16 else 1.0)


def steep(rows: int) -> float:
    """What a bad moment may measure of it."""
    return truth(rows) * (1 + 0.02 * min(rows, 16))


def errors(cost: ForwardCost) -> list[float]:
    """Of what each size costs beside one row, from the truth."""
    return [
        cost(rows) / cost(1) / (truth(rows) / truth(1)) - 1
        for rows in SIZES
        if rows <= 60
    ]


def test_it_begins_with_the_curve() -> None:
    cost = ForwardCost(truth)
    assert [cost(rows) for rows in SIZES] == pytest.approx([*map(truth, SIZES)])


def test_a_machine_that_turns_slow_slows_all_sizes_alike() -> None:
    cost = ForwardCost(truth)
    before = [cost(rows) for rows in SIZES]
    for _ in range(20):
        cost.observe(6, 3 * truth(6))
    for rows, once in zip(SIZES, before, strict=True):
        assert cost(rows) == pytest.approx(3 * once, rel=0.1)


def flat(rows: int) -> float:
    """Another."""
    return 0.2 + 1e-4 * rows


@pytest.mark.parametrize("wrong", [steep, flat])
def test_forwards_of_all_sizes_correct_a_wrong_curve_at_any_machine_speed(
    wrong: Callable[[int], float],
) -> None:
    cost, rng, mood = ForwardCost(wrong), random.Random(4), 1.0
    assert max(map(abs, errors(cost))) > 0.15
    for turn in range(1500):
        if turn % 50 == 0:
            mood = rng.uniform(0.7, 2.0)
        rows = rng.choice(SIZES)
        noise = rng.gauss(1.0, 0.05) if rng.random() > 0.02 else 10.0
        cost.observe(rows, truth(rows) * mood * max(noise, 0.5))
    assert max(map(abs, errors(cost))) < 0.08


def test_a_slow_new_size_corrects_the_curve_and_not_the_machines_speed() -> None:
    """Even where nothing but that size is verified from then on."""
    cost, rng = ForwardCost(flat), random.Random(3)
    for _ in range(4):
        cost.observe(1, truth(1) * rng.gauss(1.0, 0.03))
    for _ in range(2):
        cost.observe(24, truth(24) * rng.gauss(1.0, 0.03))
    assert truth(24) / truth(1) > 1.7
    assert cost(24) / cost(1) > 1.35
    for _ in range(18):
        cost.observe(24, truth(24) * rng.gauss(1.0, 0.03))
    assert cost(24) == pytest.approx(truth(24), rel=0.1)
    assert cost(1) == pytest.approx(truth(1), rel=0.2)


def test_the_curves_error_stays_after_a_thousand_forwards_of_one_size() -> None:
    """Of one size, which tell the two apart no more."""
    cost, rng = ForwardCost(flat), random.Random(3)
    for rows in (1, 1, 1, 1, *1500 * [24]):
        cost.observe(rows, truth(rows) * rng.gauss(1.0, 0.03))
    assert cost(24) / cost(1) > 1.35
    assert cost(1) == pytest.approx(truth(1), rel=0.25)


@pytest.mark.parametrize(
    ("rows", "factor"), [(2, 1.8), (16, 0.5), (16, 2.4), (24, 2.5)]
)
def test_a_size_far_from_the_curve_is_learnt(rows: int, factor: float) -> None:
    cost, rng = ForwardCost(flat), random.Random(1)
    for size in 30 * [1, rows]:
        actual = flat(size) * (factor if size == rows else 1.0)
        cost.observe(size, actual * rng.gauss(1.0, 0.03))
    assert cost(rows) == pytest.approx(factor * flat(rows), rel=0.1)
    assert cost(1) == pytest.approx(flat(1), rel=0.1)


@pytest.mark.parametrize("spread", [0.2, 0.4])
def test_noise_alone_moves_no_size_far_from_the_curve(spread: float) -> None:
    cost, rng = ForwardCost(truth), random.Random(2)
    for _ in range(1000):
        rows = rng.choice((1, 2, 4, 8, 16, 24))
        cost.observe(rows, truth(rows) * max(rng.gauss(1.0, spread), 0.05))
    assert max(map(abs, errors(cost))) < 0.2


def test_one_pause_moves_little() -> None:
    cost = ForwardCost(truth)
    for rows in 10 * [8, 16]:
        cost.observe(rows, truth(rows))
    before = [cost(rows) for rows in SIZES]
    cost.observe(16, 1000 * truth(16))
    for rows, once in zip(SIZES, before, strict=True):
        assert cost(rows) == pytest.approx(once, rel=0.15)


def test_a_slow_forward_then_a_fast_one_leave_it_as_it_was() -> None:
    cost = ForwardCost(truth)
    for _ in range(10):
        cost.observe(8, truth(8))
    before = [cost(rows) for rows in SIZES]
    cost.observe(8, 3 * truth(8))
    cost.observe(8, truth(8) / 3)
    assert [cost(rows) for rows in SIZES] == pytest.approx(before, rel=0.05)


def test_occasional_pauses_leave_the_estimates_unchanged() -> None:
    cost, rng = ForwardCost(truth), random.Random(7)
    for _ in range(5000):
        rows = rng.choice(SIZES)
        pause = 1000 if rng.random() < 0.01 else 1
        cost.observe(rows, truth(rows) * rng.gauss(1.0, 0.06) * pause)
    for _ in range(40):
        cost.observe(8, truth(8))
    assert max(map(abs, errors(cost))) < 0.15
    assert cost(8) == pytest.approx(truth(8), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_times_teach_nothing(seconds: float) -> None:
    cost = ForwardCost(truth)
    before = [cost(rows) for rows in SIZES]
    for rows in 2 * SIZES:
        cost.observe(rows, seconds)
    assert [cost(rows) for rows in SIZES] == before
