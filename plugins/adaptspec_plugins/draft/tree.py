"""A smaller language model drafts a tree of tokens.

``deterministic`` is EAGLE-2's dynamic tree (Li et al. 2024, arXiv:2406.16858) with a
draft model: the likeliest paths by the product of draft probabilities. ``sampled``
draws siblings without replacement into a shape fixed beforehand (SpecInfer, Miao et al.
2023, arXiv:2305.09781; Sequoia, Chen et al. 2024, arXiv:2402.12374).
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from adaptspec.params import DraftingParams, Tunable
from adaptspec.strategy import (
    Context,
    Continuation,
    Drafter,
    Drawn,
    Requirements,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec_plugins.draft.sequence import DraftSequence

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel


class DraftTreeParams(DraftingParams):
    """``mode`` matters only under sampling: greedy drafts are always deterministic."""

    draft_length: Annotated[int, Tunable(4, 64, log=True)] = Field(
        default=16, ge=1, le=256
    )
    speculation_depth: Annotated[int, Tunable(2, 8)] = Field(
        default=5,
        ge=1,
        le=32,
        description="levels of the tree, each one forward of the draft model",
    )
    top_k: Annotated[int, Tunable(2, 8)] = Field(
        default=4,
        ge=1,
        le=64,
        description="most children of a token, and most expanded per level",
    )
    stop: Annotated[float, Tunable(0.0, 0.8, step=0.1)] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="expand no path the draft gives less probability than this",
    )
    mode: Literal["deterministic", "sampled"] = Field(
        default="deterministic",
        description="under sampling: likeliest tokens, or draws without replacement",
    )
    first_accepted: float = Field(
        default=0.7,
        gt=0.0,
        lt=1.0,
        description="sampled shape: chance assumed that a first draw is accepted",
    )


class DraftTree(Strategy):
    """More accepted per step than a chain where verifying many tokens costs little."""

    name = "draft_tree"
    summary = "a smaller model of the same vocabulary drafts a tree"
    reference = "arXiv:2406.16858"
    Params = DraftTreeParams
    replays = True
    requires = Requirements(draft="same vocabulary", trees=True)
    params: DraftTreeParams

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Both models must attend along trees."""
        if reason := super().unavailable(model, draft):
            return reason
        if draft is not None and draft.capability.level != "tree":
            return f"the draft model can't draft trees: {draft.capability.reason}"
        return None

    def start(self, target: Target) -> Drafter:
        """The draft model reads the prompt at the first step."""
        assert target.draft is not None
        sequence = DraftSequence(target.draft, target.model.vocab_size)
        if self.params.mode == "sampled" and not target.sampling.greedy:
            return _SampledTree(self.params, target, sequence)
        return _LikeliestTree(self.params, target, sequence)


class _LikeliestTree(Drafter):
    def __init__(
        self, params: DraftTreeParams, target: Target, sequence: DraftSequence
    ) -> None:
        self._params = params
        self._sampling = target.sampling
        self._sequence = sequence
        self._least = math.log(params.stop) if params.stop else -math.inf

    def propose(self, context: Context) -> TokenTree:
        depth = min(self._params.speculation_depth, self._sequence.room(context))
        nodes = min(self._params.draft_length, context.max_nodes)
        if depth < 1:
            return TokenTree.root_only(context.ids[-1])
        grown = _Grown(context.ids)
        fresh = grown.add_children([0], self._scores(context, grown, [0], None))
        for _ in range(depth - 1):
            frontier = self._frontier(grown, fresh, nodes)
            if not frontier:
                break
            logits = self._sequence.extend(
                [grown.tokens[node] for node in frontier],
                [grown.drafted[grown.parents[node]] for node in frontier],
            )
            grown.mark_drafted(frontier)
            fresh = grown.add_children(
                frontier, self._scores(context, grown, frontier, logits)
            )
        return grown.tree(grown.best(nodes))

    def _frontier(self, grown: _Grown, fresh: Sequence[int], nodes: int) -> list[int]:
        """The likeliest new nodes; none that the finished tree couldn't hold.

        A node already out of the best ``nodes`` stays out, and its children with it.
        """
        best = set(grown.best(nodes))
        worth = [n for n in fresh if n in best and grown.values[n] >= self._least]
        return sorted(worth, key=lambda n: -grown.values[n])[: self._params.top_k]

    def _scores(
        self,
        context: Context,
        grown: _Grown,
        parents: Sequence[int],
        logits: torch.Tensor | None,
    ) -> list[list[tuple[int, float]]]:
        """For each parent its likeliest next tokens and their log probabilities."""
        if logits is None:
            logits = self._sequence.begin(context)
        if self._sampling.greedy:
            logs = logits.float().log_softmax(-1)
        else:
            draft_probs = [
                self._sampling.probs(grown.ids(parent), row)
                for parent, row in zip(parents, logits, strict=True)
            ]
            logs = torch.stack(draft_probs).log()
        top = logs.topk(min(self._params.top_k, logs.shape[-1]), dim=-1)
        values, tokens = top.values.tolist(), top.indices.tolist()
        return [
            [(t, v) for t, v in zip(*pair, strict=True) if v > -math.inf]
            for pair in zip(tokens, values, strict=True)
        ]


