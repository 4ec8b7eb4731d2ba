"""The search and the confirmation, on injected measurements: no model, no clock."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from adaptspec.cli.progress import Progress
from adaptspec.decoding.near_ties import near_tie
from adaptspec.params import Tunable
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with, untried_lines
from adaptspec_tuner.records import raced_key
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.searching.space import distributions, tuned
from adaptspec_tuner.tuning_run import Interrupted, TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob, KnobParams


class SeveralParams(KnobParams):
    k: Annotated[int, Tunable(1, 8)] = Field(default=4)
    kind: Annotated[Literal["a", "b"], Tunable()] = Field(default="a")
    width: Annotated[float, Tunable(0.0, 1.0, step=0.25, when={"kind": ("b",)})] = (
        Field(default=0.5)
    )
    fixed: int = Field(default=3)


class Several(Knob):
    Params = SeveralParams


class Trace(FakeMeasurer):
    """Speeds from a table; each generation takes a second."""

    def __init__(self, clock: FakeClock, factor: float = 0.25) -> None:
        self.clock, self.factor = clock, factor
        self.measured: list[tuple[str, str]] = []
        self.stop_after: int | None = None
        self.wrong = False

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        if self.stop_after is not None and len(self.measured) >= self.stop_after:
            raise KeyboardInterrupt
        self.clock.advance(1.0)
        self.measured.append((setting.key, prompt.id))
        speed, tokens = 10.0, (1, 2, 3)
        if setting.strategy != PLAIN:
            speed *= self.factor * int(setting.params["k"])
            tokens = (1, 2, 4) if self.wrong else tokens
        return Sample(tokens, speed, 2 / speed, forwards=2)


WORKLOAD = Workload("w", tuple(Prompt(str(i), text="x") for i in range(4)))


def run(
    trace: Trace, store: MemoryStore, budget: float = 100.0, **options: Any
) -> TuneResult:
    return tune_with(
        TuneInputs(
            trace,
            [Several],
            WORKLOAD,
            store,
            PLACE,
            TuneOptions(**{"budget": budget, "trials": 12, **options}),
            clock=trace.clock,
            progress=Progress(None, trace.clock),
        )
    )


def test_the_space_is_what_the_parameters_declare() -> None:
    space = distributions(SeveralParams)
    assert set(space) == {"k", "kind", "width"}
    assert repr(space["k"]) == "IntDistribution(high=8, log=False, low=1, step=1)"
    assert repr(space["kind"]) == "CategoricalDistribution(choices=('a', 'b'))"


def test_a_conditional_parameter_is_searched_only_where_it_matters() -> None:
    assert "width" not in tuned(SeveralParams, SeveralParams().model_dump())
    assert "width" in tuned(SeveralParams, SeveralParams(kind="b").model_dump())
    store, trace = MemoryStore(), Trace(FakeClock())
    result = run(trace, store, budget=1000.0, trials=30)
    trials = store.trials(result.run)
    assert {t.params["kind"] for t in trials} == {"a", "b"}
    assert {t.params["width"] for t in trials if t.params["kind"] == "a"} == {0.5}


def test_the_search_starts_with_the_defaults_and_finds_what_is_faster() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    result = run(trace, store)
    first = store.trials(result.run)[0]
    assert dict(first.params) == SeveralParams().model_dump()
    found = result.named[0]
    assert found.choice.strategy == "knob"
    assert int(found.choice.params["k"]) > 4
    ratios = {p.strategy: p.measurement.ratio for p in store.profiles()}
    knob = 0.25 * int(found.choice.params["k"])
    assert ratios == pytest.approx({PLAIN: 1.0, "knob": knob}, rel=1e-3)


def test_no_setting_is_measured_twice_in_the_search() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    result = run(trace, store, budget=1000.0, trials=40)
    settings = [json.dumps(dict(t.params)) for t in store.trials(result.run)]
    assert len(settings) == len(set(settings))


def test_plain_decoding_wins_when_nothing_is_faster() -> None:
    store, trace = MemoryStore(), Trace(FakeClock(), factor=0.12)
    found = run(trace, store).named[0]
    assert found.choice.strategy == PLAIN
    assert found.rows[0].strategy == PLAIN


def test_an_interrupted_run_continues_without_measuring_again() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    trace.stop_after = 9  # in the middle of a trial
    with pytest.raises(Interrupted):
        run(trace, store)
    trace.stop_after = None
    result = run(trace, store)
    trials = store.trials(result.run)
    assert len({t.number for t in trials}) == len(trials)
    assert len({json.dumps(dict(t.params)) for t in trials}) == len(trials)
    assert result.named[0].choice.strategy == "knob"


def test_a_leader_whose_strategy_is_gone_is_not_measured_again() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    found = run(trace, store, trials=2)
    (name,) = [found.name for found in found.named]
    prompts = store.trials(found.run)[0].detail["prompts"]
    gone = {Setting("gone", {}).key: {prompt: [2.0] for prompt in prompts}}
    store.put_record(found.run, raced_key(name), gone)
    assert run(trace, store, trials=12).named[0].choice.strategy == "knob"


@pytest.mark.parametrize("budget", [0.0, 5.0, 20.0, 60.0])
def test_the_budget_is_kept_but_for_the_trial_at_hand(budget: float) -> None:
    trace = Trace(FakeClock())
    result = run(trace, MemoryStore(), budget=budget)
    # Whatever the budget: plain decoding once, one held-out prompt by all settings.
    assert trace.clock.now <= budget + 4
    assert result.named


def test_a_small_budget_says_what_it_skipped() -> None:
    result = run(Trace(FakeClock()), MemoryStore(), budget=0.0)
    assert any("no time for knob" in note for note in result.notes)


def test_a_setting_that_changes_the_output_is_disqualified_loudly() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    trace.wrong = True
    result = run(trace, store)
    assert {t.state for t in store.trials(result.run)} == {"failed"}
    assert result.named[0].choice.strategy == PLAIN
    assert any("NOT LOSSLESS" in note for note in result.notes)


def test_a_failing_trial_is_recorded_with_its_parameters_and_the_search_goes_on() -> (
    None
):
    class Fragile(Trace):
        def measure(self, setting: Setting, prompt: Prompt) -> Sample:
            if setting.params.get("k") == 4:
                raise RuntimeError("no fours")
            return super().measure(setting, prompt)

    store, trace = MemoryStore(), Fragile(FakeClock())
    result = run(trace, store)
    failed = [t for t in store.trials(result.run) if t.state == "failed"]
    assert failed
    assert all(t.params["k"] == 4 for t in failed)
    assert "no fours" in failed[0].detail["error"]
    assert result.named[0].choice.strategy == "knob"


def test_fresh_forgets_what_was_measured() -> None:
    store, trace = MemoryStore(), Trace(FakeClock())
    run(trace, store)
    count = len(trace.measured)
    run(trace, store, fresh=True, trials=1)
    default = Setting("knob", SeveralParams().model_dump()).key
    assert default in {key for key, _ in trace.measured[count:]}


def test_the_result_is_json_with_every_confirmed_setting() -> None:
    result = run(Trace(FakeClock()), MemoryStore())
    data = json.loads(json.dumps(result.as_json()))
    (found,) = data["classes"]
    assert found["winner"] == "knob"
    assert [r["winner"] for r in found["results"]] == [True, False]
    assert {"tokens_per_second", "ratio_low", "tokens_per_forward", "identical"} <= set(
        found["results"][0]
    )


def test_a_near_tie_is_within_the_dtypes_rounding() -> None:
    import torch

    logits = torch.tensor([16.0, 15.9, 12.0])
    assert near_tie(logits, 0, 1, torch.bfloat16)
    assert not near_tie(logits, 0, 2, torch.bfloat16)
    assert not near_tie(logits, 0, 1, torch.float32)


def test_what_there_was_no_time_for_is_told_once_for_the_same_classes() -> None:
    class Missed:
        def __init__(self, prompt_class: str, name: str) -> None:
            self.prompt_class, self.name = prompt_class, name

    missed: list[Any] = [
        Missed(prompt_class, name)
        for name, classes in (("suffix", "ab"), ("hybrid", "ab"), ("medusa", "b"))
        for prompt_class in classes
    ]
    assert untried_lines(missed) == [
        "a, b: no time for suffix, hybrid; give a larger --budget",
        "b: no time for medusa; give a larger --budget",
    ]
