"""Tunes of an engine whose true speeds are known, on a fake clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from adaptspec.engines.inference_engine import Method
from adaptspec.errors import AdaptSpecError, EngineError, UnknownStrategyError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.params import Scalar
from adaptspec.profile import EVERY_CLASS, PLAIN
from adaptspec.selector import select
from adaptspec.testing.scripted_engine import (
    COPY,
    DRAFT,
    KindParams,
    Machine,
    ScriptedEngine,
    copies_and_drafts,
    engine_on,
    workload_of,
)
from adaptspec.workloads import Prompt, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.engines.tune import tune_engine
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tune import tune
from adaptspec_tuner.tuning_run import Interrupted

CLASSES = ("summary", "code", "chat")
TRUTH = copies_and_drafts(
    {"summary": (0.8, 0.6), "code": (0.2, 0.9), "chat": (-0.05, 0.3)}
)


OPENED: list[type[ScriptedEngine]] = []  # the engines of the tests so far


def host_of(*classes: type) -> Host:
    """A host with these engines."""
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: list(classes)))
    return Host({"fakes": plugin})


def tuned(
    machine: Machine,
    budget: float = 600.0,
    *,
    store: MemoryStore | None = None,
    classes: Iterable[str] = CLASSES,
    prompts: int = 8,
    name: str = "scripted",
    **options: Any,
) -> tuple[TuneResult, ScriptedEngine]:
    """A tune on a machine, and the engine that was opened for it."""
    cls = engine_on(machine, name)
    OPENED.append(cls)
    result = tune(
        "model.gguf",
        None,
        workload_of(list(classes), prompts),
        TuneOptions(budget, **{"engine": name, **options}),
        db=store or MemoryStore(),
        host=host_of(cls),
        clock=machine.clock,
    )
    return result, cls.opened[-1]


def choices(result: TuneResult) -> dict[str, str]:
    """Class -> what is chosen."""
    return {found.name: found.choice.strategy for found in result.named}


def test_each_class_gets_its_method_and_chat_stays_plain() -> None:
    machine = Machine(TRUTH, noise=0.01)
    result, engine = tuned(machine)
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}
    assert machine.clock.now < 630  # the last answers end a little late
    assert engine.closed


def test_a_dear_start_is_made_once_a_setting_and_serves_all_classes() -> None:
    machine = Machine(TRUTH, start=60.0, room=2, noise=0.01)
    result, engine = tuned(machine, 2400.0)
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}
    settings = {(method, repr(params)) for method, params, _ in engine.log}
    # Once in the search and once in the confirmation, and plain decoding now and then.
    assert engine.starts <= 2 * len(settings) + 4
    assert machine.clock.now < 2500


def test_with_room_for_one_setting_it_is_tuned_all_the_same() -> None:
    machine = Machine(TRUTH, start=60.0, room=1, noise=0.01)
    result, _ = tuned(machine, 3600.0)
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}


def test_with_little_room_the_confirmation_goes_setting_by_setting() -> None:
    machine = Machine(TRUTH, room=2, noise=0.01)
    result, engine = tuned(machine, 900.0)
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}
    # Far fewer starts than answers, though each answer may want another setting.
    assert engine.starts < len(engine.log) / 2


def test_a_setting_that_fails_is_a_failed_trial_and_the_tune_goes_on() -> None:
    def fails(method: str, params: Mapping[str, Scalar], count: int) -> str | None:
        return "unknown option --bad" if params.get("kind") == "bad" else None

    forms = Method("forms", "has two", KindParams)
    machine = Machine(TRUTH, methods=(COPY, DRAFT, forms), fails=fails)
    store = MemoryStore()
    result, _ = tuned(machine, store=store)
    failed = [t for t in store.trials(result.run) if t.strategy == "forms"]
    assert {t.state for t in failed if t.params["kind"] == "bad"} == {"failed"}
    assert all(
        "unknown option" in t.detail["error"] for t in failed if t.state == "failed"
    )
    assert sum("unknown option" in note for note in result.notes) == 1
    assert choices(result)["code"] == "draft"


def test_an_engine_that_dies_on_the_way_leaves_what_was_measured() -> None:
    dead = 60

    def fails(method: str, params: Mapping[str, Scalar], count: int) -> str | None:
        return "killed" if count >= dead else None

    store = MemoryStore()
    machine = Machine(TRUTH, fails=fails)
    result, engine = tuned(machine, store=store)
    assert not result.named
    assert engine.closed
    assert any(t.state != "failed" for t in store.trials(result.run))
    # The same command continues, and asks nothing again that was tried.
    tried = {(t.prompt_class, t.strategy, t.number) for t in store.trials(result.run)}
    again, _ = tuned(Machine(TRUTH), store=store)
    assert again.run == result.run
    assert tried <= {
        (t.prompt_class, t.strategy, t.number) for t in store.trials(again.run)
    }
    assert again.named


HELD_OUT = {p.id for p in split(workload_of(CLASSES))[1].prompts}


def asked_held_out(engine: ScriptedEngine) -> set[tuple[str, str, str]]:
    """Method, parameters and held-out prompt of each answer but the first little
    ones."""
    first = engine.log[0][2][0]
    return {
        (method, repr(params), name)
        for method, params, names in engine.log
        for name in names
        if name in HELD_OUT and name != first
    }


def test_a_killed_confirmation_of_dear_starts_asks_nothing_twice() -> None:
    def kill(method: str, params: Mapping[str, Scalar], count: int) -> str | None:
        log = OPENED[-1].opened[-1].log
        if sum(names[0] in HELD_OUT for _, _, names in log) > 20:
            raise KeyboardInterrupt
        return None

    store = MemoryStore()
    with pytest.raises(Interrupted):
        tuned(Machine(TRUTH, start=60.0, room=1, fails=kill), 2400.0, store=store)
    before = asked_held_out(OPENED[-1].opened[-1])
    result, engine = tuned(Machine(TRUTH, start=60.0, room=1), 2400.0, store=store)
    drafting = {found for found in before if found[0] != PLAIN}
    assert drafting
    assert not drafting & asked_held_out(engine)
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}


def test_finished_classes_stay_where_starts_are_dear() -> None:
    class Forgets(MemoryStore):
        """Keeps no answers, so that any class could only be measured again."""

        def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
            if not key.startswith("answer/"):
                super().put_record(run, key, value)

    def run() -> tuple[TuneResult, ScriptedEngine]:
        machine = Machine(TRUTH, start=60.0, room=2)
        return tuned(machine, math.inf, store=store, budget_trials=12)

    store = Forgets()
    first, engine = run()
    assert {name[2].partition("/")[0] for name in asked_held_out(engine)} == {*CLASSES}
    again, engine = run()
    assert not asked_held_out(engine)
    assert choices(again) == choices(first)
    store.put_record(first.run, "confirm/code", {})
    last, engine = run()
    assert {name[2].partition("/")[0] for name in asked_held_out(engine)} == {"code"}
    assert choices(last) == choices(first)


@pytest.mark.parametrize("room", [1, 2])
def test_starts_slower_than_the_engine_says_do_not_overrun(room: int) -> None:
    machine = Machine(TRUTH, start=10.0, room=room, noise=0.01)
    cls = engine_on(machine)
    machine.start = 90.0
    result = tune_engine(
        *("model.gguf", None, workload_of(list(CLASSES), 8)),
        TuneOptions(1500.0, engine="scripted"),
        db=MemoryStore(),
        host=host_of(cls),
        clock=machine.clock,
    )
    assert result.named
    # A setting that was begun is measured to its end.
    assert machine.clock.now < 1500 + 90 + 60


def test_methods_are_asked_though_they_start_slower_than_plain_decoding() -> None:
    class Slower(Machine):
        @property
        def start(self) -> float:
            return 90.0 if self.clock.now < 100 else 140.0

        @start.setter
        def start(self, seconds: float) -> None: ...

    idle = Method("idle", "gains nothing", DRAFT.Params)
    store = MemoryStore()
    machine = Slower(TRUTH, room=2, noise=0.01, methods=(COPY, idle, DRAFT))
    result, _ = tuned(machine, 900.0, store=store)
    tried = {(t.strategy, t.prompt_class) for t in store.trials(result.run)}
    assert tried >= {(m, c) for m in ("copy", "idle", "draft") for c in CLASSES}
    assert choices(result)["chat"] == PLAIN
    assert PLAIN not in (choices(result)["summary"], choices(result)["code"])
    assert machine.clock.now <= 1.05 * 900


def test_an_engine_that_cannot_decode_plainly_ends_the_tune_in_one_line() -> None:
    machine = Machine(TRUTH, fails=lambda method, params, count: "no memory")
    with pytest.raises(EngineError, match=r"^scripted ended: no memory$"):
        tuned(machine)
    assert OPENED[-1].opened[-1].closed


def test_requests_at_the_same_time_are_of_one_class_and_all_count() -> None:
    machine = Machine(TRUTH, noise=0.01)
    result, engine = tuned(machine, concurrency=4)
    assert result.environment.concurrency == 4
    for _, _, prompts in engine.log:
        assert len(prompts) in (1, 4)
        assert len({name.partition("/")[0] for name in prompts}) == 1
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}
    alone, _ = tuned(Machine(TRUTH, noise=0.01))
    assert any("start together" in note for note in result.notes)
    assert not any("start together" in note for note in alone.notes)
    assert alone.run != result.run


def test_prompts_are_answered_beside_the_same_ones_of_their_half_only() -> None:
    _, engine = tuned(Machine(TRUTH), concurrency=3)
    halves = split(workload_of(CLASSES))
    parts = [{p.id for p in group} for h in halves for group in h.by_class().values()]
    # Each warm-up aside, which is one prompt as often as there are requests.
    asked = {frozenset(prompts) for _, _, prompts in engine.log}
    together = {group for group in asked if len(group) > 1}
    assert all(any(group <= part for part in parts) for group in together)
    every = [name for group in together for name in group]
    assert len(every) == len(set(every)) > len(CLASSES) * 4


def test_a_server_with_plain_decoding_alone_is_measured() -> None:
    store = MemoryStore()
    result, _ = tuned(Machine(TRUTH, methods=()), store=store)
    assert choices(result) == dict.fromkeys(CLASSES, PLAIN)
    profiles = store.profiles(run=result.run)
    assert {p.prompt_class for p in profiles} == {*CLASSES, EVERY_CLASS}
    assert all(p.measurement.tokens_per_second > 0 for p in profiles)


@pytest.mark.parametrize(
    ("ties", "identical", "near"), [(True, 0, 4), ("unknown", 0, 0), ("never", 4, 0)]
)
def test_near_ties_are_counted_where_the_engine_tells(
    ties: Any, identical: int, near: int
) -> None:
    result, _ = tuned(Machine(TRUTH, ties=ties))
    (row,) = [
        row for row in result.named[0].rows if row.strategy == "copy" and row.winner
    ]
    assert (row.measurement.identical, row.measurement.near_ties) == (identical, near)
    assert row.profile.lossless


def test_a_method_that_changes_the_output_is_never_chosen() -> None:
    result, _ = tuned(Machine(TRUTH, ties=False))
    assert set(choices(result).values()) == {PLAIN}
    assert any("NOT LOSSLESS" in note for note in result.notes)


def test_texts_are_compared_where_there_are_no_ids() -> None:
    result, _ = tuned(Machine(TRUTH, told_ids=False))
    row = result.named[0].winner
    assert row is not None
    assert row.measurement.identical == row.measurement.prompts == 4
    # What differs can't be told from a near tie, so it isn't called one.
    other, _ = tuned(Machine(TRUTH, told_ids=False, ties=False))
    row = other.named[0].winner
    assert row is not None
    assert row.strategy == "copy"
    assert (row.measurement.identical, row.measurement.near_ties) == (0, 0)


def test_engines_are_never_mixed() -> None:
    store = MemoryStore()
    ours, _ = tuned(Machine(TRUTH, noise=0.01), store=store)
    theirs, _ = tuned(
        Machine(lambda prompt, method, params: 0.9), store=store, name="b"
    )
    assert ours.run != theirs.run
    every = store.choices()
    assert {c.environment.engine for c in every} == {"scripted", "b"}
    assert select(every, ours.environment, "code").strategy == "draft"
    assert select(every, theirs.environment, "code").strategy == PLAIN


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"worker": True}, "--worker doesn't go with --engine scripted"),
        ({"baselines": True}, "--baselines doesn't go"),
        ({"max_memory": 5}, "--max-memory doesn't go"),
        ({"temperature": 0.7}, "--temperature doesn't go"),
        ({"control": [("min_p", 0.1)]}, "--control doesn't go"),
        ({"objective": "latency"}, "--objective latency doesn't go"),
        ({"ray": "auto"}, "--ray doesn't go"),
    ],
)
def test_what_another_engine_cannot_honour_is_refused(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(AdaptSpecError, match=match):
        tuned(Machine(TRUTH), **options)
    assert not OPENED[-1].opened


def test_unknown_names_are_told_with_those_there_are() -> None:
    with pytest.raises(EngineError, match="no engine 'lama'; known: scripted"):
        tuned(Machine(TRUTH), engine="lama")
    with pytest.raises(EngineError, match="no engine 'http://x:1/v1'"):
        tuned(Machine(TRUTH), engine="http://x:1/v1")
    with pytest.raises(UnknownStrategyError, match="has: copy, draft, eagle"):
        tuned(Machine(TRUTH), strategies=["medusa"])


def test_only_what_is_asked_for_is_tried() -> None:
    store = MemoryStore()
    result, _ = tuned(Machine(TRUTH), store=store, strategies=["copy", "eagle"])
    assert {t.strategy for t in store.trials(result.run)} == {"copy"}
    assert dict(result.unavailable) == {"eagle": "no heads were given (--heads)"}


def test_options_of_other_engines_are_refused_for_ours() -> None:
    with pytest.raises(AdaptSpecError, match="concurrency is for other engines"):
        TuneOptions(concurrency=4)
    with pytest.raises(AdaptSpecError, match="engine_command is for other engines"):
        TuneOptions(engine_command="x")


def test_a_methods_opening_is_tried_first_and_its_defaults_later() -> None:
    opening = {"length": 3, "ngram": 3}
    copy = Method("copy", "copies", COPY.Params, opening=opening)
    result, engine = tuned(Machine(TRUTH, methods=(copy, DRAFT)), classes=["summary"])
    asked = [params for method, params, _ in engine.log if method == "copy"]
    assert asked[0] == opening
    assert {"length": 8, "ngram": 2} in asked
    assert choices(result)["summary"] == "copy"


def test_many_methods_and_little_time_leave_some_for_the_parameters_of_the_best() -> (
    None
):
    """Of methods that gain nothing in the first class not all are tried in others."""

    def truth(prompt: Prompt, method: str, params: Mapping[str, Scalar]) -> float:
        if method != "copy":
            return 0.8
        return TRUTH(prompt, method, params)

    idle = [Method(f"idle_{n}", "gains nothing", DRAFT.Params) for n in range(10)]
    machine = Machine(truth, methods=(*idle, COPY), noise=0.01)
    result, engine = tuned(machine, 700.0, classes=("summary", "code", "chat"))
    assert choices(result)["summary"] == "copy"
    settings = {repr(params) for method, params, _ in engine.log if method == "copy"}
    assert len(settings) > 2  # the defaults are one of them
    assert machine.clock.now < 770


@pytest.mark.parametrize(
    ("start", "room", "requests"),
    [(3.0, 4, 1), (3.0, 1, 1), (60.0, 2, 1), (75.0, 1, 4)],
)
def test_every_method_is_asked_in_every_class_before_a_second_setting_of_any(
    start: float, room: int, requests: int
) -> None:
    idle = Method("idle", "gains nothing", DRAFT.Params)
    machine = Machine(
        TRUTH, start=start, room=room, noise=0.01, methods=(COPY, idle, DRAFT)
    )
    # Little beside the starts, which must not keep any method from being asked.
    budget = 300.0 + 14 * start
    store = MemoryStore()
    result, engine = tuned(machine, budget, store=store, concurrency=requests)
    opened: dict[str, str] = {}
    asked: set[tuple[str, str]] = set()
    for method, params, prompts in engine.log:
        if method == PLAIN:
            continue
        if opened.setdefault(method, repr(params)) != repr(params):
            break
        if prompts[0] not in HELD_OUT:
            asked |= {(method, name.partition("/")[0]) for name in prompts}
    assert asked == {(m, c) for m in ("copy", "idle", "draft") for c in CLASSES}
    tried = {(t.strategy, t.prompt_class) for t in store.trials(result.run)}
    assert tried >= asked  # what was measured counts
    assert result.named
    assert machine.clock.now <= 1.05 * budget + start


def test_a_killed_search_goes_on_where_it_was() -> None:
    def kill(method: str, params: Mapping[str, Scalar], count: int) -> str | None:
        if count > 20:
            raise KeyboardInterrupt
        return None

    store = MemoryStore()
    with pytest.raises(Interrupted) as stopped:
        tuned(Machine(TRUTH, fails=kill), store=store)
    run = stopped.value.result.run
    before = {(t.prompt_class, t.strategy, repr(t.params)) for t in store.trials(run)}
    assert before
    result, engine = tuned(Machine(TRUTH), store=store)
    assert result.run == run
    after = [(t.prompt_class, t.strategy, repr(t.params)) for t in store.trials(run)]
    assert len(after) == len(set(after)) > len(before)
    again = {
        (names[0].partition("/")[0], method, repr(params))
        for method, params, names in engine.log
        if names[0] not in HELD_OUT and names[0] != engine.log[0][2][0]
    }  # but each start's first little answer
    assert not before & again
    assert choices(result) == {"summary": "copy", "code": "draft", "chat": PLAIN}


def test_settings_of_earlier_runs_are_tried_again_in_their_classes() -> None:
    store = MemoryStore()
    first, _ = tuned(Machine(TRUTH), store=store)
    found = {f.name: f.choice for f in first.named if f.choice.strategy != PLAIN}
    last, _ = tuned(Machine(TRUTH), store=store, classes=(*CLASSES, "code"), prompts=7)
    assert last.run != first.run
    tried = {
        (t.prompt_class, t.strategy, repr(dict(t.params)))
        for t in store.trials(last.run)
    }
    assert {
        (name, choice.strategy, repr(dict(choice.params)))
        for name, choice in found.items()
    } <= tried
