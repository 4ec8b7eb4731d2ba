"""Which settings open a class's race."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adaptspec.profile import EVERY_CLASS, Profile, Trial
from adaptspec.testing.stores import example_profile
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.replaying.presearch import Presearch
from adaptspec_tuner.searching.entrants import (
    common_settings,
    earlier_settings,
    entrants,
)
from tuner_fakes import PLACE, Knob


def replayed(prompt_class: str, ratios: dict[int, float]) -> Presearch:
    trials = [
        Trial(
            *("", prompt_class, "knob", number, {"k": k}, "complete", 1.0),
            {"ratio": ratio, "prompts": ["p"], "ratios": [ratio]},
        )
        for number, (k, ratio) in enumerate(ratios.items())
    ]
    return Presearch(1.0, {(prompt_class, "knob"): trials})


def test_the_setting_for_all_classes_is_the_replays_or_the_default() -> None:
    found = replayed(EVERY_CLASS, {2: 1.1, 6: 1.4, 9: 1.2})
    assert common_settings([Knob], found) == {"knob": {"k": 6}}
    assert common_settings([Knob], None) == {"knob": {"k": 4}}


@pytest.mark.parametrize(("own", "opening"), [(1.31, [6]), (1.45, [6, 9])])
def test_a_class_adds_one_of_its_own_where_that_promises_clearly_more(
    own: float, opening: list[int]
) -> None:
    found = entrants(Knob, "chat", {"k": 6}, replayed("chat", {6: 1.3, 9: own, 2: 1.0}))
    assert [s["k"] for s in found.settings[: found.count]] == opening
    assert 9 in [s["k"] for s in found.settings]  # early in any case
    assert found.predicted[Setting("knob", {"k": 2}).key] == {"p": 1.0}


def test_what_an_earlier_run_chose_opens_the_race_too() -> None:
    found = entrants(Knob, "chat", {"k": 6}, None, [{"k": 3}, {"k": 5}])
    assert [s["k"] for s in found.settings[: found.count]] == [6, 3]
    same = entrants(Knob, "chat", {"k": 6}, None, [{"k": 6}])
    assert [s["k"] for s in same.settings[: same.count]] == [6]


def earlier(params: dict[str, Any], ratio: float, **place: Any) -> Profile:
    base = example_profile(strategy="knob", params=params, prompt_class="chat")
    return replace(
        base,
        environment=replace(PLACE, **place),
        measurement=replace(base.measurement, ratio=ratio),
    )


def test_earlier_settings_of_this_machine_stand_before_those_of_a_like_one() -> None:
    found = earlier_settings(
        [
            earlier({"k": 5}, 1.9, device_name="another"),
            earlier({"k": 2}, 1.1),
            earlier({"k": 3}, 1.2),
            earlier({"k": 7}, 9.0, model="other weights"),
            earlier({"gone": 1}, 9.0),  # no longer a parameter
        ],
        PLACE,
        [Knob],
    )
    assert found == {("chat", "knob"): [{"k": 3}, {"k": 2}, {"k": 5}]}
