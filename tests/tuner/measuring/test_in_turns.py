"""Turns by place in the answer, one answer for all, and what is timed of each step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.host import Host
from adaptspec.testing.fakes import hf_greedy, tiny_model
from adaptspec_tuner.measuring.in_turns import (
    SharedAnswer,
    decode_in_turns,
    take_turns,
)
from tuner_fakes import FakeGeneration, FakeMachine, FakeStep

PROMPT = [3, 4, 5, 3, 4, 5, 3]
NAMES = ["autoregressive", "prompt_lookup", "token_recycling", "draft_model"]


def steps(told: list[str], name: str, lengths: list[int]) -> Iterator[list[int]]:
    for length in lengths:
        told.append(name)
        yield [0] * length


def test_the_one_with_the_fewest_tokens_steps_next() -> None:
    told: list[str] = []
    lengths = {
        "one": [1, 1, 1, 1, 1, 1],
        "four": [1, 4, 1],
        "two": [1, 2, 2, 1],
    }
    taken = list(take_turns({n: steps(told, n, each) for n, each in lengths.items()}))
    assert told == [
        *("one", "four", "two", "one", "four", "two"),  # 2, 5, 3 tokens
        *("one", "two", "one", "one"),  # 5, 5, 5
        *("four", "two", "one"),
    ]
    assert [name for name, tokens in taken if tokens is None] == ["four", "two", "one"]


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(1, 5), min_size=1, max_size=8),
        min_size=2,
    )
)
def test_nobody_is_further_ahead_than_its_last_step(
    lengths: dict[str, list[int]],
) -> None:
    places, ended = dict.fromkeys(lengths, 0), set()
    for name, tokens in take_turns(
        {name: steps([], name, each) for name, each in lengths.items()}
    ):
        going = [place for other, place in places.items() if other not in ended]
        assert places[name] == min(going)
        if tokens is None:
            ended.add(name)
        else:
            places[name] += len(tokens)
    assert places == {name: sum(each) for name, each in lengths.items()}


def generation(
    engine: Engine, name: str, follow: Callable[[int, int], int] | None, **more: Any
) -> Run:
    controls = Controls.greedy(20) if not more else Controls(20, **more)
    return Run(engine, Host.installed().create(name, {}), PROMPT, controls, follow)


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}])
def test_who_writes_one_answer_writes_what_generate_does(more: dict[str, Any]) -> None:
    model = tiny_model("llama")
    engine, answer = Engine(model, tiny_model("llama")), SharedAnswer()
    runs = decode_in_turns(
        {
            name: functools.partial(
                generation, engine, name, answer.follow(name), **more
            )
            for name in NAMES
        }
    )
    expected = list(
        engine.generate(
            Host.installed().create("autoregressive", {}), PROMPT, Controls(20, **more)
        ).token_ids
    )
    if not more:
        assert expected == hf_greedy(model, PROMPT, 20)
    for name, run in runs.items():
        assert run.result.token_ids == expected
        assert answer.differences("autoregressive", name) == []
        assert len(run.pieces) == 1 + run.result.stats.target_forwards


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_followed_to_its_end_and_what_was_chosen_instead_is_known(
    name: str,
) -> None:
    """As where near ties fall otherwise for another: here at nearly every place."""
    engine = Engine(tiny_model("llama"), tiny_model("llama"))
    text = [*([7, 8, 9] * 4)[:11]]  # soon drafted by looking it up
    answer = SharedAnswer()
    answer.tokens += text
    runs = {
        who: functools.partial(generation, engine, who, answer.follow(who))
        for who in dict.fromkeys((name, "autoregressive"))
    }
    done = decode_in_turns(runs, needed="autoregressive")
    told = done[name].result.token_ids
    assert told[:11] == text
    plain = hf_greedy(engine.model, [*PROMPT, *text], 9)
    assert told[11:] == plain
    assert answer.differences("autoregressive", name) == []
    own = [hf_greedy(engine.model, [*PROMPT, *text[:at]], 1)[0] for at in range(11)]
    unlike = SharedAnswer()
    unlike.tokens += text
    for place, token in enumerate(text):
        unlike.follow("text")(place, token)
    unlike._own["model"] = answer._own[name]
    assert unlike.differences("text", "model") == [
        (at, text[at], own[at]) for at in range(11) if own[at] != text[at]
    ]


def test_the_first_at_a_place_writes_it_and_the_others_take_it() -> None:
    answer = SharedAnswer()
    one, other = answer.follow("one"), answer.follow("other")
    assert [one(0, 5), other(0, 6), other(1, 7), one(1, 8), one(2, 9)] == [
        *(5, 5, 7, 7, 9)
    ]
    assert answer.tokens == [5, 7, 9]
    assert answer.differences("one", "other") == [(0, 5, 6), (1, 8, 7)]
    assert answer.differences("other", "one") == [(0, 6, 5), (1, 7, 8)]


def test_pieces_are_timed_by_both_clocks_and_a_pause_is_in_one_of_them() -> None:
    machine = FakeMachine({0.35: 2.0})
    plan = [FakeStep(1)] * 3
    runs = decode_in_turns(
        {
            name: lambda: FakeGeneration(machine, 0.3, plan, lambda rows: 0.1)
            for name in ("one", "two")
        },
        clock=machine.clock,
        processor=machine.processor,
    )
    one, two = runs["one"].pieces, runs["two"].pieces
    assert [piece.when for piece in one] == [0, 2, 4, 6]
    assert [piece.when for piece in two] == [1, 3, 5, 7]
    assert [p.seconds for p in one] == pytest.approx([0.3, 0.1, 0.1, 0.1])
    assert [p.seconds for p in two] == pytest.approx([2.3, 0.1, 0.1, 0.1])
    assert [p.processor for p in two] == pytest.approx([0.6, 0.2, 0.2, 0.2])


class Failing(FakeGeneration):
    def __iter__(self) -> Any:
        yield from itertools.islice(super().__iter__(), 2)
        raise RuntimeError("no memory")


def test_who_raises_ends_and_the_others_go_on_unless_they_need_it() -> None:
    def begun(needed: str | None) -> dict[str, Any]:
        machine = FakeMachine()
        plan = [FakeStep(1)] * 5
        kinds = {"good": FakeGeneration, "bad": Failing}
        return decode_in_turns(
            {
                name: functools.partial(kind, machine, 0.1, plan, lambda rows: 0.1)
                for name, kind in kinds.items()
            },
            needed=needed,
            clock=machine.clock,
            processor=machine.processor,
        )

    runs = begun(None)
    assert str(runs["bad"].error) == "no memory"
    assert runs["good"].error is None
    assert len(runs["good"].result.token_ids) == 6
    assert len(begun("bad")["good"].result.token_ids) == 3
