"""Token recycling: draft what the model thought likely after each token before.

Luo et al. 2024, arXiv:2408.08696, with the tree grown best first by measured chances
of each rank, the commonest tokens after an unknown one in place of token 0, rows of the
prompt filled from the prefill, and an update order in which the accepted node wins.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from adaptspec.acceleration.top_tokens import COMPARED_TOKENS, likeliest, sureness
from adaptspec.params import DraftingParams, Scalar, Tunable
from adaptspec.strategy import Context, Drafter, Observes, Outcome, Strategy, Target
from adaptspec.token_tree import TokenTree
from adaptspec_plugins.token_recycling.commonest import Commonest
from adaptspec_plugins.token_recycling.successors import (
    WIDEST,
    Successors,
    problem,
    refuse,
)

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

# How often the first successor follows, by the level of its row's sureness, and the
# share of the rest that falls to the second; it shrinks as 1 / rank. Measured, see
# docs/strategies/token_recycling.md.
FIRST = (0.25, 0.38, 0.51, 0.73)
REST = 0.2
STALE = 0.5  # what is left of it where this sequence hasn't written the row
# Chance taken for the commonest token after one that has no row; it shrinks as
# 1 / rank ** COMMON_POWER.
COMMON, COMMON_POWER = 0.05, 0.4
DEEPEST = 4  # told apart in a node's evidence
LAST_RANK = 7  # the same


class TokenRecyclingParams(DraftingParams):
    """``draft_length`` decides most; ``successors`` matter little above 4."""

    successors: Annotated[int, Tunable(2, 12)] = Field(
        default=8, ge=1, le=WIDEST, description="successors kept of each token"
    )
    draft_length: Annotated[int, Tunable(4, 48, log=True)] = Field(
        default=16, ge=1, le=128
    )
    persist: bool = Field(
        default=True, description="whether what one request taught serves the next"
    )
    min_chance: Annotated[float, Tunable(0.0, 0.1)] = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="least estimated chance of acceptance of a candidate",
    )
    common: Annotated[int, Tunable(0, 12)] = Field(
        default=8,
        ge=0,
        le=WIDEST,
        description="commonest tokens tried after one never evaluated; needs a tree",
    )
    prefill_positions: int = Field(
        default=256,
        ge=0,
        le=4096,
        description="last prompt positions whose logits are computed and learnt from",
    )


class TokenRecycling(Strategy):
    """Drafts from a table that fills with use; needs no draft model and no search."""

    name = "token_recycling"
    summary = "drafts a tree of the tokens the model last found likely after each token"
    reference = "https://arxiv.org/abs/2408.08696"
    Params = TokenRecyclingParams
    params: TokenRecyclingParams
    joins: ClassVar[Mapping[str, Scalar] | None] = {"draft_length": 24}
    replays = True
    knowledge = 1

    def __init__(self, params: TokenRecyclingParams | None = None) -> None:
        super().__init__(params)
        self._table: Successors | None = None
        self._commonest = Commonest(self.params.common)

    def observes(self, model: LanguageModel) -> Observes:
        """Logits at the prompt's last positions."""
        return Observes(
            prefill_logits=max(1, self.params.prefill_positions), logits=True
        )

    def start(self, target: Target) -> Drafter:
        """Draft from the one table of this instance, made on the first request."""
        size = target.model.vocab_size
        table = self._table if self.params.persist else None
        if table is not None and table.vocab_size != size:
            refuse(
                self.name,
                f"vocab_size must be the model's {size}, got {table.vocab_size}",
            )
            table = None
        if table is None:
            table = Successors(size, self.params.successors)
        self._table = table
        if not self.params.persist:
            self._commonest = Commonest(self.params.common)
        return _Recycler(
            self.params, table, self._commonest, target.prompt, target.trees
        )

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Merge rows; of a token that two processes learnt, the last one saved wins."""
        if not self.params.persist:
            return dict(stored or {})
        table = self._table
        size = None if table is None else table.vocab_size
        if stored and (reason := problem(stored, size)):
            refuse(self.name, reason)
            stored = None
        if table is None:
            if not stored:
                return {}
            table = Successors(int(stored["vocab_size"]), self.params.successors)
            self._table = table
        return table.sync(stored or None)


class _Recycler(Drafter):
    """Where it isn't asked it learns of several steps at once, which costs less.

    Args:
        waiting: Of so many steps at most.
    """

    def __init__(
        self,
        params: TokenRecyclingParams,
        table: Successors,
        commonest: Commonest,
        prompt: Sequence[int],
        trees: bool,
        waiting: int = 16,
    ) -> None:
        self._most_waiting = waiting
        # Token, those emitted behind it, logits [1, vocab].
        self._waiting: list[tuple[int, Sequence[int], torch.Tensor]] = []
        self._asked = False
        self._params, self._table, self._prompt = params, table, prompt
        self._commonest = commonest
        self._trees = trees
        self._learnt: set[int] = set()  # tokens whose rows this sequence has written

    def propose(self, context: Context) -> TokenTree:
        """The likeliest continuations, the commonest tokens after unknown ones."""
        self._asked = True
        self._learn_waiting()
        return grow(
            context.ids[-1],
            self._after,
            self._sureness,
            nodes=min(self._params.draft_length, context.max_nodes),
            depth=context.room - 1,
            ranks=WIDEST if self._trees else 1,
            min_chance=self._params.min_chance,
        )

    def _after(self, token: int) -> Sequence[int]:
        if token in self._table or not self._trees:
            return self._table.after(token)
        return [other for other in self._commonest.tokens if other != token]

    def _sureness(self, token: int) -> int:
        if token not in self._table:
            return UNKNOWN
        return 2 * self._table.level(token) + (token in self._learnt)

    def observe(self, outcome: Outcome) -> None:
        """Learn the likeliest successors of every token that was evaluated."""
        tree, asked = outcome.tree, self._asked
        self._asked = False
        if tree is not None and 0 in outcome.rows and len(tree) == 1 and not asked:
            row = outcome.rows[0]
            logits = outcome.logits[row : row + 1]
            self._waiting.append((tree.tokens[0], outcome.emitted, logits))
            if len(self._waiting) == self._most_waiting:
                self._learn_waiting()
            return
        self._learn_waiting()
        if tree is None:
            last = sorted(outcome.rows)[-max(1, self._params.prefill_positions) :]
            evaluated = [(self._prompt[at], outcome.rows[at]) for at in reversed(last)]
        else:
            # Committed before drafted, the newest first; then the shallowest.
            wrong = sorted(
                set(outcome.rows) - set(outcome.path), key=tree.depths.__getitem__
            )
            order = [*reversed(outcome.path), *wrong]
            evaluated = [
                (tree.tokens[node], outcome.rows[node])
                for node in order
                if node in outcome.rows
            ]
        self._commonest.count(outcome.emitted)
        self._learn(evaluated, outcome.logits)

    def close(self) -> None:
        """Learn of the last steps, too."""
        self._learn_waiting()

    def _learn_waiting(self) -> None:
        if not self._waiting:
            return
        newest_first = [
            (token, row) for row, (token, _, _) in enumerate(self._waiting)
        ][::-1]
        for _, emitted, _ in self._waiting:
            self._commonest.count(emitted)
        self._learn(newest_first, torch.cat([row for _, _, row in self._waiting]))
        self._waiting.clear()

    def _learn(
        self, evaluated: Iterable[tuple[int, int]], logits: torch.Tensor
    ) -> None:
        row_of: dict[int, int] = {}
        for token, row in evaluated:
            row_of.setdefault(token, row)
        if not row_of:
            return
        rows = list(row_of.values())
        if 2 * len(rows) < len(logits):
            logits, rows = logits[rows], list(range(len(rows)))
        found = likeliest(logits, max(self._params.successors, COMPARED_TOKENS))
        levels = sureness(logits, found)
        self._table.learn(list(row_of), found[rows], levels[rows])
        self._learnt.update(row_of)


def grow(
    root: int,
    after: Callable[[int], Sequence[int]],
    sure: Callable[[int], int],
    *,
    nodes: int,
    depth: int,
    ranks: int,
    min_chance: float = 0.0,
) -> TokenTree:
    """The candidates likeliest to be accepted, each below its parent.

    A candidate's chance is the product down its path of :func:`rank_chances`. The path
    of first successors stands first, where keeping it costs no copy; the others stand
    likeliest first.

    Args:
        after: Token -> its successors, likeliest first, padded with -1.
        sure: Token -> how sure they are, an index into :data:`CHANCES`.
        nodes: Most candidates.
        depth: Longest path.
        ranks: Most successors of one token.
        min_chance: Less likely candidates are left out.
    """
    tokens, parents, depths, evidence = [root], [-1], [0], [0]
    rows: list[Sequence[int]] = []
    states: list[int] = []
    reached = [1.0]
    heap: list[tuple[float, int, int]] = []

    def offer(parent: int, rank: int) -> None:
        row = rows[parent]
        if rank < min(ranks, len(row)) and row[rank] >= 0:
            chance = reached[parent] * CHANCES[states[parent]][rank]
            if chance >= min_chance:
                heapq.heappush(heap, (-chance, parent, rank))

    for node in range(nodes):
        rows.append(after(tokens[node]))
        states.append(sure(tokens[node]))
        if depths[node] < depth:
            offer(node, 0)
        if not heap:
            break
        value, parent, rank = heapq.heappop(heap)
        tokens.append(rows[parent][rank])
        parents.append(parent)
        depths.append(depths[parent] + 1)
        evidence.append(_evidence(rank, depths[-1], states[parent]))
        reached.append(-value)
        offer(parent, rank + 1)
    return _principal_first(TokenTree(tokens, parents, evidence=evidence))


def rank_chances(level: int, learnt: bool) -> tuple[float, ...]:
    """How likely the successor of each rank follows, descending.

    Args:
        level: Sureness of the row.
        learnt: Whether this sequence has written it.
    """
    scale = 1.0 if learnt else STALE
    first = FIRST[level]
    rest = ((1 - first) * REST / rank for rank in range(1, WIDEST))
    return tuple(scale * chance for chance in (first, *rest))


CHANCES = [
    rank_chances(level, learnt)
    for level in range(len(FIRST))
    for learnt in (False, True)
]
UNKNOWN = len(CHANCES)
CHANCES.append(tuple(COMMON / rank**COMMON_POWER for rank in range(1, WIDEST + 1)))


def _principal_first(tree: TokenTree) -> TokenTree:
    chain = [0]
    while children := tree.children[chain[-1]]:
        chain.append(children[0])
    order = chain + sorted(set(range(len(tree))) - set(chain))
    new = {old: at for at, old in enumerate(order)}
    return TokenTree(
        [tree.tokens[old] for old in order],
        [-1, *(new[tree.parents[old]] for old in order[1:])],
        evidence=[tree.evidence[old] for old in order],
    )


def _evidence(rank: int, depth: int, state: int) -> int:
    """What sets candidates apart: rank, sureness and age of the row, depth; 0..287."""
    kinds = min(rank, LAST_RANK) * DEEPEST + min(depth, DEEPEST) - 1
    return kinds * len(CHANCES) + state
