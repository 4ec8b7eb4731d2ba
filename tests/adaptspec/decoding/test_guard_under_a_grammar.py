"""The guard judges a drafter by what it adds to the tokens that a grammar forces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaptspec.decoding.guard import Guard, GuardMemory
from adaptspec.strategy import Context, Drafter, Outcome
from adaptspec.token_tree import TokenTree

NONE: Any = torch.empty(0)
pytestmark = pytest.mark.guarded


class Wrong(Drafter):
    """Proposes tokens that are never right."""

    asked = 0

    def propose(self, context: Context) -> TokenTree:
        self.asked += 1
        return TokenTree.chain(context.ids[-1], [9, 9])


class World:
    """Steps on a clock: a forward takes 1, and ``row`` more for each candidate."""

    def __init__(self, row: float) -> None:
        self.now, self.row = 0.0, row
        self.memory, self.drafter = GuardMemory(), Wrong()
        self.guard = Guard(self.drafter, self.memory, lambda: self.now)
        self.ids = [1]
        self.guard.prompt_rows(1)
        self.now += 1
        self.guard.observe(Outcome(None, (), [1], {}, NONE))

    def step(self, forced: int) -> None:
        """One step with so many forced tokens, all accepted, before the drafter's."""
        tree = self.guard.propose(Context(self.ids, 99, 99, 0))
        own = len(tree) - 1
        chain: Sequence[int] = [5] * forced + [9] * own
        tree = TokenTree.chain(1, chain)
        self.now += 1 + self.row * len(chain)
        path = list(range(forced + 1))
        outcome = Outcome(tree, path, [5] * forced + [1], {}, NONE, forced=forced)
        self.guard.observe(outcome)


def test_forced_tokens_make_no_useless_drafter_pay() -> None:
    """Every other step has forced tokens; drafts are wrong in all of them."""
    bare, forced = World(row=0.2), World(row=0.2)
    for at in range(60):
        bare.step(0)
        forced.step(4 * (at % 2))
    assert forced.guard.gained < 0
    assert forced.drafter.asked <= bare.drafter.asked + 3
    assert forced.drafter.asked < 20


def test_forced_tokens_alone_are_no_plain_step() -> None:
    world = World(row=0.5)
    while world.memory.plain.step is None:
        world.step(0)
    plain, gained = world.memory.plain.step, world.guard.gained
    world.guard._net = -1e9  # nothing is drafted
    for _ in range(9):
        world.step(3)
    assert world.memory.plain.step == plain == 1
    assert world.guard.gained == gained
