"""What a budget buys: whole classes, in time, and an account of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, cast

import pytest
from pydantic import Field

from adaptspec.cli.progress import Progress
from adaptspec.params import Tunable
from adaptspec.profile import EVERY_CLASS, PLAIN, Environment
from adaptspec.run_records import answers_of
from adaptspec.selector import FEWEST_PROMPTS
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.records import MIX, confirmed_key, predicted_key
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tuning_run import Interrupted, TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob, KnobParams

CLASSES = ("chat", "code", "maths")
WORKLOAD = Workload(
    "w", tuple(Prompt(f"{c}{i}", c, text="x") for c in CLASSES for i in range(8))
)


class WideParams(KnobParams):
    k: Annotated[int, Tunable(1, 40)] = Field(default=4)


class Wide(Knob):
    Params = WideParams


class Slower(Wide):
    name = "slower"


class Trace(FakeMeasurer):
    """Generations of one second each; knobs are twice as fast, but not in maths."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.measured: list[tuple[str, str]] = []
        self.stop_at = math.inf

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        if self.clock.now >= self.stop_at:
            raise KeyboardInterrupt
        speed = {PLAIN: 10.0, "knob": 20.0, "slower": 9.0}[setting.strategy]
        if prompt.prompt_class == "maths" and setting.strategy == "knob":
            speed = 8.0
        self.clock.advance(10.0 / speed)
        self.measured.append((setting.strategy, prompt.id))
        return Sample((1, 2, 3), speed, 10.0 / speed, forwards=2)


def run(
    trace: Trace,
    store: MemoryStore,
    budget: float,
    place: Environment = PLACE,
    trials: int = 50,
    budget_trials: int | None = None,
    **more: Any,
) -> TuneResult:
    return tune_with(
        TuneInputs(
            trace,
            [Wide, Slower],
            WORKLOAD,
            store,
            place,
            TuneOptions(budget, trials=trials, budget_trials=budget_trials),
            clock=trace.clock,
            progress=Progress(None, trace.clock),
            **more,
        )
    )


@pytest.mark.parametrize("budget", [60.0, 100.0, 200.0, 400.0])
def test_a_budget_is_kept_within_five_percent(budget: float) -> None:
    trace = Trace()
    result = run(trace, MemoryStore(), budget)
    assert 0.7 * budget <= trace.clock.now <= 1.05 * budget
    assert sum(result.spent.values()) == pytest.approx(trace.clock.now)


@pytest.mark.parametrize("budget", [45.0, 60.0, 100.0])
def test_classes_that_are_confirmed_are_confirmed_on_enough_prompts(
    budget: float,
) -> None:
    result = run(Trace(), MemoryStore(), budget)
    assert result.named
    for found in result.named:
        assert all(p.measurement.prompts >= FEWEST_PROMPTS for p in found.profiles)


@pytest.mark.parametrize("budget", [27.0, 30.0, 34.0])
def test_a_small_budget_goes_to_confirming_every_class_before_more_trials(
    budget: float,
) -> None:
    trace = Trace()
    result = run(trace, MemoryStore(), budget)
    assert {found.name for found in result.named} == set(CLASSES)
    assert not any(found.few for found in result.named)
    assert trace.clock.now <= 1.05 * budget


def test_a_budget_that_is_too_short_names_one_that_does() -> None:
    short = run(Trace(), MemoryStore(), 60.0)
    told = [note for note in short.notes if note.startswith("the budget is short")]
    assert [note for note in told if "--budget 2m" in note] == told != []
    enough = run(Trace(), MemoryStore(), 120.0)
    assert not any("the budget is short" in note for note in enough.notes)
    for found in enough.named:
        assert min(p.measurement.prompts for p in found.profiles) >= 2 * FEWEST_PROMPTS


def test_a_continued_run_is_not_told_that_its_budget_is_short() -> None:
    store = MemoryStore()
    run(Trace(), store, 60.0)
    again = run(Trace(), store, 60.0)
    assert not any("the budget is short" in note for note in again.notes)


def test_a_budget_of_trials_is_that_many_in_all() -> None:
    store = MemoryStore()
    result = run(Trace(), store, math.inf, budget_trials=9)
    assert len(store.trials(result.run)) == 9
    assert {found.name for found in result.named} == set(CLASSES)


def test_a_continued_run_confirms_first_what_it_has_no_result_of() -> None:
    trace, store = Trace(), MemoryStore()
    run(trace, store, 400.0, trials=1)
    first = {p.prompt_class for p in store.profiles()} - {EVERY_CLASS}
    assert first == set(CLASSES)
    store, trace = MemoryStore(), Trace()
    trace.stop_at = 80.0  # while it confirms
    with pytest.raises(Interrupted):
        run(trace, store, 400.0, trials=1)
    confirmed = {p.prompt_class for p in store.profiles()} - {EVERY_CLASS}
    assert set() < confirmed < set(CLASSES)
    trace.stop_at, before = math.inf, len(trace.measured)
    result = run(trace, store, 400.0, trials=1)
    again = [prompt.rstrip("0123456789") for _, prompt in trace.measured[before:]]
    assert again[0] not in confirmed
    assert {found.name for found in result.named} == set(CLASSES)


