"""The race on measurements whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from adaptspec.workloads import Prompt
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.replaying.presearch import Presearch, presearch
from races import STRATEGIES, World


class Slower(World):
    """Half as fast once the tuning prompts were decoded plainly."""

    count = 0

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        sample = super().measure(setting, prompt)
        self.count += 1
        if self.count <= len(self.workload.prompts) // 2:
            return sample
        return replace(sample, speed=sample.speed / 2, seconds=2 * sample.seconds)


@pytest.fixture(autouse=True)
def few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of these tests would go to Optuna's choices."""

    def few(*given: Any, **named: Any) -> Presearch:
        return presearch(*given, **{**named, "trials": 8})

    monkeypatch.setattr("adaptspec_tuner.phases.presearch", few)


@pytest.mark.slow
def test_a_race_chooses_almost_what_ten_times_its_budget_chooses() -> None:
    short: list[float] = []
    long: list[float] = []
    for seed in range(2):
        for budget, found in ((180.0, short), (1800.0, long)):
            world = World(seed, classes=3)
            found.append(math.log(world.reached(world.tune(budget)) / world.best()))
    assert math.exp(fmean(long)) > 0.93
    assert math.exp(fmean(short) - fmean(long)) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_every_class_races_every_strategy_and_confirms_the_general_one_and_rivals(
    seed: int,
) -> None:
    world = World(seed)
    result = world.tune(480.0)
    assert world.took <= 1.02 * 480.0
    assert len(result.named) == 8
    general = set()
    for found in result.named:
        assert set(found.trials) == {cls.name for cls in STRATEGIES}
        confirmed = [p for p in found.profiles if p.strategy != "autoregressive"]
        assert len({p.strategy for p in confirmed} - {"general"}) >= 2
        general.add(
            frozenset(
                tuple(p.params.items()) for p in confirmed if p.strategy == "general"
            )
        )
    shared = frozenset.intersection(*general)
    assert shared  # one setting of it is confirmed in every class


@pytest.mark.slow
def test_plain_decoding_runs_beside_what_it_is_compared_with() -> None:
    """A machine that becomes half as fast after the answers were recorded."""
    world = Slower(0, classes=3, prompts=0.0, runs=0.0, pauses=0.0)
    result = world.tune(400.0)
    for found in result.named:
        for trial in found.tried:
            truth = world.ratio(found.name, Setting(trial.strategy, trial.params))
            assert trial.ratio == pytest.approx(truth, rel=1e-6)
