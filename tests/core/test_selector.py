"""The choice is a function of the profiles, and its reason is true."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.profile import PLAIN, Profile
from adaptspec.selector import select
from adaptspec.testing.stores import example_profile

HERE = example_profile().environment


def measured(
    strategy: str, ratio: float, low: float | None = None, **changes: Any
) -> Profile:
    measurement = replace(
        example_profile().measurement,
        ratio=ratio,
        ratio_low=ratio if low is None else low,
    )
    return example_profile(strategy=strategy, measurement=measurement, **changes)


def test_the_fastest_reliable_strategy_wins_and_says_by_how_much() -> None:
    profiles = [measured(PLAIN, 1.0), measured("a", 1.3), measured("b", 1.8)]
    choice = select(profiles, HERE, "chat")
    assert (choice.strategy, choice.prompt_class) == ("b", "chat")
    assert "1.80x" in choice.reason


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ([], "nothing is profiled"),
        ([measured("a", 1.4, low=0.99)], "nothing is reliably faster"),
        ([measured("a", 2.0, lossless=False)], "nothing is profiled"),
        ([measured("a", 2.0, baseline=True)], "nothing is profiled"),
        ([measured("a", 2.0, prompt_class="code")], "'chat' isn't profiled"),
        ([measured("a", 2.0, environment=replace(HERE, threads=8))], "threads 8"),
        ([measured("a", 2.0, environment=replace(HERE, dtype="float32"))], "float32"),
    ],
)
def test_plain_decoding_is_chosen_and_the_reason_told(
    profiles: list[Profile], said: str
) -> None:
    choice = select(profiles, HERE, "chat")
    assert choice.strategy == PLAIN
    assert said in choice.reason


def test_one_prompt_is_not_enough() -> None:
    lucky = measured("a", 2.0)
    alone = replace(lucky, measurement=replace(lucky.measurement, prompts=1))
    choice = select([alone], HERE, "chat")
    assert choice.strategy == PLAIN
    assert "one held-out prompt, 2 are needed" in choice.reason


def test_ties_go_to_the_simpler_strategy() -> None:
    simple = measured("z", 1.79, params={})
    assert select([measured("a", 1.8), simple], HERE, "chat").strategy == "z"


def test_without_a_class_the_only_one_or_the_default_is_used() -> None:
    chat, code = measured("a", 2.0), measured("b", 2.0, prompt_class="code")
    default = measured("c", 2.0, prompt_class="default")
    assert select([chat], HERE).strategy == "a"
    assert select([chat, code, default], HERE).strategy == "c"
    undecided = select([chat, code], HERE)
    assert undecided.strategy == PLAIN
    assert "chat, code" in undecided.reason


def test_only_the_newest_run_counts() -> None:
    old = measured("a", 3.0)
    new = measured("b", 1.5, run="r2", created=old.created + timedelta(days=1))
    assert select([old, new], HERE, "chat").strategy == "b"


def test_other_versions_are_used_and_told() -> None:
    now = replace(HERE, versions={"torch": "9.9"})
    choice = select([measured("a", 2.0)], now, "chat")
    assert choice.strategy == "a"
    assert "torch 2.13 then, 9.9 now" in choice.reason


names = st.sampled_from(["a", "b", "c", "d", PLAIN])
found = st.lists(
    st.builds(measured, names, st.floats(0.5, 3), st.floats(0.5, 3)), max_size=6
)


@given(found, st.integers(0, 99))
def test_the_order_of_profiles_doesnt_matter(
    profiles: list[Profile], seed: int
) -> None:
    shuffled = list(profiles)
    random.Random(seed).shuffle(shuffled)
    one, other = select(profiles, HERE, "chat"), select(shuffled, HERE, "chat")
    assert (one.strategy, one.reason) == (other.strategy, other.reason)


@given(found)
def test_what_is_chosen_was_measured_reliably_faster_or_is_plain(
    profiles: list[Profile],
) -> None:
    choice = select(profiles, HERE, "chat")
    assert choice.strategy == PLAIN or any(
        p.strategy == choice.strategy and p.measurement.ratio_low > 1 for p in profiles
    )


@given(found)
def test_a_slower_setting_more_changes_nothing(profiles: list[Profile]) -> None:
    before = select(profiles, HERE, "chat")
    slower = measured("e", 0.4, low=0.3)
    after = select([*profiles, slower], HERE, "chat")
    assert after.strategy == before.strategy
