"""Classes are discovered where they pay on prompts held out, and only there."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import adaptspec_plugins
from adaptspec.classes.classifier import KEY, STATES, UNKNOWN, Classifier
from adaptspec.cli.progress import Progress
from adaptspec.decoder import Decoder
from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import FakeClock, tiny_model, tiny_tokenizer
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.classes.discover import (
    FEWEST,
    ReadsStates,
    classified,
    discover,
    known_only,
    probed,
)
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tune import tune
from adaptspec_tuner.tuning_run import TuningRun
from tuner_fakes import PLACE, FakeMeasurer, Knob

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


def test_settings_tried_are_the_defaults_and_the_bounds() -> None:
    assert [s.params["k"] for s in probed(Knob)] == [4, 1, 12]


class Trace(FakeMeasurer):
    """Long drafts pay for code, and cost elsewhere."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        self.clock.advance(self.seconds)
        k = int(setting.params.get("k", 0))
        speed = 10.0 * (1 + (0.2 if is_code(prompt) else -0.1) * k)
        return Sample((1, 2, 3), speed, self.seconds, forwards=2)


def run(
    store: MemoryStore,
    prompts: Sequence[Prompt] = PROMPTS,
    states: ReadsStates | None = None,
) -> TuneResult:
    clock = FakeClock()
    fast: Any = Trace(clock, 0.0)
    return tune_with(
        TuningRun(
            Trace(clock, 1.0),
            [Knob],
            Workload("w", tuple(prompts)),
            store,
            PLACE,
            TuneOptions(budget=2000.0, trials=6, classes="auto"),
            clock=clock,
            progress=Progress(None, clock),
            states=states,
            replayer=lambda plain: fast,
        )
    )


def test_tuning_discovers_classes_and_chooses_for_each() -> None:
    store = MemoryStore()
    result = run(store)
    chosen = {found.name: found.choice.strategy for found in result.classes}
    assert sorted(chosen) == ["auto-1", "auto-2"]
    assert sorted(chosen.values()) == ["autoregressive", "knob"]
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


class Known:
    """States by prompt: kinds lie on either side of the first of many numbers."""

    layer = 3

    def __init__(self, noise: float = 1.0) -> None:
        self.asked: list[str] = []
        self.noise = noise

    def state(self, prompt: Prompt) -> list[float]:
        self.asked.append(prompt.id)
        chance = random.Random(prompt.id)
        side = {"code": 4.0, "chat": -4.0}.get(prompt.id.rstrip("0123456789"), 0.0)
        return [
            side * (1 if axis < 8 else 0) + chance.gauss(0, self.noise)
            for axis in range(48)
        ]


SAME = [Prompt(p.id, text="the same text") for p in PROMPTS]


def test_states_tell_apart_what_texts_do_not() -> None:
    gains = {p.id: {"long": 3.0 if is_code(p) else 0.2, "short": 1.2} for p in SAME}
    assert len(discover(SAME, gains).classifier.names) == 1
    states = Known()
    found = discover(SAME, gains, states=states)
    assert found.classifier.source == STATES
    assert found.classifier.seconds > 0
    assert found.classifier.states is not None
    assert found.classifier.states.layer == 3
    assert found.gains[2] == pytest.approx((3.0 * 1.2) ** 0.5)
    names = {p.id: found.classifier.classify_state(states.state(p)) for p in SAME}
    assert len({names[p.id] for p in SAME if is_code(p)}) == 1
    assert len(set(names.values())) == 2
    # Prompts that weren't there when it was learnt.
    new = [Prompt(f"{kind}{n}", text="") for kind in ("code", "chat") for n in (70, 71)]
    assert [found.classifier.classify_state(states.state(p)) for p in new] == [
        *(names["code0"], names["code0"], names["chat0"], names["chat0"])
    ]
    assert Classifier.from_json(found.classifier.as_json()) == found.classifier


def test_where_one_setting_is_best_for_all_states_make_one_class() -> None:
    same = {p.id: {"long": 2.0 if is_code(p) else 1.5, "short": 1.2} for p in SAME}
    found = discover(SAME, same, states=Known())
    assert list(found.classifier.names) == ["auto-1"]
    assert len(found.gains) > 1


