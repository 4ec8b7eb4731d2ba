"""Classes are discovered where they pay on prompts held out, and only there."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import pytest
from pydantic import Field

import adaptspec_plugins
from adaptspec.classes.classifier import KEY, UNKNOWN
from adaptspec.cli.progress import Progress
from adaptspec.decoder import Decoder
from adaptspec.host import Host
from adaptspec.params import DraftingParams, Tunable
from adaptspec.testing.fakes import FakeClock, tiny_model, tiny_tokenizer
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.classes.discover import (
    FEWEST,
    classified,
    discover,
    known_only,
    probed,
)
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tune import tune
from adaptspec_tuner.tuning_run import TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob, KnobParams

RANDOM = random.Random(5)
WORDS = [f"word{i}" for i in range(300)]


def code(number: int) -> Prompt:
    names = RANDOM.sample(WORDS, 3)
    text = "\n".join(f"    {n}[{number}] = ({n} + {number});" for n in names * 2)
    return Prompt(f"code{number}", text=text)


def chat(number: int) -> Prompt:
    text = "Could you explain " + " ".join(RANDOM.sample(WORDS, 12)) + "?"
    return Prompt(f"chat{number}", text=text)


PROMPTS = [make(n) for n in range(16) for make in (code, chat)]


def is_code(prompt: Prompt) -> bool:
    return prompt.id.startswith("code")


def test_kinds_that_want_other_settings_become_classes() -> None:
    gains = {p.id: {"long": 3.0 if is_code(p) else 0.2, "short": 1.2} for p in PROMPTS}
    found = discover(PROMPTS, gains)
    names = {p.id: found.classifier.classify(str(p.content)) for p in PROMPTS}
    assert len({names[p.id] for p in PROMPTS}) == 2
    assert len({names[p.id] for p in PROMPTS if is_code(p)}) == 1
    # Half at 3.0 and half at 1.2, against the best one setting for all.
    assert found.gains[2] == pytest.approx((3.0 * 1.2) ** 0.5)
    assert found.gains[1] == pytest.approx(1.2)
    assert found.classifier.seconds > 0
    new = [code(99), chat(99)]
    assert [found.classifier.classify(str(p.content)) for p in new] == [
        names["code0"],
        names["chat0"],
    ]


def test_where_one_setting_is_best_for_all_there_is_one_class() -> None:
    same = {p.id: {"long": 2.0 if is_code(p) else 1.5, "short": 1.2} for p in PROMPTS}
    found = discover(PROMPTS, same)
    assert list(found.classifier.names) == ["auto-1"]
    assert len(found.gains) > 1


def test_noise_seldom_makes_classes() -> None:
    counts = []
    for seed in range(20):
        noise = random.Random(seed)
        gains = {
            p.id: {name: noise.lognormvariate(0.2, 0.3) for name in "abc"}
            for p in PROMPTS
        }
        counts.append(len(discover(PROMPTS, gains, seed).classifier.names))
    assert sum(count == 1 for count in counts) >= 12


def test_few_prompts_and_no_gains_make_one_class() -> None:
    few = PROMPTS[: 2 * FEWEST - 1]
    gains = {p.id: {"long": 3.0 if is_code(p) else 0.5} for p in few}
    assert len(discover(few, gains).classifier.names) == 1
    assert len(discover(PROMPTS, {}).classifier.names) == 1


def test_the_same_prompts_give_the_same_classes() -> None:
    gains = {p.id: {"long": 3.0 if is_code(p) else 0.5} for p in PROMPTS}
    one, other = discover(PROMPTS, gains, 3), discover(PROMPTS, gains, 3)
    assert one.classifier.questions == other.classifier.questions
    assert one.gains == other.gains


class DraftsParams(KnobParams, DraftingParams):
    draft_length: Annotated[int, Tunable(1, 12)] = Field(default=4)


class Drafts(Knob):
    """One that says how much it drafts."""

    name = "drafts"
    Params = DraftsParams


def test_settings_tried_are_the_defaults_and_the_bounds() -> None:
    assert [s.params["draft_length"] for s in probed(Drafts)] == [4, 1, 12]
    assert [dict(s.params) for s in probed(Knob)] == [{"k": 4}]


class Trace(FakeMeasurer):
    """Long drafts pay for code, and cost elsewhere."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        self.clock.advance(self.seconds)
        length = int(setting.params.get("draft_length", 0))
        speed = 10.0 * (1 + (0.2 if is_code(prompt) else -0.1) * length)
        return Sample((1, 2, 3), speed, 2 / speed, forwards=2)


