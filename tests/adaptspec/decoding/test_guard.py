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
from adaptspec.decoding.guard import Budget, DraftedStep, Guard, GuardMemory, PlainTimes
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Requirements,
    Strategy,
    Target,
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
        self.first = 0.0
        self.asked = self.observed = 0
        self.closed = False

    def propose(self, context: Context) -> TokenTree:
        self.tick(self.took + (0.0 if self.asked else self.first))
        self.asked += 1
        return TokenTree.chain(
            context.ids[-1], [1] * min(self.nodes, context.max_nodes)
        )

    def observe(self, outcome: Outcome) -> None:
        self.observed += 1

    def close(self) -> None:
        self.closed = True


class Decoding:
    """Sequences under one memory. A plain step takes 1, a candidate ``row`` more."""

    def __init__(
        self,
        row: float = 0.1,
        nodes: int = 8,
        took: float = 0.0,
        first: float = 0.0,
        token: float = 0.0,
    ) -> None:
        self.memory = GuardMemory()
        self.row, self.nodes, self.took = row, nodes, took
        self.first, self.token = first, token
        self.now = 0.0
        self.speed = 1.0  # of the machine; above 1 is slower
        self.paused: dict[int, float] = {}  # step -> what it takes more
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
        inner.first = self.first
        guard = Guard(inner, self.memory, lambda: self.now, prompt, length, reads=reads)
        self.tick(self.token * prompt)
        guard.observe(Outcome(None, (), [0], {}, NONE))
        emitted, step, self.asked_at = 1, 0, []
        while emitted < length:
            most = guard.most_nodes(128)
            before = inner.asked
            tree = guard.propose(Context([0], length - emitted, most, step))
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


@few
@given(
    row=st.floats(0.005, 0.1),
    nodes=st.integers(1, 64),
    took=st.floats(0.0, 0.4),
    lengths=st.lists(st.sampled_from([32, 200]), min_size=1, max_size=6),
)
def test_useless_drafting_costs_little_in_each_sequence(
    row: float, nodes: int, took: float, lengths: list[int]
) -> None:
    decoding = Decoding(row, nodes, took)
    for length in lengths:
        lost = decoding.run(length) / (length - 1) - 1
        assert lost <= (0.05 if length == 32 else 0.02)


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


def test_finding_nothing_is_free_where_looking_is() -> None:
    decoding = Decoding(nodes=0, took=0.001)
    assert decoding.run(400) <= 399 * 1.0011
    assert decoding.inner.asked == 399


def test_looking_long_for_nothing_is_bounded() -> None:
    decoding = Decoding(nodes=0, took=0.3)
    assert decoding.run(400) <= 399 * 1.015


def test_few_candidates_are_verified_where_more_might_cost_too_much() -> None:
    decoding = Decoding(0.1, 64)
    decoding.memory.begin(32)
    assert decoding.memory.most_nodes(128) == 7
    decoding.run(400)
    assert decoding.memory.risk(3) == pytest.approx(0.3, rel=0.4)
    assert decoding.memory.most_nodes(128) == 3
    decoding.run(200, lambda at: 20)
    assert decoding.memory.most_nodes(64) >= 31


def test_a_draft_model_reads_no_prompt_that_an_answer_cannot_repay() -> None:
    decoding = Decoding(0.02, 4, took=0.4, first=30.0, token=0.6)
    for _ in range(5):
        decoding.run(32, lambda at: 4, prompt=200, reads=True)
        assert decoding.inner.asked == 0


def test_a_draft_model_reads_prompts_where_answers_repay_it() -> None:
    decoding = Decoding(0.02, 4, took=0.4, first=1.0, token=0.05)
    for _ in range(3):
        decoding.run(200, lambda at: 4, prompt=40, reads=True)
    decoding.first = 10.0
    time = decoding.run(400, lambda at: 4, prompt=400, reads=True)
    assert decoding.inner.asked >= 75
    assert time <= 10 + 0.05 * 400 + 80 * 1.48 * 1.05


def test_losses_are_no_gains_in_an_answer_longer_than_usual() -> None:
    decoding = Decoding(0.2, 8)
    for _ in range(4):
        decoding.run(40)
    memory = decoding.memory
    memory.begin(4000)
    plain = memory.plain.step
    assert plain is not None
    # Drafting lost so far: nothing that is still to come is expected to gain.
    assert memory.spare(2000) <= plain * max(memory.budget.most, 0.0)


def test_debts_of_several_prompts_do_not_add_up() -> None:
    decoding = Decoding(0.02, 4)
    decoding.run(20, lambda at: 4)
    memory = decoding.memory
    for _ in range(10):
        memory.ended(20, 0.0, drafted=True, owed=30.0)
    assert memory.savings.balance == -30.0


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


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=50))
def test_a_budget_stays_within_its_bounds(changes: list[tuple[bool, float]]) -> None:
    budget = Budget(0.01, 1.0, least=-2.0, most=3.0)
    passed = lost = 0.0
    for passes, time in changes:
        if passes:
            budget.passed(time)
            passed += time
        elif budget.affords(time):
            budget.pay(time)
            lost += time
        assert -2.0 <= budget.balance <= 3.0
    assert lost <= 1.0 + 0.01 * passed + 1e-9


def test_a_pause_in_a_plain_step_is_not_believed() -> None:
    times = PlainTimes()
    for seconds in (1.0, 1.0, 50.0, 1.1):
        times.add_step(seconds)
    assert times.step == pytest.approx(1.0, abs=0.1)


def test_drafts_before_the_first_plain_step_count_once_it_is_timed() -> None:
    memory = GuardMemory()
    memory.begin(100)
    assert memory.drafted(DraftedStep(4, 2.0, 3)) == 0.0
    assert memory.passed(1.0) == pytest.approx(2.0)


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