def test_a_state_far_from_all_that_were_seen_is_unknown() -> None:
    """In a direction in which those hardly differed, too."""
    found = discover(SAME, {}, states=Known()).classifier
    near = [found.classify_state(Known().state(Prompt(f"code{n}"))) for n in range(50)]
    assert near.count(UNKNOWN) <= 2
    assert found.classify_state([100.0] * 48) == UNKNOWN
    assert found.classify_state([0.0] * 40 + [30.0] * 8) == UNKNOWN


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_few_prompts_states_make_one_class(count: int) -> None:
    found = discover(SAME[:count], {}, states=Known()).classifier
    assert list(found.names) == ["auto-1"]


def test_tuning_by_states_asks_each_prompt_once_and_a_continued_run_none() -> None:
    store, states = MemoryStore(), Known()
    first = run(store, SAME, states)
    chosen = {found.name: found.choice.strategy for found in first.classes}
    assert sorted(chosen) == ["auto-1", "auto-2"]
    assert sorted(chosen.values()) == ["autoregressive", "knob"]
    asked = len(states.asked)
    assert set(states.asked) == {p.id for p in SAME}
    again = run(store, SAME, states)
    assert len(states.asked) == asked
    assert {found.name for found in again.classes} == set(chosen)


def test_classes_of_states_cannot_be_told_without_states() -> None:
    found = discover(SAME, {}, states=Known()).classifier
    workload = Workload("w", tuple(SAME[:2]))
    with pytest.raises(AdaptSpecError, match="--class-features states"):
        classified(workload, found)
    known = {p.id: "auto-1" for p in SAME[:2]}
    assert classified(workload, found, known=known).classes == ("auto-1",)


def test_the_profiler_keeps_the_states_of_the_prefill_that_plain_decoding_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    prompt, other = Prompt("a", text="w2 w3 w4 w5 w6"), Prompt("b", text="w7 w8")
    host = Host({"bundled": adaptspec_plugins})
    keeping = Profiler(Engine(model), host, 6, keep_states=True)
    bare = Profiler(Engine(model), host, 6)
    sample = keeping.measure(PLAIN_SETTING, prompt)
    assert sample.tokens == bare.measure(PLAIN_SETTING, prompt).tokens
    alone = bare.state(prompt)
    read: list[int] = []
    prefill = LanguageModel.prefill

    def counted(self: LanguageModel, tokens: Sequence[int], *a: Any, **k: Any) -> Any:
        read.append(len(tokens))
        return prefill(self, tokens, *a, **k)

    monkeypatch.setattr(LanguageModel, "prefill", counted)
    assert keeping.state(prompt) == pytest.approx(alone)
    assert read == []
    keeping.state(other)
    keeping.state(other)
    assert read == [2]
    assert keeping.layer == 1


def test_a_model_tuned_by_states_chooses_by_them_when_it_is_used() -> None:
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
            class_features="states",
            strategies=["prompt_lookup"],
            max_new_tokens=6,
        ),
        db=store,
        host=Host({"bundled": adaptspec_plugins}),
    )
    assert result.classes
    record = store.record(result.run, KEY)
    assert record is not None
    assert record["features"][-1] == "rest"
    used = Decoder(model, store=store, host=Host({"bundled": adaptspec_plugins}))
    names = {found.name for found in result.classes} | {UNKNOWN}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plain decoding is chosen
        found = used.generate("w2 w9 w16 w23 w30", max_new_tokens=4)
    assert found.choice.prompt_class in names
    assert found.seconds_classifying > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"class_features": "states"}, "--classes auto"),
        ({"class_features": "smell", "classes": "auto"}, "'text' or 'states'"),
    ],
)
def test_features_that_are_none_or_without_discovery_are_refused(
    options: dict[str, str], said: str
) -> None:
    asked: Any = options
    with pytest.raises(AdaptSpecError, match=said):
        TuneOptions(**asked)
