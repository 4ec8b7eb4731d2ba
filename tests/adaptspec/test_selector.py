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
        interval_low=ratio if low is None else low,
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


def test_another_patch_is_used_and_told() -> None:
    now = replace(HERE, versions={"torch": "2.13.1"})
    choice = select([measured("a", 2.0)], now, "chat")
    assert choice.strategy == "a"
    assert "torch 2.13 then, 2.13.1 now" in choice.reason
    assert "stale" not in choice.reason


@pytest.mark.parametrize(("low", "used"), [(1.2, "a"), (1.05, PLAIN), (0.9, PLAIN)])
def test_another_minor_version_makes_a_profile_stale(low: float, used: str) -> None:
    now = replace(HERE, versions={"torch": "2.14.0"})
    choice = select([measured("a", 1.5, low=low)], now, "chat")
    assert choice.strategy == used
    assert "stale (torch 2.13 then, 2.14.0 now)" in choice.reason
    assert "run tune again" in choice.reason


def test_a_measurement_without_an_interval_is_not_enough() -> None:
    lucky = measured("a", 2.0)
    unknown = replace(lucky.measurement, interval_low=None, interval_high=None)
    choice = select([replace(lucky, measurement=unknown)], HERE, "chat")
    assert choice.strategy == PLAIN
    assert "older version" in choice.reason


def test_the_reason_says_what_was_improved() -> None:
    speed = measured("a", 2.0)
    one = replace(speed.measurement, objective="speed")
    other = replace(speed.measurement, objective="latency")
    said = [
        select([replace(speed, measurement=m)], HERE, "chat").reason
        for m in (one, other)
    ]
    assert ["latency" in reason for reason in said] == [False, True]


def test_the_reason_says_under_which_controls_it_was_measured() -> None:
    greedy = measured("a", 2.0)
    controls = {"temperature": 0.7, "top_k": 20}
    one = replace(greedy.measurement, objective="speed")
    other = replace(greedy.measurement, objective="answer", controls=controls)
    said = [
        select([replace(greedy, measurement=m)], HERE, "chat").reason
        for m in (one, other)
    ]
    assert said[0].startswith("measured greedily, 2.00x plain decoding on 'chat'")
    assert said[1].startswith(
        "measured at temperature 0.7 with top_k 20, 2.00x plain decoding in time per "
        "answer on 'chat'"
    )


names = st.sampled_from(["a", "b", "c", "d", PLAIN])
elsewhere: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"model": "m2"},
        {"draft": None},
        {"dtype": "float32"},
        {"device": "cuda"},
        {"device_name": "Another CPU"},
        {"threads": 8},
    ]
)
# What must never be chosen, however fast it was.
tainted = st.one_of(
    st.just({"lossless": False}),
    st.just({"baseline": True}),
    elsewhere.map(lambda place: {"environment": replace(HERE, **place)}),
)


def confirmed(
    strategy: str,
    ratio: float,
    low: float,
    prompts: int,
    day: int,
    changes: dict[str, Any],
) -> Profile:
    """A profile of the run of ``day``."""
    time = example_profile().created + timedelta(days=day)
    found = measured(
        strategy, ratio, low, **{"run": f"r{day}", "created": time, **changes}
    )
    return replace(found, measurement=replace(found.measurement, prompts=prompts))


def drawn(changes: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Profile]:
    ratios = st.floats(0.5, 3)
    days = st.integers(0, 2)
    return st.builds(confirmed, names, ratios, ratios, st.integers(1, 5), days, changes)


def may_be_chosen(profile: Profile, among: list[Profile]) -> bool:
    """The rule, said once more: every condition alone, no order, no ties."""
    here = [p for p in among if is_ours(p) and p.prompt_class == "chat"]
    return (
        profile in here
        and profile.strategy != PLAIN
        and (profile.measurement.interval_low or 0) > 1
        and profile.measurement.prompts >= 2
        and not any(p.created > profile.created for p in here)
    )


def is_ours(profile: Profile) -> bool:
    return (
        profile.lossless
        and not profile.baseline
        and replace(profile.environment, versions=HERE.versions) == HERE
    )


