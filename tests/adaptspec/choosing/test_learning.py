"""The choice follows what requests take: in a simulation, and in a decoder."""

from __future__ import annotations

import math
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from adaptspec.choosing.learning import Chooser, Finalists, Learning
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.errors import AdaptSpecError
from adaptspec.in_use import Uses, ratio_of
from adaptspec.profile import ANSWER, LATENCY, PLAIN, SPEED, Pick
from adaptspec.selector import rank
from adaptspec.testing.stores import example_choice, example_profile
from adaptspec_profiles.memory import MemoryStore

PLAIN_STEP = 0.02


def request(ratio: float, tokens: int = 64) -> RunStats:
    """A request that was so many times as fast as plain decoding, by the guard."""
    seconds = tokens * PLAIN_STEP / ratio
    step = StepStats(3, 2, tokens, seconds, 0.0, 0.0)
    gained = seconds * (ratio - 1)
    return RunStats(9, tokens + 1, 0.0, [step], 0, gained, PLAIN_STEP)


def finalists(*ratios: float, prompts: int = 8, objective: str = ANSWER) -> Finalists:
    """Settings a, b, ... that were tuned so; their profiles' ids are 1, 2, ..."""
    picks = [
        Pick("abcdef"[i], {}, f"measured {ratio:.2f}x", ratio, ratio * 0.9, ratio * 1.1)
        for i, ratio in enumerate(ratios)
    ]
    decided = example_choice(picks=picks, prompts=prompts, objective=objective)
    ranking = rank([decided], decided.environment, "chat")
    return Finalists(ranking, list(range(1, len(ratios) + 2)))


def chooser(**learning: Any) -> Chooser:
    """With a seed, and exploring nothing unless told to."""
    uses = Uses(lambda: nullcontext(MemoryStore()))
    return Chooser(uses, Learning(**{"seed": 0, "exploration": 0.0, **learning}))


def test_without_requests_it_is_what_was_tuned_and_says_no_more() -> None:
    chooses, found = chooser(), finalists(1.6, 1.4)
    assert chooses.choose(found) == 0
    assert chooses.explained(found, 0) == found.ranking.choices[0]


def test_what_fails_in_use_gives_way_to_the_next_and_then_to_plain_decoding() -> None:
    chooses, found = chooser(), finalists(1.6, 1.4)
    for _ in range(20):
        chooses.add(found, 0, request(0.9))
    assert chooses.choose(found) == 1
    reason = chooses.explained(found, 1).reason
    assert reason == (
        "measured 1.40x; expected to be faster than a (tuned 1.60x, in use 0.90x plain "
        "decoding lately, 20 requests so far)"
    )
    for _ in range(20):
        chooses.add(found, 1, request(0.8))
    assert chooses.choose(found) == 2
    choice = chooses.explained(found, 2)
    assert choice.strategy == PLAIN
    assert choice.reason.startswith("plain decoding; expected to be faster than a (")
    assert "b (tuned 1.40x, in use 0.80x plain decoding lately" in choice.reason


def test_what_is_seen_of_one_setting_moves_what_is_expected_of_the_others() -> None:
    """As where prompts of another kind come, that no setting drafts well."""
    found = finalists(1.6, 1.2)
    expected = []
    for shared in (0.0, 0.3):
        chooses = chooser(shared=shared)
        for _ in range(20):
            chooses.add(found, 0, request(1.1))
        expected.append([math.exp(b.mean) for b in chooses.beliefs(found)])
    (alone, alone_other), (together, together_other) = expected
    assert alone == pytest.approx(together, rel=0.05)
    assert alone_other == pytest.approx(1.2)
    assert 0.8 < together_other < 1.0
    assert together > together_other


def test_one_bad_request_changes_nothing() -> None:
    chooses, found = chooser(), finalists(1.6, 1.4)
    for _ in range(10):
        chooses.add(found, 0, request(1.6))
    chooses.add(found, 0, request(0.05))
    assert chooses.choose(found) == 0


