"""Choose the tree with the most expected tokens per second."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from adaptspec_plugins.hybrid.candidates import Candidates, Chance


@dataclass(frozen=True)
class TreePlan:
    """The part of the candidates to verify.

    Args:
        nodes: Nodes and the chances that they are emitted.
        tokens: Expected tokens of the step: one and the sum of the chances.
        seconds: Expected time of the step, what was spent on drafting included.
    """

    nodes: Sequence[tuple[int, float]]
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Merit:
    """Tokens that a node counts for when nodes are chosen.

    Args:
        trust: What each level of the tree leaves of a chance: of many estimates, those
            that seem to pay are in part those that are too high.
        lesson: Tokens that a verified node, right or wrong, brings later: what the
            model thought after it is what members learn from.
    """

    trust: float = 0.9
    lesson: float = 0.02

    def __call__(self, chance: float, depth: int) -> float:
        """Of a node that is emitted with ``chance``, at that depth."""
        return chance * self.trust**depth + self.lesson


MERIT = Merit()


def best_first(
    candidates: Candidates, chance: Chance, most: int, merit: Merit = MERIT
) -> Iterator[tuple[int, float]]:
    """Up to ``most`` nodes with the chances of their paths, the best to choose first.

    A child is never better than its parent, so each prefix is closed under parents
    and no other closed set of its size has a larger sum of merits.
    """
    waiting = [(-1.0, 0, 1.0)]
    for found in range(most + 1):
        if not waiting:
            return
        _, node, path = heapq.heappop(waiting)
        if node:
            yield node, path
        if found == most:
            return
        depth = candidates.depths[node] + 1
        for child, share in candidates.shares(node, chance):
            reached = path * share
            heapq.heappush(waiting, (-merit(reached, depth), child, reached))


def likeliest_path(
    candidates: Candidates, chance: Chance, most: int
) -> Iterator[tuple[int, float]]:
    """Up to ``most`` nodes, each the likeliest child of the one before."""
    node, path = 0, 1.0
    for _ in range(most):
        shares = candidates.shares(node, chance)
        if not shares:
            return
        node, share = max(shares, key=lambda pair: pair[1])
        path *= share
        yield node, path


def best_tree(
    nodes: Iterable[tuple[int, float]],
    depths: Sequence[int],
    seconds: Callable[[int], float],
    spent: float,
    pace: float,
    most: int,
    merit: Merit = MERIT,
) -> TreePlan:
    """As many of ``nodes`` as are worth most at ``pace``, perhaps none.

    They are worth their expected tokens less those that their time brings at the pace.
    A step's own tokens per second would be the wrong measure: tokens that are dear now
    may come cheaply with the next step.

    Args:
        nodes: Best first, such as from :func:`best_first`; taken while more of them can
            be worth more.
        depths: Of each node.
        seconds: Of a forward over so many rows, the root's included.
        spent: Seconds of the step outside the forward.
        pace: Tokens per second of the steps around.
        most: Of ``nodes``.
    """
    price = [pace * seconds(1 + size) for size in range(most + 1)]
    kept: list[tuple[int, float]] = []
    size, best, tokens = 0, 1.0 - price[0], 1.0
    expected = sure = 1.0
    for node, chance in nodes:
        kept.append((node, chance))
        gain = merit(chance, depths[node])
        expected += chance
        sure += gain
        taken = len(kept)
        if sure - price[taken] > best:
            size, best, tokens = taken, sure - price[taken], expected
        # Later nodes gain no more than this one.
        elif all(
            sure + gain * more - price[taken + more] <= best
            for more in range(1, most - taken + 1)
        ):
            break
    return TreePlan(kept[:size], tokens, spent + seconds(1 + size))
