"""What a run confirmed becomes one choice for each class and one over all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from adaptspec.profile import EVERY_CLASS, PLAIN, ClassChoice, Profile
from adaptspec.selector import select
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.confirming.choices import decide_classes
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.records import confirmed_key

HERE = example_profile().environment
NOW = datetime(2026, 11, 1, tzinfo=timezone.utc)
FAST, OTHER = Setting("fast", {"k": 2}), Setting("fast", {"k": 5})
DRAFT, LOOSE = Setting("draft_model", {}), Setting("loose", {})


def profile(name: str, setting: Setting, **changes: object) -> Profile:
    measurement = replace(
        example_profile().measurement,
        objective="speed",
        interval_low=None,
        interval_high=None,
    )
    return example_profile(
        prompt_class=name,
        strategy=setting.strategy,
        params=dict(setting.params),
        baseline=setting.baseline,
        measurement=measurement,
        created=NOW,
        run="r1",
        **changes,
    )


def run_of(
    classes: Mapping[str, Sequence[tuple[Setting, float]]], prompts: int = 4
) -> MemoryStore:
    """A store in which these settings were confirmed, with ratios around these."""
    store = MemoryStore()
    for name, settings in classes.items():
        ratios = {
            f"{name}{i}": {
                setting.key: [ratio * math.exp(0.02 * (-1) ** i)] * 2
                for setting, ratio in settings
            }
            for i in range(prompts)
        }
        store.put_record("r1", confirmed_key(name), {"ratios": ratios})
        plain = profile(name, Setting(PLAIN))
        store.add_profiles([plain, *(profile(name, s) for s, _ in settings)])
    return store


def decided(store: MemoryStore) -> dict[str, ClassChoice]:
    """What is decided on the store's profiles, and kept there."""
    confirmed: dict[str, list[Profile]] = {}
    for found in store.profiles(run="r1"):
        if found.prompt_class != EVERY_CLASS:
            confirmed.setdefault(found.prompt_class, []).append(found)
    choices, profiles = decide_classes(
        confirmed,
        {name: store.record("r1", confirmed_key(name)) or {} for name in confirmed},
        tried={name: ["fast", "draft_model", "loose"] for name in confirmed},
        lossy=["loose"],
        needs=lambda setting: (setting.strategy == "draft_model", False),
    )
    store.put_choices(choices)
    store.add_profiles(profiles)
    return {choice.prompt_class: choice for choice in choices}


def test_each_class_and_all_of_them_get_a_choice_that_is_stored() -> None:
    store = run_of(
        {"chat": [(FAST, 2.0), (OTHER, 1.5)], "code": [(FAST, 1.8), (OTHER, 1.2)]}
    )
    found = decided(store)
    assert set(found) == {"chat", "code", EVERY_CLASS}
    assert {c.prompt_class: c for c in store.choices()} == found
    of_chat = found["chat"]
    assert of_chat.picks[0].params == {"k": 2}
    assert (of_chat.prompts, found[EVERY_CLASS].prompts) == (4, 8)
    assert (of_chat.created, of_chat.run) == (NOW, "r1")
    assert list(of_chat.tried) == ["draft_model", "fast", "loose"]
    # What load() chooses is the same, from the same data.
    choice = select(store.choices(), HERE, "chat")
    assert (choice.params, choice.reason) == ({"k": 2}, of_chat.picks[0].reason)
    assert select(store.choices(), HERE).prompt_class == EVERY_CLASS


def test_profiles_get_the_ratios_that_were_decided_on() -> None:
    store = run_of({"chat": [(FAST, 2.0)], "code": [(FAST, 0.5)]})
    decided(store)
    kept = {
        p.prompt_class: p.measurement
        for p in store.profiles(run="r1")
        if p.strategy == "fast"
    }
    assert kept["chat"].ratio == pytest.approx(2.0, rel=0.02)
    assert kept["chat"].interval_low is not None
    assert kept["chat"].interval_low < 2.0
    over_all = kept[EVERY_CLASS]
    assert over_all.ratio == pytest.approx(1.0, rel=0.05)
    assert over_all.prompts == kept["chat"].prompts + kept["code"].prompts
    assert over_all.tokens == kept["chat"].tokens + kept["code"].tokens


def test_deciding_again_changes_nothing() -> None:
    store = run_of({"chat": [(FAST, 2.0)], "code": [(FAST, 1.5)]})
    first, profiles = decided(store), store.profiles()
    assert decided(store) == first
    assert store.profiles() == profiles


def test_a_setting_tells_whether_it_needs_the_draft_model() -> None:
    store = run_of({"chat": [(DRAFT, 2.0), (FAST, 1.5)]})
    picks = decided(store)["chat"].picks
    assert [(p.strategy, p.needs_draft) for p in picks] == [
        ("draft_model", True),
        ("fast", False),
    ]
    without = replace(HERE, draft=None, draft_name=None)
    choice = select(store.choices(), without, "chat")
    assert choice.strategy == "fast"
    assert "draft_model was 2.0" in choice.reason


def test_a_lossy_strategy_is_a_choice_for_whoever_allows_it() -> None:
    store = run_of({"chat": [(LOOSE, 2.0), (FAST, 1.5)]})
    broken = profile("chat", DRAFT, lossless=False)
    store.add_profiles([broken])
    decided(store)
    assert select(store.choices(), HERE, "chat").strategy == "fast"
    assert select(store.choices(), HERE, "chat", ["loose"]).strategy == "loose"


def test_an_output_that_changed_is_never_chosen() -> None:
    store = run_of({"chat": [(FAST, 2.0)]})
    store.add_profiles([profile("chat", FAST, lossless=False)])
    assert list(decided(store)["chat"].picks) == []


def test_another_engine_that_is_faster_is_told() -> None:
    engine = Setting("engine", {}, baseline=True)
    found = decided(run_of({"chat": [(FAST, 1.5), (engine, 3.0)]}))["chat"]
    assert [p.strategy for p in found.picks] == ["fast"]
    assert "another engine is faster: engine 3.0" in found.picks[0].reason


def test_over_all_classes_two_settings_of_a_strategy_are_both_kept() -> None:
    store = run_of(
        {
            "chat": [(FAST, 2.0)],
            "code": [(FAST, 1.8), (OTHER, 1.2)],
            "maths": [(OTHER, 1.2)],
        }
    )
    later = store.profiles(prompt_class="maths")
    store.add_profiles([replace(p, created=NOW + timedelta(1)) for p in later])
    decided(store)
    over_all = store.profiles(prompt_class=EVERY_CLASS)
    assert {p.params["k"] for p in over_all if p.strategy == "fast"} == {2, 5}
    decided(store)  # the newer setting must not replace the other
    assert store.profiles(prompt_class=EVERY_CLASS) == over_all


def test_over_all_classes_only_what_every_one_tried_was_tried() -> None:
    store = run_of({"chat": [(FAST, 2.0)], "code": [(FAST, 1.8)]})
    names = ("chat", "code")
    choices, _ = decide_classes(
        {name: store.profiles(prompt_class=name) for name in names},
        {name: store.record("r1", confirmed_key(name)) or {} for name in names},
        tried={"chat": ["fast"], "code": ["loose", "fast"]},
        lossy=[],
        needs=lambda _: (False, False),
    )
    assert {choice.prompt_class: list(choice.tried) for choice in choices} == {
        "chat": ["fast"],
        "code": ["fast", "loose"],
        EVERY_CLASS: ["fast"],
    }