found = st.lists(
    drawn(st.just({}) | st.just({"prompt_class": "code"}) | tainted), max_size=6
)


@given(found, st.integers(0, 99))
def test_the_order_of_profiles_doesnt_matter(
    profiles: list[Profile], seed: int
) -> None:
    shuffled = list(profiles)
    random.Random(seed).shuffle(shuffled)
    one, other = select(profiles, HERE, "chat"), select(shuffled, HERE, "chat")
    assert (one.strategy, one.params) == (other.strategy, other.params)
    # Which of several places is named may differ where none is this one.
    if any(is_ours(p) for p in profiles):
        assert one.reason == other.reason


@given(found)
def test_what_is_chosen_may_be_and_nothing_that_may_be_was_clearly_faster(
    profiles: list[Profile],
) -> None:
    choice = select(profiles, HERE, "chat")
    eligible = [p for p in profiles if may_be_chosen(p, profiles)]
    if not eligible:
        assert choice.strategy == PLAIN
        return
    best = max(p.measurement.ratio for p in eligible)
    assert any(
        (p.strategy, p.params) == (choice.strategy, choice.params)
        and p.measurement.ratio >= 0.98 * best
        for p in eligible
    )


@given(found, st.lists(drawn(tainted), min_size=1, max_size=3))
def test_lossy_baseline_and_foreign_profiles_change_no_choice(
    profiles: list[Profile], others: list[Profile]
) -> None:
    before = select(profiles, HERE, "chat")
    after = select([*profiles, *others], HERE, "chat")
    assert (after.strategy, after.params) == (before.strategy, before.params)


@given(found, names, st.floats(0, 1), st.floats(1.01, 100), st.integers(1, 5))
def test_a_slower_a_less_reliable_and_a_lucky_setting_more_change_nothing(
    profiles: list[Profile], name: str, part: float, ratio: float, prompts: int
) -> None:
    before = select(profiles, HERE, "chat")
    eligible = [p.measurement.ratio for p in profiles if may_be_chosen(p, profiles)]
    slowest = min(eligible, default=1.0)
    slower = 0.97 * part * slowest
    more = [
        confirmed(name, slower, slower, prompts, 0, {"params": {"m": 1}}),
        confirmed(name, ratio, min(1.0, part), prompts, 0, {"params": {"m": 2}}),
        confirmed(name, ratio, ratio, 1, 0, {"params": {"m": 3}}),
    ]
    after = select([*profiles, *more], HERE, "chat")
    assert (after.strategy, after.params) == (before.strategy, before.params)


def test_a_lossy_strategy_is_chosen_only_if_it_is_named_and_says_so() -> None:
    profiles = [
        measured(PLAIN, 1.0),
        measured("a", 1.3),
        measured("loose", 2.0, lossless=False),
        measured("broken", 3.0, lossless=False),  # promised to be lossless
    ]
    choice = select(profiles, HERE, "chat")
    assert (choice.strategy, choice.lossless) == ("a", True)
    choice = select(profiles, HERE, "chat", lossy={"loose"})
    assert (choice.strategy, choice.lossless) == ("loose", False)
    assert select(profiles[:1], HERE, "chat", lossy={"loose"}).strategy == PLAIN


def test_profiles_hold_for_the_heads_they_were_measured_with() -> None:
    bare = replace(HERE, heads=None, heads_name=None)
    with_heads = measured("medusa", 2.0)
    without = measured("a", 1.5, environment=bare)
    other = measured("b", 3.0, environment=replace(HERE, heads="h2"))
    assert select([with_heads, without, other], HERE, "chat").strategy == "medusa"
    assert select([with_heads, without, other], bare, "chat").strategy == "a"
    choice = select([without, other], HERE, "chat")
    assert choice.strategy == "a"
    assert "measured without heads: run tune with them" in choice.reason
    choice = select([with_heads, other], bare, "chat")
    assert choice.strategy == PLAIN
    assert "heads h1 (here None)" in choice.reason
