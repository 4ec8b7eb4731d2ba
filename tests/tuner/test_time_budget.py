"""Which phase of a tune may use how much of its time."""

from __future__ import annotations

import math

from adaptspec.testing.fakes import FakeClock
from adaptspec_tuner.time_budget import TimeBudget, for_costs


def test_plain_decoding_and_the_search_end_so_that_there_is_time_to_confirm() -> None:
    clock = FakeClock()
    time = TimeBudget(clock, 100.0, plain=0.25, confirming=0.45, least_search=0.25)
    assert time.decoding_plainly
    clock.advance(25.0)
    assert not time.decoding_plainly
    assert time.searching
    time.keep_back(1000.0)  # the search keeps a quarter of what is left
    clock.advance(0.25 * 75.0 - 0.1)
    assert time.searching
    clock.advance(0.2)
    assert not time.searching


def test_no_more_is_kept_back_than_confirming_takes() -> None:
    clock = FakeClock()
    time = TimeBudget(clock, 1000.0, confirming=0.45)
    clock.advance(600.0)
    assert not time.searching
    time.keep_back(20.0, 100.0)
    assert time.searching
    clock.advance(301.0)
    assert not time.searching


def test_a_class_may_use_the_time_of_others_until_it_has_enough_prompts() -> None:
    clock = FakeClock()
    in_time = TimeBudget(clock, 100.0).confirming(10.0, enough=2)
    assert in_time(50.0, 1)
    assert not in_time(50.0, 2)
    assert not in_time(101.0, 0)


def test_where_trials_are_the_budget_time_ends_nothing() -> None:
    clock = FakeClock()
    time = TimeBudget(clock, math.inf)
    time.keep_back(9.0)
    going = (time.replaying(1.0), time.discovering())
    clock.advance(1e9)
    assert time.decoding_plainly
    assert time.searching
    assert all(may_go_on() for may_go_on in going)
    assert time.predicting(1e9)
    assert for_costs(math.inf) == 30.0
    assert for_costs(100.0) == 5.0