class _SampledTree(Drafter):
    def __init__(
        self, params: DraftTreeParams, target: Target, sequence: DraftSequence
    ) -> None:
        self._params = params
        self._sampling = target.sampling
        self._sequence = sequence
        self._least = math.log(params.stop) if params.stop else -math.inf

    def propose(self, context: Context) -> TokenTree:
        """Fill a shape level by level.

        A drawn token is never left out for being unlikely, only not expanded: whether
        a draw is tested must not depend on what was drawn.
        """
        depth = min(self._params.speculation_depth, self._sequence.room(context))
        if depth < 1:
            return TokenTree.root_only(context.ids[-1])
        shape = expected_shape(
            min(self._params.draft_length, context.max_nodes),
            depth,
            self._params.top_k,
            self._params.first_accepted,
        )
        grown = _Grown(context.ids)
        places = {0: 0}  # node -> its place in the shape
        draft_probs: dict[int, torch.Tensor] = {}
        frontier, logits = [0], self._sequence.begin(context)
        while True:
            fresh = []
            for node, row in zip(frontier, logits, strict=True):
                probs = self._sampling.probs(grown.ids(node), row)
                wanted = shape[places[node]]
                drawn = self._sampling.draw(probs, len(wanted))
                children = grown.add_children(
                    [node], [[(t, math.log(float(probs[t]))) for t in drawn]]
                )
                for child, place in zip(children, wanted, strict=False):
                    draft_probs[child], places[child] = probs, place
                fresh.extend(children)
            frontier = [
                n for n in fresh if shape[places[n]] and grown.values[n] >= self._least
            ]
            if not frontier:
                break
            logits = self._sequence.extend(
                [grown.tokens[node] for node in frontier],
                [grown.drafted[grown.parents[node]] for node in frontier],
            )
            grown.mark_drafted(frontier)
        everything = range(len(grown.tokens))
        return grown.tree(everything, Drawn.WITHOUT_REPLACEMENT, draft_probs)


class _Grown:
    """A tree while it is drafted: candidates in creation order, their log values."""

    def __init__(self, committed: Sequence[int]) -> None:
        self._committed = committed
        self.tokens = [committed[-1]]
        self.parents = [-1]
        self.values = [0.0]  # log probability of the path
        self.drafted = {0: 0}  # node -> node of the draft sequence that evaluated it

    def ids(self, node: int) -> Sequence[int]:
        """Committed tokens and the path to ``node``."""
        path = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return Continuation(self._committed, path[::-1])

    def add_children(
        self, parents: Sequence[int], scored: Sequence[Sequence[tuple[int, float]]]
    ) -> list[int]:
        """Append (token, log probability) children; the new nodes."""
        first = len(self.tokens)
        for parent, children in zip(parents, scored, strict=True):
            for token, log_prob in children:
                self.tokens.append(token)
                self.parents.append(parent)
                self.values.append(self.values[parent] + log_prob)
        return list(range(first, len(self.tokens)))

    def mark_drafted(self, nodes: Sequence[int]) -> None:
        """``nodes`` were evaluated, in this order."""
        for node in nodes:
            self.drafted[node] = len(self.drafted)

    def best(self, count: int) -> list[int]:
        """The root and the ``count`` likeliest nodes; earlier ones win ties.

        Closed under parents: no path is likelier than its beginning.
        """
        order = sorted(range(1, len(self.tokens)), key=lambda n: (-self.values[n], n))
        return [0, *sorted(order[:count])]

    def tree(
        self,
        nodes: Sequence[int],
        drawn: Drawn = Drawn.DETERMINISTIC,
        draft_probs: Mapping[int, torch.Tensor] | None = None,
    ) -> TokenTree:
        """The tree of ``nodes``, the path of first children in front.

        Siblings keep their order, and keeping that path costs the cache no copy.
        """
        first: dict[int, int] = {}
        for node in nodes:
            first.setdefault(self.parents[node], node)
        order = [0]
        while (node := first.get(order[-1], 0)) > 0:
            order.append(node)
        in_front = set(order)
        order += [node for node in nodes if node not in in_front]
        new = {node: i for i, node in enumerate(order)}
        return TokenTree(
            [self.tokens[node] for node in order],
            [-1, *(new[self.parents[node]] for node in order[1:])],
            drawn,
            {new[node]: row for node, row in (draft_probs or {}).items()},
        )


@functools.lru_cache(maxsize=64)
def expected_shape(
    nodes: int, depth: int, top_k: int, first_accepted: float
) -> tuple[tuple[int, ...], ...]:
    """Children of each place in the tree of most expected accepted tokens.

    Assumes that the j-th sibling is accepted with probability
    ``first_accepted * (1 - first_accepted) ** j`` whatever the context.
    """
    children: list[list[int]] = [[]]
    # (-chance of being reached, tie-break, parent, rank among its children, level)
    heap = [(-first_accepted, 0, 0, 0, 1)]
    pushed = 1
    while heap and len(children) <= nodes:
        chance, _, parent, rank, level = heapq.heappop(heap)
        place = len(children)
        children.append([])
        children[parent].append(place)
        if rank + 1 < top_k:
            sibling = chance * (1 - first_accepted)
            heapq.heappush(heap, (sibling, pushed, parent, rank + 1, level))
        if level < depth:
            child = chance * first_accepted
            heapq.heappush(heap, (child, pushed + 1, place, 0, level + 1))
        pushed += 2
    return tuple(tuple(c) for c in children)
