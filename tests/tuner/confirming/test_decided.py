"""What is stored as the choices of a run that is continued."""

from __future__ import annotations

from adaptspec.profile import PLAIN
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.records import confirmed_key
from continued import HELD_OUT, Other, tune


def test_what_there_was_no_time_for_was_not_tried() -> None:
    store = MemoryStore()
    tune(store, budget=0.0)
    assert [list(choice.tried) for choice in store.choices()] == [[]] * len(
        store.choices()
    )
    tune(store)
    assert {tuple(choice.tried) for choice in store.choices()} == {("knob", "other")}


def test_a_strategy_that_is_gone_is_decided_on_no_more() -> None:
    def needs(setting: Setting) -> tuple[bool, bool]:
        assert setting.strategy == "other"
        return False, False

    store = MemoryStore()
    tune(store)
    result = tune(store, strategies=(Other,), needs=needs)
    assert [found.choice.strategy for found in result.named] == ["other", "other"]
    assert {tuple(choice.tried) for choice in store.choices()} == {("other",)}


def test_a_class_whose_record_is_lost_keeps_its_choice() -> None:
    store = MemoryStore()
    run = tune(store).run
    (before,) = [c for c in store.choices() if c.prompt_class == "code"]
    store.put_record(run, confirmed_key("code"), {})
    tune(store, failing=HELD_OUT["code"])
    assert before.picks[0].strategy != PLAIN
    assert before in store.choices()


def test_a_class_that_joins_a_pinned_run_is_pinned() -> None:
    store = MemoryStore()
    run = tune(store, failing=HELD_OUT["code"]).run
    store.pin(run, True)
    tune(store)
    choices = store.choices(run=run)
    assert "code" in {choice.prompt_class for choice in choices}
    assert all(choice.pinned for choice in choices)
