"""The draft model in a replay: its logits are cached between replayed settings.

Greedy drafts behind the same tokens are the same, so the model seldom runs after the
first settings. Its time comes from the hardware's cost model, like the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from adaptspec.model.forward import Forward
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.language_model import LanguageModel

if TYPE_CHECKING:
    from adaptspec.model.forward_times import LatencyCurve
    from adaptspec.token_tree import TokenTree
    from adaptspec_tuner.replaying.virtual_clock import VirtualClock

TOP = 128  # logits kept of a position; the others share what is left of their mass
MOST = 40_000  # positions kept: about 60 MB
CONTEXT_STEP = 64
ROOT = 0


@dataclass(frozen=True)
class Answer:
    """Logits behind one position: the highest, and one value for each other."""

    tokens: torch.Tensor  # [TOP]
    logits: torch.Tensor  # [TOP], float32
    other: float


class RowsCache:
    """Which position each row stands for.

    Args:
        moving: Seconds of keeping a path that isn't the first rows.
    """

    def __init__(self, clock: VirtualClock, moving: float) -> None:
        self.rows: list[int] = []
        self._clock, self._moving = clock, moving

    @property
    def length(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def keep(self, base: int, nodes: Sequence[int]) -> None:
        """As the tree cache's."""
        self.rows[base:] = [self.rows[base + node] for node in nodes]
        if any(node != row for row, node in enumerate(nodes)):
            self._clock.replace(perf_counter(), self._moving)

    def truncate(self, length: int) -> None:
        """As the tree cache's."""
        del self.rows[length:]


class RememberedDraft(LanguageModel):
    """A draft model that runs only where it hasn't answered yet.

    A position is a token behind another position. Its logits are kept as the highest
    128 and an equal share of the remaining probability for every other token.

    Args:
        model: The draft model.
        costs: Of its forwards.
    """

    def __init__(
        self, model: LanguageModel, costs: ForwardCosts, clock: VirtualClock
    ) -> None:
        _ = model.capability, model.reaches  # settled by the real model
        self.__dict__.update(model.__dict__)
        self._seen = None  # it follows no caller's model
        self._real, self._costs, self._clock = model, costs, clock
        self._curves: dict[int, LatencyCurve] = {}
        self._positions: dict[tuple[int, int], int] = {}
        self._behind: list[tuple[int, int]] = [(-1, -1)]  # position -> parent, token
        self._answers: dict[int, Answer] = {}
        self._read: dict[int, float] = {}  # position -> seconds of reading up to it
        self._cache: Any = None
        self._cached: list[int] = []  # positions that the real cache holds
        self.forwards = 0  # of the real model
        self.scale = 1.0  # of what the costs say

    def new_cache(self, capacity: int = 0) -> Any:
        """A cache that holds no rows of keys and values."""
        return RowsCache(self._clock, self.scale * self._costs.moving)

    def prefill(
        self,
        tokens: Sequence[int],
        cache: Any,
        *,
        last: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """As the model's."""
        assert not hidden_layers
        started = perf_counter()
        at = cache.rows[-1] if cache.rows else ROOT
        before = cache.length
        for token in tokens:
            at = self._position(at, token)
            cache.rows.append(at)
        first = max(0, len(tokens) - last)
        wanted = cache.rows[before + first :]
        many = len(tokens) > self._costs.rows[-1]
        if many and at not in self._read:
            self._forget_rows()
            began = perf_counter()
            self._answer(at)
            self._read[at] = perf_counter() - began
        forward = self._forward(wanted, range(first, len(tokens)))
        known = self.scale * self._curve(before)(len(tokens))
        self._clock.replace(started, self._read[at] if many else known)
        return forward

    def forward_tree(
        self, tree: TokenTree, cache: Any, *, hidden_layers: Sequence[int] = ()
    ) -> Forward:
        """As the model's."""
        assert not hidden_layers
        return self.extend(tree, cache, 0)

    def extend(self, tree: TokenTree, cache: Any, done: int) -> Forward:
        """As the model's."""
        started = perf_counter()
        base = cache.length - done
        behind = cache.rows[base - 1] if base else ROOT
        for node in range(done, len(tree)):
            parent = tree.parents[node]
            at = behind if parent < 0 else cache.rows[base + parent]
            cache.rows.append(self._position(at, tree.tokens[node]))
        nodes = range(done, len(tree))
        forward = self._forward([cache.rows[base + node] for node in nodes], nodes)
        self._clock.replace(started, self.scale * self._curve(base)(len(nodes)))
        return forward

    def _position(self, behind: int, token: int) -> int:
        key = (behind, token)
        if key not in self._positions:
            self._positions[key] = len(self._behind)
            self._behind.append(key)
        return self._positions[key]

    def _forward(self, positions: Sequence[int], nodes: range) -> Forward:
        answers = [self._answer(at) for at in positions]
        logits = torch.empty(len(answers), self.vocab_size)
        for row, answer in enumerate(answers):
            logits[row] = answer.other
            logits[row, answer.tokens] = answer.logits
        return Forward(logits, {node: row for row, node in enumerate(nodes)})

    def _answer(self, at: int) -> Answer:
        if (known := self._answers.get(at)) is not None:
            return known
        path = self._path(at)
        if self._cache is None:
            self._cache = self._real.new_cache(len(path) + 64)
        same = 0
        # The last token is evaluated anyway: its logits are wanted.
        for have, want in zip(self._cached, path[:-1], strict=False):
            if have != want:
                break
            same += 1
        self._cache.truncate(same)
        self._cached = path
        tokens = [self._behind[position][1] for position in path[same:]]
        logits = self._real.prefill(tokens, self._cache).logits[-1].float()
        self.forwards += 1
        answer = _kept(logits)
        if len(self._answers) < MOST:
            self._answers[at] = answer
        return answer

    def _path(self, at: int) -> list[int]:
        path = []
        while at != ROOT:
            path.append(at)
            at = self._behind[at][0]
        return path[::-1]

    def _forget_rows(self) -> None:
        self._cache, self._cached = None, []

    def _curve(self, cached: int) -> LatencyCurve:
        place = cached // CONTEXT_STEP
        if place not in self._curves:
            self._curves[place] = self._costs.curve(place * CONTEXT_STEP)
        return self._curves[place]


def _kept(logits: torch.Tensor) -> Answer:
    """The highest logits; the others' mean, in probability."""
    count = min(TOP, len(logits))
    highest = logits.topk(count)
    left = len(logits) - count
    other = -torch.inf
    if left:
        rest = logits.clone()
        rest[highest.indices] = -torch.inf
        other = float(rest.logsumexp(0)) - float(torch.tensor(float(left)).log())
    # Of equals the first must come first, as where logits are looked through.
    tokens, order = highest.indices.sort()
    return Answer(tokens.cpu(), highest.values[order].cpu(), other)
