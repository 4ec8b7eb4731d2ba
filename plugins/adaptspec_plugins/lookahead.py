"""Lookahead decoding: the target guesses its own n-grams beside each step.

Fu et al. 2024, arXiv:2402.02057. Their two-dimensional window is a token tree: the
trunk is level 0, and every column hangs from it. So no mask of its own is needed, and
window cells are probes: evaluated, never accepted, unless ``accept_window`` is set.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from adaptspec.acceleration.argmax import argmax_rows
from adaptspec.params import Params, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Outcome,
    Requirements,
    Strategy,
    Target,
    TokenTree,
)


class LookaheadParams(Params):
    """A step evaluates up to ``(window + guesses) * (ngram - 1)`` tokens."""

    window: Annotated[int, Tunable(1, 15, log=True)] = Field(
        default=3, ge=1, le=64, description="columns of guesses kept (W)"
    )
    ngram: Annotated[int, Tunable(3, 6)] = Field(
        default=4, ge=3, le=16, description="tokens of an n-gram, its key included (N)"
    )
    guesses: Annotated[int, Tunable(1, 15, log=True)] = Field(
        default=3, ge=1, le=64, description="n-grams kept and proposed per key (G)"
    )
    pool_from_prompt: Annotated[bool, Tunable()] = Field(
        default=True, description="n-grams of prompt and output are guesses too"
    )
    accept_window: Annotated[bool, Tunable()] = Field(
        default=False, description="let the window's own tokens be accepted too"
    )


class Lookahead(Strategy):
    """Guesses without a second model; pays where a forward of many tokens is cheap."""

    name = "lookahead"
    summary = "the target's own parallel guesses, collected as n-grams"
    reference = "arXiv:2402.02057"
    Params = LookaheadParams
    requires = Requirements(trees=True)
    params: LookaheadParams

    def start(self, target: Target) -> Drafter:
        """The window fills during the first ``ngram - 2`` steps."""
        return LookaheadDrafter(self.params, target.prompt)


class NgramPool:
    """For each first token, the continuations seen last.

    Args:
        size: Tokens of a continuation.
        most: Continuations kept per first token; the least recently seen goes.
    """

    def __init__(self, size: int, most: int) -> None:
        self._size, self._most = size, most
        self._pool: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def add(self, key: int, continuation: Sequence[int]) -> None:
        """Remember it as the one seen last."""
        known = self._pool.setdefault(key, OrderedDict())
        gram = tuple(continuation)
        known[gram] = None
        known.move_to_end(gram)
        if len(known) > self._most:
            known.popitem(last=False)

    def add_text(self, tokens: Sequence[int], start: int) -> None:
        """Every n-gram of ``tokens`` that begins at ``start`` or later."""
        for at in range(max(0, start), len(tokens) - self._size):
            self.add(tokens[at], tokens[at + 1 : at + 1 + self._size])

    def get(self, key: int) -> list[tuple[int, ...]]:
        """Continuations of ``key``, the one seen last first."""
        return list(reversed(self._pool.get(key, ())))


class LookaheadDrafter(Drafter):
    """Window and pool of one sequence.

    ``levels[l][c]`` is the guess for ``c + l`` tokens after the root, from ``l`` rounds
    ago; level 0 has no column 0, which is the root.
    """

    def __init__(self, params: LookaheadParams, prompt: Sequence[int]) -> None:
        self._params = params
        self.pool = NgramPool(params.ngram - 1, params.guesses)
        trunk = params.window + params.ngram - 3
        chosen = random.Random(0).choices(list(prompt), k=trunk)
        self.levels: list[list[int]] = [chosen]
        self._pooled = 0  # n-grams of the text that begin before here are in the pool
        self._root = 0
        self._tops: list[int] | None = None  # nodes whose guesses are awaited

    def propose(self, context: Context) -> TokenTree:
        """Known n-grams of the root first, then the window."""
        params, ids = self._params, context.ids
        if params.pool_from_prompt:
            self.pool.add_text(ids, self._pooled)
            self._pooled = max(0, len(ids) - params.ngram + 1)
        self._root, self._tops = ids[-1], None
        depth = context.room - 1
        columns = len(self.levels[0]) + 1
        reach = columns + len(self.levels) - 2
        cells = columns * len(self.levels) - 1
        # A cut window would lose the guesses it was evaluated for; without it there
        # would be no new ones, so it comes before the last candidates.
        fits = reach <= depth and cells <= context.max_nodes
        grown = _Growing(self._root)
        for gram in self.pool.get(self._root):
            most = context.max_nodes - cells if fits else context.max_nodes
            grown.add_path(gram[:depth], most)
        if fits:
            self._tops = self._add_window(grown)
        return grown.tree(set(self._tops or ()))

    def observe(self, outcome: Outcome) -> None:
        """Collect the new guesses as n-grams, and slide the window by one token."""
        tops, self._tops = self._tops, None
        if outcome.tree is None or tops is None:
            return
        if outcome.origins:
            now = {origin: node for node, origin in enumerate(outcome.origins)}
            tops = [now.get(node, -1) for node in tops]
        if any(node not in outcome.rows for node in tops):  # cut by somebody
            return
        best = outcome.best or argmax_rows(outcome.logits)
        fresh = [best[outcome.rows[node]] for node in tops]
        if len(self.levels) == self._params.ngram - 1:
            for column, guess in enumerate(fresh):
                first = self.levels[0][column - 1] if column else self._root
                middle = [level[column] for level in self.levels[1:]]
                self.pool.add(first, [*middle, guess])
            levels = [*self.levels[1:], fresh]
            self.levels = [levels[0][1:], *levels[1:]]
        else:  # warming up: one level more, one column less
            self.levels = [level[1:] for level in [*self.levels, fresh]]

    def _add_window(self, grown: _Growing) -> list[int]:
        """Add the cells; return the top level's nodes by column."""
        probe = not self._params.accept_window
        trunk = [0]
        for token in self.levels[0]:
            trunk.append(grown.add(trunk[-1], token, probe))
        nodes = trunk
        for level in self.levels[1:]:
            nodes = [
                grown.add(parent, token, probe)
                for parent, token in zip(nodes, level, strict=True)
            ]
        return nodes


class _Growing:
    """A tree under construction, whose acceptable siblings are distinct."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents = [root], [-1]
        self._children: dict[tuple[int, int], int] = {}
        self._probes: set[int] = set()

    def add_path(self, path: Sequence[int], max_nodes: int) -> None:
        node = 0
        for token in path:
            if (node, token) not in self._children and len(self.tokens) > max_nodes:
                return
            node = self.add(node, token, probe=False)

    def add(self, parent: int, token: int, probe: bool) -> int:
        if not probe and (parent, token) in self._children:
            return self._children[parent, token]
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        if probe:
            self._probes.add(node)
        else:
            self._children[parent, token] = node
        return node

    def tree(self, read: set[int]) -> TokenTree:
        return TokenTree(
            self.tokens,
            self.parents,
            probes=frozenset(self._probes),
            unread=frozenset(self._probes - read),
        )
