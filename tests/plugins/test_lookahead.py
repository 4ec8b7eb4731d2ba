"""Lookahead against Jacobi rounds computed by fresh forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Outcome, Target
from adaptspec.testing import StrategyContract
from adaptspec.token_tree import TokenTree
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.lookahead import (
    Lookahead,
    LookaheadDrafter,
    LookaheadParams,
    NgramPool,
)

FreshLogits = Callable[[LanguageModel, list[int]], torch.Tensor]


class TestLookahead(StrategyContract):
    strategy = Lookahead
    params = (
        {},
        {"accept_window": True, "window": 4, "ngram": 5},
        {"pool_from_prompt": False, "window": 1, "ngram": 3, "guesses": 1},
    )


class Watched(Lookahead):
    """Notes the window and the tree before each step, and its outcome."""

    def __init__(self, params: LookaheadParams) -> None:
        super().__init__(params)
        self.seen: list[tuple[list[int], list[list[int]], bool]] = []
        self.drafter: LookaheadDrafter | None = None

    def start(self, target: Target) -> Drafter:
        watched = self

        class Watching(LookaheadDrafter):
            def propose(self, context: Context) -> TokenTree:
                levels = [list(level) for level in self.levels]
                tree = super().propose(context)
                awaited = self._tops is not None
                watched.seen.append((list(context.ids), levels, awaited))
                return tree

        self.drafter = Watching(self.params, target.prompt)
        return self.drafter


def guesses(
    model: LanguageModel, fresh: FreshLogits, ids: list[int], levels: list[list[int]]
) -> list[int]:
    """For each column: the most likely token after trunk and column, recomputed."""
    found = []
    for column in range(len(levels[0]) + 1):
        text = [*ids, *levels[0][:column], *(level[column] for level in levels[1:])]
        found.append(int(fresh(model, text).argmax()))
    return found


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize(("window", "ngram"), [(3, 4), (1, 3), (4, 5)])
def test_the_window_and_the_pool_are_those_of_naive_rounds(
    target: LanguageModel,
    fresh_logits: FreshLogits,
    prompt: list[int],
    window: int,
    ngram: int,
    accept: bool,
) -> None:
    strategy = Watched(
        LookaheadParams(
            window=window,
            ngram=ngram,
            guesses=50,
            pool_from_prompt=False,
            accept_window=accept,
        )
    )
    Engine(target).generate(strategy, prompt, Controls.greedy(24))
    pool: set[tuple[int, ...]] = set()
    steps = 0
    for (ids, levels, awaited), (_, later, _) in zip(
        strategy.seen, strategy.seen[1:], strict=False
    ):
        if not awaited:  # no room left for the window
            assert later == levels
            continue
        new = guesses(target, fresh_logits, ids, levels)
        if len(levels) < ngram - 1:
            expected = [level[1:] for level in levels] + [new[1:]]
        else:
            for column, guess in enumerate(new):
                key = ids[-1] if column == 0 else levels[0][column - 1]
                pool.add((key, *(level[column] for level in levels[1:]), guess))
            expected = [levels[1][1:], *levels[2:], new]
        assert later == expected
        assert len(later[-1]) == window or len(later) < ngram - 1
        steps += 1
    assert steps > ngram
    assert strategy.drafter is not None
    kept = {
        (key, *gram)
        for key in range(target.vocab_size)
        for gram in strategy.drafter.pool.get(key)
    }
    assert kept >= pool
    assert len(kept) <= len(pool) + window  # the last step's


def test_a_cell_attends_to_trunk_and_column_as_in_the_paper(prompt: list[int]) -> None:
    drafter = LookaheadDrafter(LookaheadParams(window=4, ngram=5), prompt)
    drafter.levels = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    drafter.pool.add(60, [61, 62, 63, 64])
    tree = drafter.propose(Context([0, 60], 100, 100, 9))
    cells: dict[tuple[int, int], int] = {(0, 0): 0}
    node = 5  # behind the candidate's four nodes
    for level, tokens in enumerate(drafter.levels):
        for column in range(1 if level == 0 else 0, 4):
            cells[level, column] = node
            assert tree.tokens[node] == tokens[column - (level == 0)]
            node += 1
    assert node == len(tree)
    for (level, column), at in cells.items():
        allowed = {cells[0, c] for c in range(column + 1)}
        allowed |= {cells[row, column] for row in range(level + 1)}
        assert set(tree.ancestors()[at]) == allowed
        assert tree.depths[at] == column + level
    for candidate in range(1, 5):
        assert tree.ancestors()[candidate] == list(range(candidate + 1))
    top = {cells[3, column] for column in range(4)}
    assert tree.probes == set(cells.values()) - {0}
    assert tree.unread == tree.probes - top


def test_equal_siblings_of_an_acceptable_window_are_one_node(prompt: list[int]) -> None:
    drafter = LookaheadDrafter(
        LookaheadParams(window=2, ngram=3, accept_window=True), prompt
    )
    drafter.levels = [[7], [7, 9]]
    drafter.pool.add(60, [7, 9])
    tree = drafter.propose(Context([60], 100, 100, 0))
    tree.check(60, 64)
    # candidate 7 9, trunk 7 (the same node), column 0's 7 (too), column 1's 9 (too)
    assert list(tree.tokens) == [60, 7, 9]
    assert drafter._tops == [1, 2]
    assert not tree.probes


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=40),
    st.integers(1, 4),
)
def test_the_pool_keeps_the_continuations_seen_last(
    added: list[tuple[int, int]], most: int
) -> None:
    pool = NgramPool(1, most)
    seen: dict[int, list[int]] = {}
    for key, token in added:
        pool.add(key, [token])
        seen.setdefault(key, []).append(token)
    for key in range(3):
        newest = list(dict.fromkeys(reversed(seen.get(key, []))))[:most]
        assert pool.get(key) == [(token,) for token in newest]


@pytest.mark.slow
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 19))
def test_the_text_fills_the_pool_once_however_it_arrives(
    text: list[int], cut: int
) -> None:
    expected = {(text[at], tuple(text[at + 1 : at + 3])) for at in range(len(text) - 2)}
    drafter = LookaheadDrafter(LookaheadParams(ngram=3, guesses=64), [0])
    for end in {min(cut, len(text)), len(text)} - {0}:
        drafter.propose(Context(text[:end], 1, 1, 0))
    kept = {(key, gram) for key in range(4) for gram in drafter.pool.get(key)}
    assert kept == (expected if text else set())


@pytest.mark.parametrize(("room", "nodes"), [(1, 100), (3, 100), (100, 4), (2, 1)])
def test_without_room_for_the_window_candidates_are_proposed_alone(
    prompt: list[int], room: int, nodes: int
) -> None:
    drafter = LookaheadDrafter(LookaheadParams(window=5, ngram=4), prompt)
    drafter.pool.add(60, [1, 2, 3])
    tree = drafter.propose(Context([60], room, nodes, 0))
    assert not tree.probes
    assert list(tree.tokens) == [60, 1, 2, 3][: 1 + min(room - 1, nodes, 3)]
    before = [list(level) for level in drafter.levels]
    none: Any = None
    drafter.observe(Outcome(tree, [0], [5], {}, none))
    assert drafter.levels == before


def test_steps_it_was_not_asked_for_leave_the_window_alone(prompt: list[int]) -> None:
    drafter = LookaheadDrafter(LookaheadParams(), prompt)
    before = [list(level) for level in drafter.levels]
    none: Any = None
    drafter.observe(Outcome(TokenTree.root_only(3), [0], [5], {0: 0}, none))
    assert drafter.levels == before


def test_sampling_emits_plain_samplings_tokens(
    target: LanguageModel, prompt: list[int]
) -> None:
    controls = Controls(max_new_tokens=30, temperature=0.9, seed=4)
    plain = Engine(target).generate(Autoregressive(), prompt, controls)
    for accept in (False, True):
        strategy = Lookahead(LookaheadParams(window=6, accept_window=accept))
        found = Engine(target).generate(strategy, prompt, controls)
        assert found.token_ids == plain.token_ids


@pytest.mark.slow
def test_guesses_are_accepted_on_a_model_that_repeats_itself(
    target: LanguageModel,
) -> None:
    # Greedy tiny models fall into a loop, which the window learns by itself.
    strategy = Lookahead(LookaheadParams(window=6, guesses=6, pool_from_prompt=False))
    done = Engine(target).generate(strategy, [5, 17, 3], Controls.greedy(120))
    assert done.stats.accepted > 20
    assert done.stats.tokens_per_forward > 1.2


def test_many_candidates_leave_the_window_its_place(prompt: list[int]) -> None:
    drafter = LookaheadDrafter(LookaheadParams(window=3, ngram=4, guesses=9), prompt)
    drafter.levels = [[1, 2], [3, 4, 5], [6, 7, 8]]
    for first in range(9):
        drafter.pool.add(60, [10 + first, 30, 40])
    tree = drafter.propose(Context([60], 100, 14, 0))
    assert len(tree) - 1 == 14
    assert len(tree.probes) == 8
    assert drafter._tops is not None


def test_a_window_that_was_cut_is_tried_again(prompt: list[int]) -> None:
    drafter = LookaheadDrafter(LookaheadParams(), prompt)
    tree = drafter.propose(Context([60], 100, 100, 0))
    before = [list(level) for level in drafter.levels]
    none: Any = None
    drafter.observe(Outcome(tree.cut(1, 1), [0], [5], {0: 0, 1: 1}, none))
    assert drafter.levels == before
    assert drafter.propose(Context([60], 100, 100, 1)).tokens == tree.tokens
