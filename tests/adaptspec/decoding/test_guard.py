"""The guard on a clock of its own: what it lets drafting lose, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.guard import DraftedStep, Guard, GuardMemory, PlainTimes
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Requirements,
    Strategy,
    Target,
    reading_from,
)
from adaptspec.testing.fakes import tiny_model
from adaptspec.token_tree import TokenTree

NONE: Any = torch.empty(0)
pytestmark = pytest.mark.guarded
few = settings(deadline=None, max_examples=25)


class Scripted(Drafter):
    """Proposes a chain whenever it is asked; counts what it is told."""

    def __init__(self, tick: Callable[[float], None], nodes: int, took: float) -> None:
        self.tick, self.nodes, self.took = tick, nodes, took
        self.reading = 0.0  # a token
        self.once: dict[int, float] = {}  # call -> what it takes more
        self._first = self._read = self.most_read = 0
        self.asked = self.observed = 0
        self.closed = False

    def propose(self, context: Context) -> TokenTree:
        tokens = len(context.ids)
        first = reading_from(self._first, self._read, tokens, context.readable)
        unread = tokens - (self._read if first == self._first else first)
        self._first, self._read = first, tokens
        self.most_read = max(self.most_read, unread)
        once = self.once.get(self.asked, 0.0)
        self.tick(self.took + self.reading * unread + once)
        self.asked += 1
        return TokenTree.chain(
            context.ids[-1], [1] * min(self.nodes, context.max_nodes)
        )

    def observe(self, outcome: Outcome) -> None:
        self.observed += 1
        if outcome.tree is not None and len(outcome.tree) > 1:
            self._read += len(outcome.emitted) - 1  # what it drafted it knows

    def close(self) -> None:
        self.closed = True


class Decoding:
    """Sequences under one memory. A plain step takes 1, a candidate ``row`` more."""

    def __init__(
        self,
        row: float = 0.1,
        nodes: int = 8,
        took: float = 0.0,
        reading: float = 0.0,
        token: float = 0.0,
    ) -> None:
        self.memory = GuardMemory()
        self.row, self.nodes, self.took = row, nodes, took
        self.reading, self.token = reading, token
        self.now = 0.0
        self.speed = 1.0  # of the machine; above 1 is slower
        self.paused: dict[int, float] = {}  # step -> what it takes more
        self.drafted_once: dict[int, float] = {}  # the same of a call of the drafter
        self.asked_at: list[int] = []
        self.inner = Scripted(self.tick, nodes, took)

    def tick(self, time: float) -> None:
        self.now += time * self.speed

    def run(
        self,
        length: int,
        right: Callable[[int], int] = lambda at: 0,
        prompt: int = 1,
        reads: bool = False,
    ) -> float:
        """Decode ``length`` tokens; the time it took."""
        began = self.now
        inner = self.inner = Scripted(self.tick, self.nodes, self.took)
        inner.reading, inner.once = self.reading, self.drafted_once
        guard = Guard(inner, self.memory, lambda: self.now, prompt, length, reads=reads)
        self.tick(self.token * prompt)
        guard.observe(Outcome(None, (), [0], {}, NONE))
        emitted, step, self.asked_at = 1, 0, []
        while emitted < length:
            before = inner.asked
            tree = guard.propose(
                Context(range(prompt + emitted), length - emitted, 128, step)
            )
            if inner.asked > before:
                self.asked_at.append(emitted)
            nodes = len(tree) - 1
            self.tick(1 + self.row * nodes + self.paused.get(step, 0.0))
            accepted = min(right(emitted), nodes, length - emitted - 1)
            guard.observe(Outcome(tree, [0], [1] * (1 + accepted), {}, NONE))
            emitted, step = emitted + 1 + accepted, step + 1
        guard.close()
        assert inner.closed
        assert inner.observed == step + 1  # passed over or not, it sees every outcome
        self.guard = guard
        return self.now - began


@pytest.mark.slow
@few
@given(
    row=st.floats(0.005, 0.1),
    nodes=st.integers(1, 64),
    took=st.floats(0.0, 0.4),
    reading=st.floats(0.0, 0.05),
    lengths=st.lists(
        st.tuples(st.sampled_from([32, 200]), st.booleans()), min_size=1, max_size=8
    ),
)
def test_useless_drafting_costs_little_in_each_sequence_whatever_was_before(
    row: float,
    nodes: int,
    took: float,
    reading: float,
    lengths: list[tuple[int, bool]],
) -> None:
    decoding = Decoding(row, nodes, took, reading, token=0.05)
    decoding.memory = GuardMemory(bet_share=0.0)
    for length, good in lengths:
        right = (lambda at: nodes) if good else (lambda at: 0)
        time = decoding.run(length, right, 64, reading > 0)
        if not good:
            lost = time / (length - 1 + 64 * 0.05) - 1
            assert lost <= (0.05 if length == 32 else 0.02)


@pytest.mark.slow
@few
@given(row=st.floats(0.01, 0.1), nodes=st.integers(1, 64))
def test_drafting_that_stays_useless_costs_less_and_less(
    row: float, nodes: int
) -> None:
    decoding = Decoding(row, nodes)
    for _ in range(10):
        decoding.run(200)
    lost = sum(decoding.run(200) for _ in range(20)) / (20 * 199) - 1
    assert lost <= 0.0075


@pytest.mark.slow
@few
@given(
    row=st.floats(0.0, 0.05),
    right=st.integers(1, 8),
    took=st.floats(0.0, 0.3),
    length=st.integers(100, 400),
)
def test_useful_drafting_costs_nothing_to_speak_of(
    row: float, right: int, took: float, length: int
) -> None:
    decoding = Decoding(row, right, took)
    times = [decoding.run(length, lambda at: right) for _ in range(4)]
    # In every step; a last one may be cut short.
    step = 1 + row * right + took
    free = (length - 1) / (1 + right) * step
    if step / (1 + right) < 0.95:
        assert times[0] <= 1.03 * free + 2 * step
        assert times[-1] <= 1.01 * free + step + 1


@few
@given(row=st.floats(0.01, 0.1), useless=st.integers(30, 600))
def test_drafting_comes_back_when_it_begins_to_pay(row: float, useless: int) -> None:
    decoding = Decoding(row, 8)
    decoding.run(useless + 800, lambda at: 0 if at < useless else 8)
    later = [at for at in decoding.asked_at if at >= useless]
    assert later[0] - useless <= 1.6 / 0.0075 * 2
    assert len(later) >= (useless + 800 - later[0]) / 9 * 0.95  # and stays


def test_what_was_gained_is_not_lost_again() -> None:
    decoding = Decoding(0.05, 8)
    time = decoding.run(400, lambda at: 4 if at < 100 else 0)
    gaining = 100 / 5 * 1.4
    assert time - gaining - 300 <= 1 + 0.0075 * 500 + 5 + 1.4


def test_a_machine_that_slows_down_does_not_end_useful_drafting() -> None:
    decoding = Decoding(0.05, 4)
    decoding.run(200, lambda at: 2)
    decoding.speed = 3.0
    decoding.run(400, lambda at: 2)
    assert len(decoding.asked_at) >= 0.9 * (400 / 3)


@pytest.mark.slow
@few
@given(st.integers(0, 60), st.floats(5.0, 100.0))
def test_a_pause_neither_ends_drafting_nor_lets_it_lose_more(
    step: int, pause: float
) -> None:
    useful = Decoding(0.05, 8)
    useful.run(200, lambda at: 4)
    useful.paused = {step: pause}
    useful.run(400, lambda at: 4)
    assert len(useful.asked_at) >= 0.9 * 80
    useless = Decoding(0.05, 8)
    useless.paused = {step: pause}
    assert useless.run(200) - pause <= 1.03 * 199


@pytest.mark.parametrize("at", [0, 1, 5])
def test_what_a_drafter_does_once_does_not_end_drafting(at: int) -> None:
    """Such as timing forwards before its first tree, or a pause in its own work."""
    decoding = Decoding(0.05, 4)
    decoding.drafted_once[at] = 300.0
    decoding.run(120, lambda at: 4)
    assert len(decoding.asked_at) >= 0.75 * (120 / 5)


def test_finding_nothing_is_free_where_looking_is() -> None:
    decoding = Decoding(nodes=0, took=0.001)
    assert decoding.run(400) <= 399 * 1.0011
    assert decoding.inner.asked == 398  # the first step is plain, to be timed


def test_looking_long_for_nothing_is_bounded() -> None:
    decoding = Decoding(nodes=0, took=0.3)
    assert decoding.run(400) <= 399 * 1.015


def test_few_candidates_are_verified_where_more_might_cost_too_much() -> None:
    decoding = Decoding(0.1, 64)
    memory = decoding.memory
    assert memory.most_nodes(128, left=0.6) == 1
    decoding.run(400)
    assert 0.3 <= memory.risk(3) < 0.5
    assert memory.most_nodes(128, left=0.3) <= 3
    decoding.run(200, lambda at: 20)
    assert memory.most_nodes(64, left=10.0) >= 31


def test_known_costs_tell_what_candidates_cost_before_any_was_verified() -> None:
    memory = GuardMemory(PlainTimes(lambda: lambda rows: 2.0 + 0.1 * rows))
    assert memory.risk(15) == pytest.approx(3.6 / 2.1 - 1)


def test_what_candidates_cost_follows_the_steps_that_verify_them() -> None:
    memory = GuardMemory()
    memory.plain.add_step(1.0)
    risks = [memory.risk(3)]
    for seconds in (1.3, 2.0):
        memory.drafted(DraftedStep(emitted=1, seconds=seconds, nodes=3))
        risks.append(memory.risk(3))
    assert risks[0] > risks[1] < risks[2]


@pytest.mark.slow
@few
@given(row=st.floats(0.01, 0.1), nodes=st.integers(1, 64))
def test_a_useless_answer_after_good_ones_loses_no_more_than_in_a_first_one(
    row: float, nodes: int
) -> None:
    decoding = Decoding(row, nodes, token=0.05)
    for _ in range(5):
        decoding.run(200, lambda at: nodes, 64)
    plain = 199 + 64 * 0.05
    assert decoding.run(200, prompt=64) <= 1.0165 * plain


def test_a_draft_model_is_told_what_it_may_read_and_nobody_else() -> None:
    told: list[tuple[int | None, int]] = []

    class Told(Nothing):
        def propose(self, context: Context) -> TokenTree:
            told.append((context.readable, context.max_nodes))
            return super().propose(context)

    for may_read in (False, True):
        guard = Guard(Told(), GuardMemory(), lambda: 0.0, may_read=may_read)
        guard.observe(Outcome(None, (), [1], {}, NONE))
        guard._memory.plain.add_step(1.0)
        guard.propose(Context([1, 1], 9, 128, 0))
    assert told[0][0] is None
    assert told[1][0] is not None
    assert all(1 <= most < 128 for _, most in told)


def test_a_draft_model_reads_no_more_of_a_prompt_than_may_be_lost() -> None:
    decoding = Decoding(0.02, 4, took=0.1, reading=0.15, token=0.6)
    for _ in range(5):
        time = decoding.run(32, prompt=200, reads=True)
        assert time <= (31 + 200 * 0.6) * 1.05
        assert decoding.inner.most_read < 200


def test_a_strategy_that_paid_may_lose_more_where_its_prompt_is_long() -> None:
    def lost(bet_share: float, length: int) -> tuple[float, int]:
        decoding = Decoding(0.02, 4, took=0.2, reading=0.01, token=0.03)
        decoding.memory = GuardMemory(bet_share=bet_share)
        for _ in range(5):
            decoding.run(length, lambda at: 4, prompt=40, reads=True)
        time = decoding.run(length, prompt=350, reads=True)
        return time / (length - 1 + 350 * 0.03) - 1, decoding.inner.most_read

    bet, read = lost(0.08, 64)
    assert 0.045 < bet <= 0.08
    assert read >= 350
    for share, length in ((0.0, 64), (0.08, 32)):
        strict, read = lost(share, length)
        assert strict <= 0.05
        assert read < 350


def test_a_draft_model_reads_prompts_where_answers_repay_it() -> None:
    decoding = Decoding(0.02, 4, took=0.4, reading=0.0125, token=0.05)
    for _ in range(3):
        decoding.run(200, lambda at: 4, prompt=40, reads=True)
    time = decoding.run(400, lambda at: 4, prompt=400, reads=True)
    assert decoding.inner.most_read >= 400  # once something was gained
    assert decoding.inner.asked >= 75
    assert time <= 1.5 * 5 + 0.05 * 400 + 80 * 1.48 * 1.05


def test_a_drafter_whose_speed_is_promised_may_lose_all_at_once() -> None:
    memory = GuardMemory()
    before = memory.allowed(10.0, 210.0)
    memory.promise(0.9)
    assert memory.allowed(10.0, 210.0) == before
    memory.promise(1.5)
    assert before < memory.allowed(10.0, 210.0) <= 0.02 * 210
    assert memory.allowed(10.0, 40.0) <= 0.05 * 40


def test_what_drafting_gained_is_told() -> None:
    decoding = Decoding(0.05, 4)
    decoding.run(100, lambda at: 0)
    time = decoding.run(100, lambda at: 4)
    assert decoding.guard.gained == pytest.approx(99 - time, rel=0.05)
    useless = Decoding(0.05, 4)
    useless.run(30)
    lost = useless.run(200) - 199
    assert useless.guard.gained == pytest.approx(-lost, abs=0.3)
    assert useless.guard.passed_over == 199 - useless.inner.asked > 150


def test_a_pause_in_a_plain_step_is_not_believed() -> None:
    times = PlainTimes()
    for seconds in (1.0, 1.0, 50.0, 1.1):
        times.add_step(seconds)
    assert times.step == pytest.approx(1.0, abs=0.1)


class Wrong(Strategy):
    """Proposes what nobody accepts, and asks for positions of the prompt."""

    name = "wrong"
    summary = "rejected chains"
    requires = Requirements()

    def observes(self, model: Any) -> Observes:
        return Observes(prefill_logits=64)

    def start(self, target: Target) -> Drafter:
        class Chain(Drafter):
            def propose(self, context: Context) -> TokenTree:
                return TokenTree.chain(context.ids[-1], [5] * 4)

            def observe(self, outcome: Outcome) -> None:
                shown.append(len(outcome.rows))

        return Chain()


shown: list[int] = []


class Steps:
    """A clock that each look moves on by one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_guard_is_on_by_default_and_output_does_not_depend_on_it() -> None:
    model = tiny_model("llama")
    ids = list(range(3, 60))
    strategy = Wrong()
    guarded = Engine(model, clock=Steps())
    free = Engine(model, clock=Steps(), guard=False)
    controls = Controls.greedy(40)
    outputs = []
    for engine in (guarded, free):
        shown.clear()
        run = engine.generate(strategy, ids, controls)
        outputs.append(run.token_ids)
        if engine is free:
            assert run.stats.passed_over == 0
            assert run.stats.drafted == len(run.stats.steps) - 1  # the last has no room
            assert run.stats.seconds_gained is None
            assert shown[0] == len(ids)
        else:
            assert run.stats.passed_over > 0
            assert run.stats.seconds_gained is not None
            assert run.stats.seconds_gained < 0
            assert 1 <= shown[0] < len(ids)  # what may be lost doesn't pay for all
    assert outputs[0] == outputs[1]


