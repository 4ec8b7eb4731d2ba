"""Tree shapes of Medusa: which ranks of which heads are proposed.

A head's guesses are the same below every node of its depth, so a tree is a set of rank
paths: Cai et al. 2024, arXiv:2401.10774, section 2.3.1, grown best first.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from adaptspec.heads.measured_paths import Paths

# Chances of heads of which nothing was measured: the first rank's of each head, and how
# the rest is shared. Only their order matters. With them the tree of 63 nodes reaches
# as deep, four levels, as the reference's own.
FIRST = (0.55, 0.4, 0.3, 0.22, 0.17)
REST = 0.35
LAST_RANK, DEEPEST, LEVELS = 15, 5, 4  # told apart in a node's evidence


@dataclass(frozen=True)
class Shape:
    """Nodes below the root, each parent before its children.

    Args:
        parents: Of the nodes from 1 on; 0 is the root.
        depths: Of the nodes from 1 on, from 1.
        ranks: The same.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]

    @functools.cached_property
    def depth(self) -> int:
        """Heads it asks."""
        return max(self.depths, default=0)

    @functools.cached_property
    def width(self) -> int:
        """Guesses it takes from a head at most."""
        return max(self.ranks, default=-1) + 1

    @functools.cached_property
    def evidence(self) -> tuple[int, ...]:
        """Of each node, for a head that is sure on level 0."""
        return tuple(
            (min(rank, LAST_RANK) * DEEPEST + min(depth, DEEPEST) - 1) * LEVELS
            for depth, rank in zip(self.depths, self.ranks, strict=True)
        )


def chain(depth: int) -> Shape:
    """The first guess of each head."""
    return Shape(tuple(range(depth)), tuple(range(1, depth + 1)), (0,) * depth)


@functools.lru_cache(maxsize=256)
def calibrated(paths: Paths, nodes: int, depth: int, width: int) -> Shape:
    """The first ``nodes`` of ``paths``, which stand best first, that aren't too deep.

    Args:
        width: Guesses there are of a head.
    """
    kept: dict[tuple[int, ...], None] = {(): None}
    for path, _ in paths:
        if len(kept) > nodes:
            break
        if len(path) <= depth and max(path) < width and path[:-1] in kept:
            kept[path] = None
    return _shape(list(kept)[1:])


@functools.lru_cache(maxsize=256)
def assumed(
    ranks: tuple[tuple[float, ...], ...], nodes: int, depth: int, width: int
) -> Shape:
    """The likeliest ``nodes`` by products of ``ranks[k][r]``, heads independent."""
    return best_first([row[:width] for row in ranks[:depth]], nodes)


def unmeasured(heads: int, width: int) -> tuple[tuple[float, ...], ...]:
    """Chances of the ranks of heads of which nothing is known."""
    chances = []
    for head in range(heads):
        first = FIRST[min(head, len(FIRST) - 1)]
        rest = tuple((1 - first) * REST / (rank + 1) for rank in range(1, width))
        chances.append((first, *rest))
    return tuple(chances)


def best_first(
    chances: Sequence[Sequence[float]], nodes: int, least: float = 0.0
) -> Shape:
    """The ``nodes`` likeliest paths, a path's chance being the product of its ranks'.

    Args:
        chances: ``[depth][rank]``, descending over ranks.
        least: Less likely paths are left out.
    """
    found: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...], float]] = []

    def offer(path: tuple[int, ...], before: float) -> None:
        row = chances[len(path) - 1]
        chance = before * row[path[-1]] if path[-1] < len(row) else 0.0
        if chance > 0.0 and chance >= least:
            heapq.heappush(heap, (-chance, path, before))

    if chances:
        offer((0,), 1.0)
    while heap and len(found) < nodes:
        negative, path, before = heapq.heappop(heap)
        found.append(path)
        offer((*path[:-1], path[-1] + 1), before)
        if len(path) < len(chances):
            offer((*path, 0), -negative)
    return _shape(found)


def _shape(paths: Sequence[tuple[int, ...]]) -> Shape:
    """``paths`` in their order, but the path of first children in front.

    Keeping that one costs the cache no copy.
    """
    there = set(paths)
    front: list[tuple[int, ...]] = []
    first: tuple[int, ...] = ()
    while (first := _first_child(first, paths, there)) is not None:  # type: ignore[assignment]
        front.append(first)
    order = front + [path for path in paths if path not in set(front)]
    places = {path: place for place, path in enumerate(order, 1)}
    places[()] = 0
    return Shape(
        tuple(places[path[:-1]] for path in order),
        tuple(len(path) for path in order),
        tuple(path[-1] for path in order),
    )


def _first_child(
    path: tuple[int, ...], paths: Sequence[tuple[int, ...]], there: set[tuple[int, ...]]
) -> tuple[int, ...] | None:
    likeliest = (*path, 0)
    if likeliest in there:
        return likeliest
    return next((p for p in paths if p[:-1] == path), None)
