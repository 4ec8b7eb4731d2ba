"""A run that is continued keeps what it confirmed on more prompts."""

from __future__ import annotations

import pytest

from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.records import confirmed_key
from continued import HELD_OUT, tune


@pytest.mark.parametrize(
    ("failing", "budget", "said"),
    [
        ([], 0.0, "no time to confirm chat, code again; what was confirmed stays"),
        (
            HELD_OUT["chat"][1:],
            1e6,
            "chat: confirmed on 1 prompts now, but on 4 before; what was confirmed "
            "then stays",
        ),
    ],
)
def test_fewer_prompts_replace_nothing(
    failing: list[str], budget: float, said: str
) -> None:
    store = MemoryStore()
    before = tune(store)
    profiles = store.profiles(run=before.run, prompt_class="chat")
    record = store.record(before.run, confirmed_key("chat"))
    after = tune(store, failing, budget=budget)
    assert said in after.notes
    assert after.run == before.run
    assert store.record(before.run, confirmed_key("chat")) == record
    assert store.profiles(run=before.run, prompt_class="chat") == profiles
    chosen = [(found.name, found.choice.strategy) for found in after.named]
    assert chosen == [("chat", "knob"), ("code", "knob")]
    assert {choice.prompts for choice in store.choices()} == {4, 8}


def test_as_many_prompts_replace_what_was_confirmed_before() -> None:
    store = MemoryStore()
    before = tune(store)
    after = tune(store, HELD_OUT["chat"][2:])
    first = {found.name: found.profiles[0].created for found in before.named}
    assert all(found.profiles[0].created > first[found.name] for found in after.named)