def test_what_is_repaid_counts_every_run_of_a_continued_one() -> None:
    trace, store = Trace(), MemoryStore()
    trace.stop_at = 30.0
    with pytest.raises(Interrupted) as stopped:
        run(trace, store, 400.0)
    assert sum(stopped.value.result.spent.values()) == pytest.approx(trace.clock.now)
    trace.stop_at = math.inf
    result = run(trace, store, 200.0)
    record = store.record(result.run, "spent")
    assert record is not None
    assert record["seconds"] == pytest.approx(trace.clock.now)


@pytest.mark.slow
def test_what_there_was_no_time_to_try_is_confirmed_by_what_the_replay_promises() -> (
    None
):
    class Replayed(Trace):
        def measure(self, setting: Setting, prompt: Prompt) -> Sample:
            sample = super().measure(setting, prompt)
            self.clock.now = 0.0
            return sample

    replayed: Any = Replayed()
    result = run(
        Trace(), MemoryStore(), math.inf, budget_trials=0, replayer=lambda _: replayed
    )
    chosen = {found.name: found.choice.strategy for found in result.named}
    assert chosen == {"chat": "knob", "code": "knob", "maths": PLAIN}
    assert all(not any(found.trials.values()) for found in result.named)


@pytest.mark.slow
def test_every_finalist_that_replays_is_predicted_even_where_time_is_up() -> None:
    """A replay that promises knobs 10% more than they give, which the race tells."""

    class Replayed(Trace):
        def measure(self, setting: Setting, prompt: Prompt) -> Sample:
            sample = super().measure(setting, prompt)
            extra = 1.1 if setting.strategy == "knob" else 1.0
            faster = sample.speed * extra, sample.seconds / extra
            return replace(sample, speed=faster[0], seconds=faster[1])

    store, replayed = MemoryStore(), cast("Any", Replayed())
    result = run(Trace(), store, 100.0, replayer=lambda _: replayed)
    told = [(c, row) for c in result.named for row in c.rows if row.strategy == "knob"]
    assert told
    for found, row in told:
        assert row.predicted is not None
        assert 1.0 < row.predicted / row.measurement.ratio < 1.03
        record = store.record(result.run, predicted_key(found.name))
        assert record is not None
        assert set(record) == set(found.predicted)
    assert any("replay: its predictions of" in note for note in result.notes)
    results = result.as_json()["classes"][0]["results"]
    assert [r["predicted"] is None for r in results if r["strategy"] == PLAIN] == [True]


def test_speeds_by_prompt_are_kept_for_the_report() -> None:
    store = MemoryStore()
    result = run(Trace(), store, 400.0)
    record = store.record(result.run, confirmed_key("code"))
    assert record is not None
    assert len(record["prompts"]) == 4
    for speeds in record["prompts"].values():
        assert sorted({value for runs in speeds.values() for value in runs}) == [
            9.0,
            10.0,
            20.0,
        ]


def test_what_an_export_reads_of_a_run_is_kept() -> None:
    """How often plain decoding was measured, and how many prompts a class has."""
    store = MemoryStore()
    result = run(Trace(), store, 400.0)
    assert store.record(result.run, MIX) == dict.fromkeys(CLASSES, 8)
    (plain,) = [
        p.measurement
        for p in store.profiles(run=result.run)
        if (p.strategy, p.prompt_class) == (PLAIN, "code")
    ]
    answers = answers_of(store.record(result.run, confirmed_key("code")), PLAIN)
    assert answers > plain.prompts
    assert plain.tokens / answers == 3  # of each sample
    assert answers_of(None, PLAIN) == 0


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"versions": {"torch": "2.13.0"}}, None),
        ({"versions": {"torch": "2.14.0"}}, "stale (torch 2.13.1 then, 2.14.0 now)"),
        ({"model": "other"}, "the weights of model changed"),
        ({"dtype": "bfloat16"}, None),
        ({"model": "other", "model_name": "another"}, None),
    ],
)
def test_profiles_that_no_longer_hold_are_named_and_measured_again(
    now: dict[str, Any], said: str | None
) -> None:
    store = MemoryStore()
    before = replace(PLACE, versions={"torch": "2.13.1"})
    run(Trace(), store, 200.0, before, trials=1)
    trace = Trace()
    result = run(trace, store, 200.0, replace(before, **now), trials=1)
    told = [note for note in result.notes if "measuring again" in note]
    assert [said in note for note in told if said] == ([True] if said else [])
    assert trace.measured