def test_strategies_of_an_engine_share_what_a_plain_step_takes() -> None:
    engine = Engine(tiny_model("llama"))
    one, other = Wrong(), Wrong()
    engine.generate(one, [1, 2, 3], Controls.greedy(8))
    assert engine.guard_memory(other).plain.step is not None
    assert engine.guard_memory(one) is not engine.guard_memory(other)
    assert engine.guard_memory(one) is engine.guard_memory(one)


class Nothing(Drafter):
    """Proposes nothing."""

    def propose(self, context: Context) -> TokenTree:
        return TokenTree.root_only(context.ids[-1])


def three_steps(inner: Drafter, memory: GuardMemory, starting: float) -> Guard:
    """A guard after a prompt and three steps of a second each, none accepted."""
    now = [0.0]
    guard = Guard(inner, memory, lambda: now[0], starting=starting)
    now[0] += 1
    guard.observe(Outcome(None, (), [1], {}, NONE))
    for step in range(3):
        tree = guard.propose(Context([1, 1], 9, 9, step))
        now[0] += 1
        guard.observe(Outcome(tree, [0], [1], {}, NONE))
    return guard


def test_what_starting_a_drafter_took_is_lost_once() -> None:
    guard = three_steps(Nothing(), GuardMemory(), starting=0.5)
    assert guard.gained == pytest.approx(-0.5)


