"""Where no tune could tell, requests do: what may be faster is tried in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

import adaptspec
from adaptspec.choosing.learning import Chooser, Finalists, Learning
from adaptspec.choosing.unsure import with_unsure
from adaptspec.decoder import Decoder, PlainDecodingWarning
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.environment import environment_of
from adaptspec.in_use import Uses
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import PLAIN, Profile
from adaptspec.selector import Ranking, rank
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.testing.stores import example_choice, example_profile
from adaptspec_profiles.memory import MemoryStore

PROMPT = "one two three one two three one two"


def measured(
    strategy: str, ratio: float, low: float, high: float, **changes: Any
) -> Profile:
    profile = example_profile(strategy=strategy, params={}, **changes)
    measurement = replace(
        profile.measurement, ratio=ratio, interval_low=low, interval_high=high
    )
    return replace(profile, measurement=measurement)


def undecided(**changes: Any) -> Ranking:
    """Of a tune that found nothing reliably faster."""
    decided = example_choice(picks=[], objective="answer", **changes)
    return rank([decided], decided.environment, "chat")


def unsure(ranking: Ranking, *profiles: Profile, **more: Any) -> Ranking:
    return with_unsure(ranking, profiles, example_profile().environment, **more)


def test_what_may_be_faster_is_tried_the_fastest_first_and_plain_decoding_is_last() -> (
    None
):
    found = unsure(
        undecided(),
        measured("a", 1.04, 0.95, 1.34),
        measured("b", 1.08, 0.9, 1.3),
        measured("b", 1.06, 0.9, 1.3, run="r1"),
        measured("c", 1.02, 0.9, 1.3),
    )
    assert found.unsure
    assert [choice.strategy for choice in found.choices] == ["b", "a", PLAIN]
    assert found.choices[0].reason == (
        "measured 1.08x plain decoding (95% interval 0.90-1.30), which doesn't tell "
        "for sure"
    )
    assert found.choices[-1].reason.endswith(
        "nothing is reliably faster; some requests try b and a, to see"
    )


@pytest.mark.parametrize(
    "profile",
    [
        measured(PLAIN, 1.04, 0.95, 1.34),
        measured("a", 0.99, 0.8, 1.34),
        measured("a", 1.04, 0.99, 1.09),
        measured("a", 1.04, 0.95, 1.34, baseline=True),
        measured("a", 1.04, 0.95, 1.34, lossless=False),
        measured("a", 1.04, 0.95, 1.34, run="another"),
        measured("a", 1.04, 0.95, 1.34, prompt_class="code"),
        measured("refused", 1.04, 0.95, 1.34),
    ],
)
def test_nothing_else_is_tried(profile: Profile) -> None:
    ranking = undecided()
    problem = {"refused": "no memory"}
    found = unsure(ranking, profile, refused=lambda pick: problem.get(pick.strategy))
    assert found is ranking


def test_nothing_is_added_for_sure_stale_or_unlike_tunes() -> None:
    maybe = measured("a", 1.04, 0.95, 1.34)
    decided = example_choice()
    sure = rank([decided], decided.environment, "chat")
    assert unsure(sure, maybe) is sure
    stale = undecided()
    now = replace(maybe.environment, versions={"torch": "3.0"})
    assert with_unsure(stale, [maybe], now) is stale
    for other in ({"draft": "another"}, {"heads": None}):
        now = replace(maybe.environment, **other)
        assert with_unsure(stale, [maybe], now) is stale
    assert unsure(undecided(), replace(maybe, lossless=False), lossy=["a"]).unsure


def request(ratio: float, tokens: int = 64) -> RunStats:
    """A request that was so many times as fast as plain decoding, by the guard."""
    seconds = tokens * 0.02 / ratio
    step = StepStats(3, 2, tokens, seconds, 0.0, 0.0)
    return RunStats(9, tokens + 1, 0.0, [step], 0, seconds * (ratio - 1), 0.02)


@pytest.mark.parametrize(
    ("ratio", "expected", "tried"), [(1.3, "a", 0.9), (0.9, PLAIN, 0.25)]
)
def test_requests_tell_what_the_tune_could_not(
    ratio: float, expected: str, tried: float
) -> None:
    ranking = unsure(undecided(), measured("a", 1.04, 0.95, 1.34))
    finalists = Finalists(ranking, [1, 2])
    chooses = Chooser(
        Uses(lambda: nullcontext(MemoryStore())), Learning(seed=0, exploration=0.35)
    )
    # Plain decoding is expected to be as fast, until a request tells.
    assert ranking.choices[chooses.best(finalists)].strategy == PLAIN
    assert chooses.explained(finalists, 1) == ranking.choices[1]
    places = []
    for _ in range(100):
        places.append(place := chooses.choose(finalists))
        chooses.add(finalists, place, request(ratio if place == 0 else 1.0))
    assert places[:10].count(0) >= 1
    share = places[50:].count(0) / 50
    assert share >= tried if expected == "a" else share <= tried
    best = chooses.best(finalists)
    assert ranking.choices[best].strategy == expected
    said = chooses.explained(finalists, best).reason
    assert f"in use {ratio:.2f}x plain decoding lately" in said


@pytest.mark.guarded
def test_a_decoder_tries_it_says_so_and_frozen_does_not() -> None:
    model = LanguageModel(tiny_module("llama"), tiny_tokenizer())
    store = MemoryStore()
    here = environment_of(model, None)
    maybe = measured("prompt_lookup", 1.04, 0.95, 1.34, environment=here)
    store.add_profiles([maybe])
    store.put_choices([example_choice(environment=here, picks=[], objective="answer")])
    decoder = adaptspec.load(model, db=store, adapt=Learning(seed=1))
    assert decoder.choose("chat").strategy == PLAIN
    assert "some requests try prompt_lookup, to see" in decoder.choose("chat").reason
    with pytest.warns(PlainDecodingWarning, match="nothing is reliably") as told:
        results = [
            decoder.generate(PROMPT, prompt_class="chat", max_new_tokens=4)
            for _ in range(12)
        ]
    assert len(told) == 1
    tried = [r.choice for r in results if r.choice.strategy == "prompt_lookup"]
    assert tried
    assert "1.04x plain decoding (95% interval 0.95-1.34)" in tried[0].reason
    assert "tried since it may be faster than plain decoding" in tried[0].reason
    assert len({tuple(r.token_ids) for r in results}) == 1
    ways: Sequence[Mapping[str, Any]] = (
        {"adapt": False},
        {"adapt": Learning(exploration=0)},
        {"record": False},
    )
    frozen = [adaptspec.load(model, db=store, **way) for way in ways]
    for decoder in (*frozen, Decoder(model, None, store, guard=False)):
        choice = decoder.choose("chat")
        assert choice.strategy == PLAIN
        assert "to see" not in choice.reason
