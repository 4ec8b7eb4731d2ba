"""The gate, on a clock of its own: what it costs where drafting loses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.gate import LONGEST_WAIT, Gate, GateMemory
from adaptspec.decoding.tree import TokenTree
from adaptspec.strategy import Context, Drafter, Outcome


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
    """Steps through a gate: a plain step takes one second, a draft what is told."""

    def __init__(self, memory: GateMemory | None = None) -> None:
        self.now = 0.0
        self.inner = Chain()
        self.gate = Gate(self.inner, memory or GateMemory(), lambda: self.now)
        self.tokens = 0

    def run(self, tokens: int, cost: Callable[[int], float], gain: int) -> None:
        """Until ``tokens`` more are there; a draft emits ``gain`` of them."""
        end = self.tokens + tokens
        while self.tokens < end:
            tree = self.gate.propose(Context([0], 100, 100, 0))
            drafted = len(tree) > 1
            self.now += cost(self.tokens) if drafted else 1.0
            emitted = [1] * (gain if drafted else 1)
            self.tokens += len(emitted)
            none = None
            self.gate.observe(Outcome(tree, [0], emitted, {}, none))  # type: ignore[arg-type]


def test_a_draft_that_gains_is_asked_nearly_always() -> None:
    decoding = Decoding()
    decoding.run(3000, lambda _: 1.2, gain=3)
    assert decoding.now < 3000 / 3 * 1.2 * 1.03


@given(st.floats(1.05, 3.0))
def test_a_draft_that_loses_costs_little(cost: float) -> None:
    decoding = Decoding()
    decoding.run(1000, lambda _: cost, gain=1)
    assert decoding.now < 1000 + (cost - 1) * 30
    assert decoding.inner.asked > 3  # it is still tried now and then


def test_even_a_short_output_loses_little_once_the_verdict_is_known() -> None:
    memory = GateMemory()
    Decoding(memory).run(400, lambda _: 1.6, gain=1)
    later = Decoding(memory)
    later.run(64, lambda _: 1.6, gain=1)
    assert later.now <= 64 * 1.05


def test_drafting_is_taken_up_when_it_begins_to_gain() -> None:
    decoding = Decoding()
    decoding.run(500, lambda _: 2.0, gain=1)
    asked, then = decoding.inner.asked, decoding.now
    decoding.run(4000, lambda _: 1.2, gain=3)
    assert decoding.inner.asked - asked > 1000
    assert decoding.now - then < (LONGEST_WAIT + 4000 / 3 * 1.2) * 1.05


def test_a_machine_that_slows_down_as_a_whole_closes_nothing() -> None:
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
    assert plain.plain is not None
    assert decoding.inner.asked - before > 370


def test_the_drafter_sees_every_outcome_and_the_end() -> None:
    decoding = Decoding()
    decoding.run(100, lambda _: 2.0, gain=1)
    decoding.gate.observe(Outcome(None, (), [1], {}, None))  # type: ignore[arg-type]
    decoding.gate.close()
    assert decoding.inner.observed == 101
    assert decoding.inner.closed


def test_a_prefill_is_no_step() -> None:
    memory = GateMemory()
    gate = Gate(Chain(), memory, lambda: 0.0)
    gate.observe(Outcome(None, (), [1], {}, None))  # type: ignore[arg-type]
    assert memory == GateMemory()
    assert memory.plain is None


@pytest.mark.parametrize("steps", [1, 10])
def test_a_drafter_that_proposes_nothing_counts_as_plain(steps: int) -> None:
    class Silent(Chain):
        def propose(self, context: Context) -> TokenTree:
            return TokenTree.root_only(context.ids[-1])

    memory = GateMemory()
    now = [0.0]
    gate = Gate(Silent(), memory, lambda: now[0])
    for _ in range(steps):
        tree = gate.propose(Context([0], 9, 9, 0))
        now[0] += 2.0
        gate.observe(Outcome(tree, [0], [1], {}, None))  # type: ignore[arg-type]
    assert memory.plain == 2.0
    assert memory.steps == 0
