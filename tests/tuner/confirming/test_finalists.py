"""Which settings of a class are confirmed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adaptspec.profile import Trial
from adaptspec_tuner.confirming.classes import corrections
from adaptspec_tuner.confirming.finalists import (
    Finalist,
    finalists,
    overall_leaders,
)
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.searching.standings import Standings


def finalist(name: str, ratio: float, k: int = 1) -> Finalist:
    return Finalist(ratio, Setting(name, {"k": k}))


def names(found: list[Finalist]) -> list[str]:
    return [one.setting.strategy for one in found]


def test_the_general_one_is_confirmed_with_two_rivals_whatever_it_did() -> None:
    best = [finalist(n, r) for n, r in (("a", 1.2), ("b", 1.5), ("c", 1.1), ("d", 0.9))]
    slow = finalist("general", 0.6)
    found = finalists([*best, slow], [slow])
    assert names(found) == ["b", "general", "a", "c"]


def test_the_best_comes_first_for_when_there_is_time_for_one() -> None:
    general = finalist("general", 1.4)
    best = [general, finalist("a", 1.2), finalist("b", 1.3), finalist("c", 1.1)]
    assert names(finalists(best, [general])) == ["general", "b", "a"]


def test_a_strategys_own_setting_must_be_clearly_better_than_its_common_one() -> None:
    common = finalist("general", 1.4, k=1)
    close = finalists([finalist("general", 1.41, k=2)], [common])
    assert close == [common]
    better = finalists([finalist("general", 1.6, k=2)], [common])
    assert better == [finalist("general", 1.6, k=2), common]


def test_hopeless_ones_are_confirmed_only_for_want_of_any() -> None:
    assert names(finalists([finalist("a", 1.2), finalist("b", 0.5)], [])) == ["a"]
    assert names(finalists([finalist("a", 0.3), finalist("b", 0.5)], [])) == ["b"]
    assert finalists([], []) == []


def test_who_leads_over_all_classes_was_raced_in_all() -> None:
    one, other, absent = (Setting(name, {"k": 1}) for name in "abc")
    standings = {name: Standings() for name in ("chat", "code")}
    for found, ratios in ((one, (1.0, 2.0)), (other, (1.3, 1.3))):
        for name, ratio in zip(standings, ratios, strict=True):
            standings[name].add(found.key, ["p"], [ratio])
    standings["chat"].add(absent.key, ["p"], [9.0])
    assert overall_leaders([one, other, absent], standings, 1) == [one]
    assert overall_leaders([absent], standings, 1) == []


class Arm:
    """As much of an arm as is asked here."""

    def __init__(self, name: str, *pairs: tuple[float, float | None]) -> None:
        self.name = name
        self.trials = [
            Trial(
                *("r", "chat", name, at, {}, "complete", 1.0),
                {"ratio": ratio, "predicted": promised},
            )
            for at, (ratio, promised) in enumerate(pairs)
        ]


def test_predictions_are_corrected_by_what_the_race_measured() -> None:
    arms: list[Any] = [
        Arm("a", (1.1, 1.0), (2.2, 2.0), (3.3, 3.0)),
        Arm("b", (1.0, None)),
    ]
    found = corrections(arms, doubt=0.0)
    assert found == {"a": pytest.approx(1.1)}
    doubted = corrections(arms)["a"]
    assert math.log(doubted) == pytest.approx(0.75 * math.log(1.1))