def test_what_was_given_up_is_tried_again_after_a_while() -> None:
    chooses, found = chooser(memory=50), finalists(1.6)
    for _ in range(30):
        chooses.add(found, 0, request(0.8))
    assert chooses.choose(found) == 1
    plainly = 0
    while chooses.choose(found) == 1:
        chooses.add(found, 1, request(1.0))
        plainly += 1
        assert plainly < 1000
    assert plainly > 30
    # Never, where nothing is forgotten.
    chooses = chooser(memory=math.inf)
    for _ in range(30):
        chooses.add(found, 0, request(0.8))
    for _ in range(1000):
        chooses.add(found, 1, request(1.0))
    assert chooses.choose(found) == 1


def test_settings_that_may_be_as_fast_are_tried_and_sure_ones_are_not() -> None:
    chooses = chooser(exploration=0.5)
    near, far = finalists(1.5, 1.45), finalists(2.5, 1.1)
    counts = Counter(chooses.choose(near) for _ in range(300))
    assert 30 < counts[1] < 270
    assert 2 not in counts  # plain decoding is known: nothing to be seen there
    assert Counter(chooses.choose(far) for _ in range(300))[0] > 290
    said = chooses.explained(near, 1).reason
    assert said == "measured 1.45x; tried since it may be faster than a (tuned 1.50x)"


def test_a_lossy_setting_that_is_not_allowed_is_never_tried() -> None:
    picks = [
        Pick("loose", {}, "m", 3.0, 2.9, 3.1, lossless=False),
        Pick("a", {}, "m", 1.2, 1.1, 1.3),
    ]
    decided = example_choice(picks=picks)
    ranking = rank([decided], decided.environment, "chat")
    chooses = chooser(exploration=1.0)
    found = Finalists(ranking, [1, 2])
    names = {ranking.choices[chooses.choose(found)].strategy for _ in range(200)}
    assert names == {"a"}


def test_a_short_answer_counts_as_less_than_a_request() -> None:
    chooses, found = chooser(), finalists(1.6)
    chooses.add(found, 0, request(1.0, tokens=8))
    (use, _) = chooses.seen(found)
    assert use is not None
    assert use.weight == pytest.approx(8 / 32)
    assert use.ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    "lacking", [{"plain_step": None}, {"seconds_gained": None}, {"steps": []}]
)
def test_a_request_that_nothing_is_known_to_compare_with_teaches_nothing(
    lacking: dict[str, Any],
) -> None:
    chooses, found = chooser(), finalists(1.6)
    chooses.add(found, 0, request(1.4))
    before = chooses.beliefs(found)
    chooses.add(found, 0, replace(request(0.1), **lacking))
    assert chooses.beliefs(found) == before  # and nothing was forgotten


def test_a_request_is_compared_in_what_the_tune_compared() -> None:
    # Two steps of 1 and 0.2 s for 4 and 6 tokens, and 1 s for the prompt.
    steps = [StepStats(3, 3, 4, 1.0, 0.0, 0.0), StepStats(5, 5, 6, 0.2, 0.0, 0.0)]
    stats = RunStats(9, 11, 1.0, steps, 0, 0.5, 0.2)
    expected = {ANSWER: 2.7 / 2.2, SPEED: 10 * 0.2 / 1.2, LATENCY: 0.2 / 0.25}
    for objective, ratio in expected.items():
        chooses = chooser(outlier=99.0)
        found = finalists(1.6, objective=objective)
        chooses.add(found, 0, stats)
        (use, _) = chooses.seen(found)
        assert use is not None
        assert use.ratio == pytest.approx(ratio), objective


