"""The gate, on a clock of its own: what it costs where drafting loses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.gate import CREDIT, KEPT, SHARE, Gate, GateMemory
from adaptspec.strategy import Context, Drafter, Outcome
from adaptspec.token_tree import TokenTree


class Chain(Drafter):
    """Proposes one token; counts what it was told."""

    def __init__(self) -> None:
        self.asked = self.observed = 0
        self.closed = False

    def propose(self, context: Context) -> TokenTree:
        self.asked += 1
        return TokenTree.chain(context.ids[-1], [1])

    def observe(self, outcome: Outcome) -> None:
        self.observed += 1

    def close(self) -> None:
        self.closed = True


class Decoding:
    """Steps through a gate: a plain step takes one second, a drafting step ``cost``."""

    def __init__(self, memory: GateMemory | None = None) -> None:
        self.now = 0.0
        self.inner = Chain()
        self.gate = Gate(self.inner, memory or GateMemory(), lambda: self.now)
        self.tokens = 0

    def run(self, tokens: int, cost: Callable[[int], float], gain: int) -> None:
        """Decode ``tokens`` more; a drafting step emits ``gain`` of them."""
        end = self.tokens + tokens
        while self.tokens < end:
            tree = self.gate.propose(Context([0], 100, 100, 0))
            drafted = len(tree) > 1
            self.now += cost(self.tokens) if drafted else 1.0
            emitted = [1] * (gain if drafted else 1)
            self.tokens += len(emitted)
            none = None
            self.gate.observe(Outcome(tree, [0], emitted, {}, none))  # type: ignore[arg-type]


def test_a_drafter_that_gains_time_is_asked_nearly_always() -> None:
    decoding = Decoding()
    decoding.run(3000, lambda _: 1.2, gain=3)
    assert decoding.now < 3000 / 3 * 1.2 * 1.03


@given(st.floats(1.05, 3.0), st.integers(1, 400), st.integers(1, 20))
def test_a_drafter_that_loses_time_costs_no_more_than_the_exploration_budget(
    cost: float, length: int, answers: int
) -> None:
    memory = GateMemory()
    lost = asked = 0.0
    for _ in range(answers):
        decoding = Decoding(memory)
        decoding.run(length, lambda _: cost, gain=1)
        lost += decoding.now - length
        asked += decoding.inner.asked
    total = length * answers
    # The last trial may lose more than was expected of it.
    assert lost <= max(CREDIT, cost - 1) + SHARE * (total + lost) + 1e-6
    if total * SHARE > 3 * cost:
        assert asked > 3  # it is still tried now and then


def test_a_short_output_loses_little_once_drafting_is_known_to_lose() -> None:
    memory = GateMemory()
    Decoding(memory).run(400, lambda _: 1.6, gain=1)
    later = Decoding(memory)
    later.run(64, lambda _: 1.6, gain=1)
    assert later.now <= 64 * 1.05


def test_drafting_resumes_when_it_begins_to_gain_time() -> None:
    decoding = Decoding()
    decoding.run(500, lambda _: 2.0, gain=1)
    asked, then = decoding.inner.asked, decoding.now
    decoding.run(4000, lambda _: 1.2, gain=3)
    assert decoding.inner.asked - asked > 1000
    assert decoding.now - then < 4000 / 3 * 1.2 * 1.05 + 50


def test_the_gate_stays_open_when_drafting_and_plain_steps_slow_down_alike() -> None:
    decoding = Decoding()
    speed = {"factor": 1.0}
    plain = decoding.gate._memory

    def step(drafts: int) -> None:
        for _ in range(drafts):
            tree = decoding.gate.propose(Context([0], 100, 100, 0))
            drafted = len(tree) > 1
            decoding.now += speed["factor"] * (1.2 if drafted else 1.0)
            emitted = [1] * (2 if drafted else 1)
            decoding.gate.observe(Outcome(tree, [0], emitted, {}, None))  # type: ignore[arg-type]

    step(200)
    speed["factor"] = 1.5
    before = decoding.inner.asked
    step(400)
    assert plain.plain.value is not None
    assert decoding.inner.asked - before > 370


def test_the_drafter_sees_every_outcome_and_the_end() -> None:
    decoding = Decoding()
    decoding.run(100, lambda _: 2.0, gain=1)
    decoding.gate.observe(Outcome(None, (), [1], {}, None))  # type: ignore[arg-type]
    decoding.gate.close()
    assert decoding.inner.observed == 101
    assert decoding.inner.closed


def test_the_prefill_is_not_counted_as_a_step() -> None:
    memory = GateMemory()
    gate = Gate(Chain(), memory, lambda: 0.0)
    gate.observe(Outcome(None, (), [1], {}, None))  # type: ignore[arg-type]
    assert memory == GateMemory()


class Silent(Chain):
    """Takes ``cost`` seconds to find nothing."""

    def __init__(self, tick: Callable[[float], None], cost: float) -> None:
        super().__init__()
        self.tick, self.cost = tick, cost

    def propose(self, context: Context) -> TokenTree:
        self.asked += 1
        self.tick(self.cost)
        return TokenTree.root_only(context.ids[-1])


@pytest.mark.parametrize("cost", [0.0, 0.0001, 0.3, 2.0])
def test_the_time_of_empty_proposals_is_counted_and_bounded(cost: float) -> None:
    decoding = Decoding()
    memory = decoding.gate._memory

    def tick(seconds: float) -> None:
        decoding.now += seconds

    inner = Silent(tick, cost)
    decoding.gate = Gate(inner, memory, lambda: decoding.now)
    decoding.run(1000, lambda _: 1.0, gain=1)
    assert memory.plain.value == pytest.approx(1.0)
    assert decoding.now - 1000 <= max(CREDIT, cost) + SHARE * decoding.now
    if cost < SHARE:
        assert inner.asked == 999  # the first step shows what a plain one takes


def test_earlier_gains_do_not_raise_the_exploration_budget() -> None:
    decoding = Decoding()
    decoding.run(30_000, lambda _: 1.0, gain=3)
    before, tokens = decoding.now, decoding.tokens
    decoding.run(1000, lambda _: 2.0, gain=1)
    # Until the last ten steps say so, and what was kept of the share.
    assert decoding.now - before - (decoding.tokens - tokens) < 20 + KEPT + SHARE * 1000


class Reading(Chain):
    """A draft model: its first proposal in a sequence reads the prompt."""

    def __init__(self, tick: Callable[[float], None], reading: float) -> None:
        super().__init__()
        self.tick, self.reading = tick, reading

    def propose(self, context: Context) -> TokenTree:
        self.tick(self.reading + 0.1 if self.asked == 0 else 0.1)
        return super().propose(context)


class Answers:
    """Answers whose prompts a draft model has to read first; plain steps take 1."""

    def __init__(self, prompt: int, prefill: float, reading: float) -> None:
        self.memory = GateMemory()
        self.decoding = Decoding(self.memory)
        self.prompt, self.prefill, self.reading = prompt, prefill, reading

    def tick(self, seconds: float) -> None:
        self.decoding.now += seconds

    def answer(self, tokens: int, gain: int) -> tuple[float, int]:
        """Seconds of its decoding, and how often the draft was asked."""
        decoding = self.decoding
        inner = Reading(self.tick, self.reading)
        gate = Gate(inner, self.memory, lambda: decoding.now, self.prompt, True)
        decoding.gate = gate
        decoding.now += self.prefill
        gate.observe(Outcome(None, (), [1], {}, None))  # type: ignore[arg-type]
        started = decoding.now
        decoding.run(tokens, lambda _: 1.0, gain)
        gate.close()
        return decoding.now - started, inner.asked


def test_the_draft_model_reads_no_prompt_that_the_answer_cannot_repay() -> None:
    answers = Answers(prompt=100, prefill=40.0, reading=10.0)
    for _ in range(10):
        seconds, asked = answers.answer(12, gain=2)
        assert seconds == 12
        assert asked == 0


def test_the_draft_model_reads_a_prompt_that_the_usual_answer_repays() -> None:
    answers = Answers(prompt=100, prefill=8.0, reading=2.0)
    answers.answer(600, gain=2)
    seconds, asked = answers.answer(600, gain=2)
    assert asked > 280  # from the start
    assert seconds < 600 / 2 * 1.1 + 2 + 10
    assert answers.memory.reading.value == pytest.approx(0.02, rel=0.1)
    # The same prompt in front of short answers, once they are usual.
    for _ in range(80):
        seconds, asked = answers.answer(3, gain=2)
    assert asked == 0


def test_a_draft_model_that_loses_reads_few_prompts() -> None:
    answers = Answers(prompt=100, prefill=8.0, reading=2.0)
    lost = sum(answers.answer(40, gain=1)[0] - 40 for _ in range(50))
    assert lost <= max(CREDIT, 2.1) + SHARE * 50 * 48
    assert lost > 0  # it did find out