def run(store: MemoryStore, prompts: Sequence[Prompt] = PROMPTS) -> TuneResult:
    clock = FakeClock()
    fast: Any = Trace(clock, 0.0)
    return tune_with(
        TuneInputs(
            Trace(clock, 1.0),
            [Drafts],
            Workload("w", tuple(prompts)),
            store,
            PLACE,
            TuneOptions(budget=2000.0, trials=6, classes="auto"),
            clock=clock,
            progress=Progress(None, clock),
            replayer=lambda plain: fast,
        )
    )


def test_tuning_discovers_classes_and_chooses_for_each() -> None:
    store = MemoryStore()
    result = run(store)
    chosen = {found.name: found.choice.strategy for found in result.classes}
    assert sorted(chosen) == ["auto-1", "auto-2"]
    assert sorted(chosen.values()) == ["autoregressive", "drafts"]
    record = store.record(result.run, KEY)
    assert record is not None
    assert record["names"] == ["auto-1", "auto-2"]
    assert any(note.startswith("class auto-1: ") for note in result.notes)
    for found in result.classes:
        assert all(p.measurement.prompts >= 4 for p in found.profiles)


def test_held_out_prompts_of_no_class_are_named() -> None:
    for number in range(20):
        prompts = [*PROMPTS, Prompt(f"strange{number}", text="ж" * 5000)]
        one = [replace(p, prompt_class="default") for p in prompts]
        if prompts[-1].id in {
            p.id for p in split(Workload("w", tuple(one)))[1].prompts
        }:
            break
    told = [n for n in run(MemoryStore(), prompts).notes if "of no class" in n]
    assert len(told) == 1
    assert told[0].endswith(prompts[-1].id)
    assert not any("of no class" in n for n in run(MemoryStore()).notes)


def test_a_continued_run_keeps_its_classes() -> None:
    store = MemoryStore()
    first = run(store)
    record = store.record(first.run, KEY)
    assert record is not None
    store.put_record(first.run, KEY, {**record, "names": ["mine", "yours"]})
    assert {found.name for found in run(store).classes} == {"mine", "yours"}


def test_prompts_unlike_those_tuned_on_are_of_no_class() -> None:
    gains = {p.id: {"long": 3.0 if is_code(p) else 0.5} for p in PROMPTS}
    found = discover(PROMPTS, gains).classifier
    strange = Workload("w", (Prompt("x", text="ж" * 5000),))
    assert classified(strange, found).prompts[0].prompt_class == UNKNOWN


def test_prompts_unlike_all_classes_are_left_out_even_where_some_were_tuned_on() -> (
    None
):
    names = ("auto-1", UNKNOWN, "auto-2", "auto-1")
    prompts = tuple(
        Prompt(str(i), prompt_class=name, text="x") for i, name in enumerate(names)
    )
    kept, left = known_only(Workload("w", prompts), ["auto-1", UNKNOWN])
    assert [prompt.id for prompt in kept.prompts] == ["0", "3"]
    assert left == ["1", "2"]


def test_a_model_tuned_with_discovered_classes_chooses_by_them_in_use() -> None:
    """From `tune` to `generate`, with a real tiny model."""
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    prompts = tuple(
        Prompt(f"p{n}", text=" ".join(f"w{2 + (n * 7 + i) % 60}" for i in range(9)))
        for n in range(12)
    )
    store = MemoryStore()
    result = tune(
        model,
        workload=Workload("w", prompts),
        options=TuneOptions(
            budget_trials=1,
            classes="auto",
            strategies=["prompt_lookup"],
            max_new_tokens=6,
        ),
        db=store,
        host=Host({"bundled": adaptspec_plugins}),
    )
    assert result.classes
    used = Decoder(model, store=store, host=Host({"bundled": adaptspec_plugins}))
    names = {found.name for found in result.classes} | {UNKNOWN}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plain decoding is chosen
        found = used.generate("w2 w9 w16 w23 w30", max_new_tokens=4)
    assert found.choice.prompt_class in names
    assert found.seconds_classifying > 0
