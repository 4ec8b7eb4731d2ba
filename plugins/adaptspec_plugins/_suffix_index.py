"""Where the end of a text stood before, and what followed it how often.

A suffix tree with counts answers the same questions, but costs a node per token and
depth. Here n-grams of a few lengths lead to their newest occurrences, and counts are
taken over those when somebody asks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Lengths of the n-grams that are looked up; longer matches are found by comparing.
KEYS = (1, 2, 4, 8)
# Occurrences considered: what a step costs, and how fine probabilities are.
OCCURRENCES = 32
SEPARATOR = -1


@dataclass(frozen=True)
class Match:
    """An earlier occurrence of the context's end.

    Args:
        end: Absolute position behind it.
        length: How many tokens agree, at most the depth asked for.
    """

    end: int
    length: int


@dataclass(frozen=True)
class Draft:
    """Continuations as a tree below the context's last token, likeliest first.

    Args:
        tokens: One per node, without the root.
        parents: Index into ``tokens``, -1 below the root; smaller than the node's own.
        shares: Of the occurrences that reached the parent, how many went on to the
            node.
        counts: How many occurrences that are.
        score: Sum of the nodes' path probabilities: tokens expected to be right.
        length: Length of the match it was grown from.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    shares: Sequence[float] = ()
    counts: Sequence[int] = ()
    score: float = 0.0
    length: int = 0


class SuffixIndex:
    """Sequences of tokens, the newest occurrences of their n-grams, and eviction."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._base = 0  # absolute position of _tokens[0]
        self._run = 0  # tokens since the last separator
        self._places: dict[tuple[int, ...], list[int]] = {}

    def __len__(self) -> int:
        """Tokens and separators held."""
        return len(self._tokens)

    @property
    def keys(self) -> int:
        """N-grams held."""
        return len(self._places)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the running sequence."""
        held, places = self._tokens, self._places
        for token in tokens:
            held.append(token)
            self._run += 1
            end = self._base + len(held)
            for size in KEYS:
                if size > self._run:
                    break
                key = tuple(held[-size:])
                found = places.get(key)
                if found is None:
                    places[key] = [end]
                    continue
                found.append(end)
                if len(found) > OCCURRENCES + 1:
                    del found[0]

    def separate(self) -> None:
        """End the running sequence: no match crosses this point."""
        self._tokens.append(SEPARATOR)
        self._run = 0

    def drop_first(self, count: int) -> None:
        """Forget the first ``count`` tokens: whole sequences with their separators."""
        gone = self._tokens[:count]
        for at in range(count):
            for size in KEYS:
                if at + size > count or SEPARATOR in gone[at : at + size]:
                    break
                key = tuple(gone[at : at + size])
                found = self._places.get(key)
                if found is None:
                    continue
                while found and found[0] <= self._base + count:
                    del found[0]
                if not found:
                    del self._places[key]
        del self._tokens[:count]
        self._base += count

    def matches(self, context: Sequence[int], depth: int) -> list[Match]:
        """Newest occurrences of the end of ``context``, the longest first.

        An occurrence without a continuation isn't one.
        """
        found: dict[int, int] = {}
        for size in reversed(KEYS):
            if size > len(context) or size > depth:
                continue
            places = self._places.get(tuple(context[len(context) - size :]), ())
            for end in reversed(places):
                if len(found) >= OCCURRENCES:
                    break
                if end not in found and self._next(end) != SEPARATOR:
                    found[end] = self._length(end, context, depth)
        longest_first = sorted(found.items(), key=lambda item: (-item[1], -item[0]))
        return [Match(end, length) for end, length in longest_first]

    def _next(self, end: int) -> int:
        at = end - self._base
        return self._tokens[at] if at < len(self._tokens) else SEPARATOR

    def _length(self, end: int, context: Sequence[int], depth: int) -> int:
        held, at, last = self._tokens, end - self._base, len(context)
        length, most = 0, min(depth, at, last)
        while length < most and held[at - 1 - length] == context[last - 1 - length]:
            length += 1
        return length

    def draft(
        self, ends: Sequence[int], budget: int, least: float, depth: int, tree: bool
    ) -> Draft:
        """Grow a draft from occurrences ``ends`` (newest first among equals).

        Nodes are added by their path probability, the largest first, until ``budget``
        nodes, ``depth`` levels, or none of ``least`` is left; a path follows the most
        frequent token only.
        """
        tokens: list[int] = []
        parents: list[int] = []
        shares: list[float] = []
        counts: list[int] = []
        score, order = 0.0, 0
        held, base = self._tokens, self._base
        size = len(held)
        # (-path probability, order, token, parent, level, share, occurrences)
        heap: list[tuple[float, int, int, int, int, float, list[int]]] = []

        def grow(parent: int, level: int, reached: list[int], value: float) -> None:
            nonlocal order
            if level >= depth:
                return
            followers: dict[int, list[int]] = {}
            offset = level - base
            for end in reached:
                at = end + offset
                token = held[at] if at < size else SEPARATOR
                if token in followers:
                    followers[token].append(end)
                elif token != SEPARATOR:
                    followers[token] = [end]
            ranked = list(followers.items())
            if len(ranked) > 1:
                ranked.sort(key=lambda item: -len(item[1]))
            for token, behind in ranked if tree else ranked[:1]:
                share = len(behind) / len(reached)
                if value * share < least:
                    break
                entry = (-value * share, order, token, parent, level, share, behind)
                heapq.heappush(heap, entry)
                order += 1

        grow(-1, 0, list(ends), 1.0)
        while heap and len(tokens) < budget:
            value, _, token, parent, level, share, behind = heapq.heappop(heap)
            if not heap and len(behind) == 1:
                # Nothing competes with the one occurrence: copy what followed it.
                at = behind[0] + level - base
                copied = held[at : at + min(budget - len(tokens), depth - level)]
                if SEPARATOR in copied:
                    copied = copied[: copied.index(SEPARATOR)]
                node = len(tokens)
                tokens += copied
                parents += [parent, *range(node, node + len(copied) - 1)]
                shares += [share, *[1.0] * (len(copied) - 1)]
                counts += [1] * len(copied)
                score -= value * len(copied)
                break
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            shares.append(share)
            counts.append(len(behind))
            score -= value
            if len(tokens) < budget:
                grow(node, level + 1, behind, -value)
        return Draft(tokens, parents, shares, counts, score)

    def best_draft(
        self,
        context: Sequence[int],
        *,
        factor: float,
        offset: float,
        most: int,
        least: float,
        depth: int,
        room: int,
        tree: bool,
        above: float = 0.0,
    ) -> Draft:
        """The draft of the highest score over all match lengths; ties: the longer.

        A match of ``n`` tokens may draft ``factor * n + offset`` of them.

        Args:
            above: Drafts of this score or less aren't wanted.
        """
        matches = self.matches(context, depth)
        sizes = Counter(match.length for match in matches)
        best, taken = Draft(), 0
        # Lengths between two of these have the same occurrences and a smaller budget.
        for length in sorted(sizes, reverse=True):
            taken += sizes[length]
            budget = min(most, int(factor * length + offset))
            # A node scores 1 at most, and so does a level; shorter ones have no more.
            if min(budget, room) <= max(best.score, above):
                break
            ends = [match.end for match in matches[:taken]]
            grown = self.draft(ends, budget, least, room, tree)
            if grown.score > max(best.score, above):
                best = Draft(
                    grown.tokens,
                    grown.parents,
                    grown.shares,
                    grown.counts,
                    grown.score,
                    length,
                )
        return best