def test_what_was_learnt_survives_a_restart() -> None:
    store = MemoryStore()
    profile = example_profile()
    one, two, plain = store.add_profiles(
        [profile, replace(profile, strategy="b"), replace(profile, strategy=PLAIN)]
    )
    found = Finalists(finalists(1.6, 1.4).ranking, [one, two, plain])
    for _ in range(3):  # programs of eight requests each
        uses = Uses(lambda: nullcontext(store), store.uses())
        chooses = Chooser(uses, Learning(exploration=0.0))
        for _ in range(8):
            chooses.add(found, 0, request(0.8))
        kept = chooses.seen(found)
        uses.close()
    assert chooses.choose(found) == 1
    again = Chooser(Uses(lambda: nullcontext(store), store.uses()), Learning())
    (use, *_) = again.seen(found)
    assert use is not None
    assert kept[0] is not None
    assert use.weight == pytest.approx(kept[0].weight)
    assert use.weight == pytest.approx(sum(math.exp(-i / 100) for i in range(24)))
    assert again.beliefs(found)[0].mean == pytest.approx(chooses.beliefs(found)[0].mean)


def test_two_programs_at_once_add_up_what_they_saw() -> None:
    store = MemoryStore()
    profile = example_profile()
    ids = store.add_profiles([profile, replace(profile, strategy="b")])
    found = Finalists(finalists(1.6, 1.4).ranking, [*ids, None])
    programs = []
    for place in (0, 1):
        uses = Uses(lambda: nullcontext(store), store.uses())
        programs.append((Chooser(uses, Learning()), uses, place))
    for chooses, _, place in programs:
        for _ in range(10):
            chooses.add(found, place, request(1.2))
    for _, uses, _ in programs:
        uses.close()
    one, two = store.uses()
    assert (one.requests, two.requests) == (10, 10)
    # The later one's requests have made the earlier one's fade.
    assert one.weight == pytest.approx(two.weight)
    assert one.ratio == pytest.approx(1.2)


def test_plain_requests_make_the_rest_fade_though_they_are_not_added_up() -> None:
    chooses, found = chooser(memory=10), finalists(1.6)
    found = replace(found, profiles=[1, None])
    chooses.add(found, 0, request(1.4))
    for _ in range(10):
        chooses.add(found, 1, request(1.0))
    (use, plain) = chooses.seen(found)
    assert plain is None
    assert use is not None
    assert use.weight == pytest.approx(math.exp(-1))
    assert use.ratio == pytest.approx(1.4)


def test_threads_choose_and_add_without_losing_any() -> None:
    chooses, found = chooser(exploration=1.0), finalists(1.5, 1.4, 1.3)

    def work() -> None:
        for _ in range(100):
            chooses.add(found, chooses.choose(found), request(1.4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(use.requests for use in chooses.seen(found) if use) == 400


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"memory": 0.5}, "memory of Learning must be at least 1, got 0.5"),
        ({"memory": "x"}, "memory of Learning must be a number, got 'x'"),
        ({"exploration": -1.0}, "exploration of Learning must be at least 0"),
        (
            {"moved": math.nan},
            "0.01 and finite, got nan",
        ),
        (
            {"shared": -0.1},
            "at least 0 and finite, got -0.1",
        ),
        ({"tokens": 0}, "tokens of Learning must be at least 1"),
        ({"shared": math.inf}, "shared of Learning must be at least 0 and finite"),
        ({"moved": math.inf}, "moved of Learning must be at least 0.01 and finite"),
    ],
)
def test_a_bad_value_is_refused_with_the_rule(wrong: Any, said: str) -> None:
    with pytest.raises(AdaptSpecError, match=said):
        Learning(**wrong)


def test_draws_touch_no_other_generator() -> None:
    import random

    random.seed(5)
    expected = random.Random(5).random()
    chooses, found = chooser(exploration=1.0), finalists(1.5, 1.4)
    chooses.choose(found)
    assert random.random() == expected


@pytest.mark.parametrize("objective", [SPEED, LATENCY])
def test_what_a_grammar_forced_is_no_gain_of_a_setting(objective: str) -> None:
    step = StepStats(3, 2, 64, 0.02, 0.0, 0.0, forced=60)
    stats = RunStats(9, 65, 0.0, [step], 0, 0.0, PLAIN_STEP)
    assert ratio_of(stats, objective) is None
    assert ratio_of(stats, ANSWER) == pytest.approx(1.0)
