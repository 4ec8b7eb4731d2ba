"""Which setting leads a race, and which are dropped."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.standings import Standings

ONE, TWO, OTHER = (
    Setting(name, {"k": k}).key for name, k in (("a", 1), ("a", 2), ("b", 1))
)


def test_one_prompt_drops_only_what_is_far_behind() -> None:
    rule = Standings()
    assert not rule.shown_slower([])
    assert not rule.shown_slower([math.log(0.85)])
    assert rule.shown_slower([math.log(0.6)])


def test_many_prompts_drop_what_is_a_little_behind() -> None:
    differences = [-0.05 + 0.03 * (-1) ** at for at in range(12)]
    assert Standings().shown_slower(differences)
    assert not Standings().shown_slower(differences[:1])


@pytest.mark.parametrize("prompts", [1, 2, 4, 8])
def test_an_equal_rival_is_seldom_dropped(prompts: int) -> None:
    """In as many of the races as the level leaves, or fewer."""
    draw, rule = random.Random(prompts), Standings(level=0.9)
    dropped = sum(
        rule.shown_slower([draw.gauss(0.0, 0.15) for _ in range(prompts)])
        for _ in range(2000)
    )
    assert dropped <= 0.12 * 2000


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_being_slower_yet_never_saves_a_setting(
    differences: list[float], more: float
) -> None:
    rule = Standings()
    if rule.shown_slower(differences):
        assert rule.shown_slower([value - more for value in differences])


def test_rivals_are_compared_on_the_prompts_that_both_saw() -> None:
    found = Standings()
    found.add(ONE, ["p", "q"], [2.0, 0.5])
    found.add(OTHER, ["q"], [0.6])  # better where it was measured
    assert not found.behind(OTHER, ONE)
    assert not found.behind(ONE, OTHER)
    found.add(TWO, ["p", "q"], [0.9, 0.2])
    assert found.behind(TWO, ONE)
    assert set(found.rivals(3)) == {ONE, OTHER}


def test_a_lucky_setting_is_expected_between_its_luck_and_its_strategys_others() -> (
    None
):
    found = Standings()
    for at in range(9):
        found.add(Setting("a", {"k": at}).key, ["p"], [1.0])
    lucky = Setting("a", {"k": 9}).key
    found.add(lucky, ["p"], [1.5])
    assert 1.0 < found.estimate(lucky) < 1.5
    before = found.estimate(lucky)
    found.add(lucky, ["q", "r", "s"], [1.5] * 3)  # no luck, then
    assert before < found.estimate(lucky) < 1.5


def test_repeats_of_a_prompt_are_one_prompt() -> None:
    found = Standings()
    found.add(ONE, ["p", "q"], [1.0, 4.0])
    alone = found.estimate(ONE)
    found.add(ONE, ["p"], [1.0])
    assert found.repeats(ONE, "p") == 2
    assert found.repeats(OTHER, "p") == 0
    assert found.estimate(ONE) == pytest.approx(alone)


def test_what_was_dropped_stands_behind_the_others() -> None:
    found = Standings()
    found.add(ONE, ["p"], [3.0], dropped=True)
    found.add(OTHER, ["p"], [1.0])
    assert found.ranked() == [OTHER, ONE]
    assert found.rivals(2) == [OTHER]