def test_a_first_start_that_timed_forwards_says_nothing_of_drafting() -> None:
    memory = GuardMemory()
    for starting in (100.0, 0.1):
        inner = Watches(lambda seconds: None)
        guard = three_steps(inner, memory, starting)
        assert inner.asked
        assert guard.gained > -2


class Watches(Drafter):
    """Takes its time to look at every step, whether it was asked or not."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self.tick, self.asked = tick, 0

    def propose(self, context: Context) -> TokenTree:
        self.asked += 1
        return TokenTree.chain(context.ids[-1], [1] * min(4, context.max_nodes))

    def observe(self, outcome: Outcome) -> None:
        self.tick(0.05)


def test_watching_does_not_keep_a_drafter_from_being_asked_again() -> None:
    """It costs as much if drafting never comes back."""
    now = [0.0]

    def tick(time: float) -> None:
        now[0] += time

    inner = Watches(tick)
    guard = Guard(inner, GuardMemory(), lambda: now[0], room=400)
    tick(1)
    guard.observe(Outcome(None, (), [1], {}, NONE))
    for step in range(300):
        tree = guard.propose(Context([1] * (step + 2), 400 - step, 128, step))
        tick(1 + 0.05 * (len(tree) - 1))
        accepted = 0 if step < 100 else len(tree) - 1
        guard.observe(Outcome(tree, [0], [1] * (1 + accepted), {}, NONE))
    assert inner.asked >= 100
    assert guard.gained > 0
