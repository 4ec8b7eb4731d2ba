"""The latency curve: what it interpolates, and that measuring leaves nothing behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.model import forward_times as subject
from adaptspec.model.forward_times import LatencyCurve, measure_latency, rising
from adaptspec.testing.fakes import tiny_model


def test_between_and_beyond_the_measured_sizes_it_is_a_line() -> None:
    curve = LatencyCurve((1, 3, 5), (1.0, 2.0, 6.0))
    assert [curve(rows) for rows in (1, 2, 3, 4, 5, 7)] == [1, 1.5, 2, 4, 6, 10]
    assert LatencyCurve((1,), (2.0,))(50) == 2.0


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6), st.integers(1, 40))
def test_it_never_falls(rises: list[float], rows: int) -> None:
    seconds = [sum(rises[: i + 1]) for i in range(len(rises))]
    curve = LatencyCurve([1 + 4 * i for i in range(len(rises))], seconds)
    assert curve(rows) <= curve(rows + 1)


def test_noise_cannot_make_more_tokens_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = {1: [5.0, 3.0], 2: [4.0, 2.0], 4: [9.0, 7.0]}
    left = {count: list(times) for count, times in noisy.items()}
    warm_up = [True]

    def timed(model: object, cache: object, tokens: list[int], _: int) -> float:
        count = len(tokens)
        if warm_up.pop() if warm_up else False:
            return 100.0
        return left[count].pop(0)

    monkeypatch.setattr(subject, "_timed", timed)
    curve = measure_latency(tiny_model("llama"), rows=(1, 2, 4), rounds=2)
    # Two rounds: 1 and 2 rows are pooled, 4 stands out.
    assert list(curve.seconds) == pytest.approx([3.35, 3.35, 63**0.5], rel=1e-3)


def test_a_machine_slow_for_whole_rounds_leaves_the_shape_of_the_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = (1, 2, 4, 8, 64)
    counts: list[int] = []
    moods = [1.0, 2.5, 1.1, 0.9, 1.7, 1.0, 3.0, 1.0, 0.8]

    def timed(model: object, cache: object, tokens: list[int], _: int) -> float:
        count = len(tokens)
        counts.append(count)
        turn = counts.count(count) - (2 if count == 1 else 1)  # the warm-up
        mood = moods[(4 * turn if count == 64 else turn)]
        pause = 30.0 if (count, turn) == (4, 5) else 1.0
        return (3.0 + count) * mood * pause

    monkeypatch.setattr(subject, "_timed", timed)
    curve = measure_latency(tiny_model("llama"), rows=sizes, rounds=9)
    assert counts.count(2) == 9
    assert counts.count(64) == 3  # large sizes take fewer
    assert [s / curve.seconds[0] for s in curve.seconds] == pytest.approx(
        [(3 + count) / 4 for count in sizes]
    )
    assert curve.seconds[0] == pytest.approx(4.0)  # of a round of middling speed


def test_sizes_are_timed_up_and_down_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def timed(model: object, cache: object, tokens: list[int], _: int) -> float:
        count = len(tokens)
        counts.append(count)
        return 1.0

    monkeypatch.setattr(subject, "_timed", timed)
    measure_latency(tiny_model("llama"), rows=(1, 2, 4), rounds=3)
    assert counts == [1, *(1, 2, 4), *(4, 2, 1), *(1, 2, 4)]


@pytest.mark.parametrize("text", [[3, 1, 4, 1, 5, 9, 2, 6], []])
def test_forwards_are_timed_on_the_tokens_of_a_text_or_of_the_whole_vocabulary(
    text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def timed(model: object, cache: object, tokens: list[int], _: int) -> float:
        read.append(tokens)
        return 1.0

    monkeypatch.setattr(subject, "_timed", timed)
    model = tiny_model("llama")
    timer = subject.LatencyTimer(model, (1, 4), text=text)
    for _ in range(8):
        timer.round()
    fours = [tokens for tokens in read if len(tokens) == 4]
    if text:
        twice = text + text
        windows = [twice[at : at + 4] for at in range(len(text))]
        assert all(tokens in windows for tokens in fours)
    else:
        every = {token for tokens in fours for token in tokens}
        assert max(every) < model.vocab_size
        assert len(every) > 8


@pytest.mark.slow
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_the_nearest_sequence_that_never_falls(seconds: list[float]) -> None:
    """Against its closed form: the greatest over starts of the least mean over ends."""
    places = range(len(seconds))

    def mean(first: int, last: int) -> float:
        return sum(seconds[first : last + 1]) / (last + 1 - first)

    expected = [
        max(
            min(mean(first, last) for last in places if last >= at)
            for first in places
            if first <= at
        )
        for at in places
    ]
    assert rising(seconds) == pytest.approx(expected)


@pytest.mark.slow
def test_a_real_measurement_covers_all_sizes() -> None:
    model = tiny_model("gpt2")  # learned positions: it must stay inside them
    curve = measure_latency(model, rows=(1, 2, 8), rounds=1)
    assert tuple(curve.rows) == (1, 2, 8)
    assert all(seconds > 0 for seconds in curve.seconds)
    assert model.latency is model.latency


def test_a_model_of_few_positions_is_measured_inside_them() -> None:
    model = tiny_model("gpt2")
    length = model.max_length
    assert length is not None
    curve = measure_latency(model, rows=(1, length - 1, length, 4 * length), rounds=1)
    assert tuple(curve.rows) == (1, length - 1)
