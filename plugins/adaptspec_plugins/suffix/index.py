"""An index of where a text's ending occurred before, and how often what followed.

A suffix tree with counts answers the same questions, but costs a node per token and
depth. Here n-grams of a few lengths lead to their newest occurrences, and counts are
taken over those when somebody asks. As in zip's search for repetitions (RFC 1951), a
table of hashes leads to the newest occurrence, and each to the one before it.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Lengths of the n-grams that are looked up; longer matches are found by comparing.
KEYS = (1, 2, 4, 8)
# Occurrences considered: what a step costs, and how fine probabilities are.
OCCURRENCES = 32
# Places looked at for them: others may share the hash, or have no continuation.
MOST_LOOKED_AT = 4 * OCCURRENCES
SEPARATOR = -1

# An n-gram's number is that of its first half times one of these, and of its second.
FACTORS = (0x2545F491, 0x1F123BB5, 0x2C1B3C6D)
NUMBERS = (1 << 30) - 1
FEWEST_HEADS = 256
FULL = 2  # tokens for each head of a table, beyond which it grows
MANY = 256  # tokens that are linked faster with all others than one by one


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
    """Sequences of tokens, the newest occurrences of their n-grams, and eviction.

    About 30 bytes a token. For each length of n-gram there is a table of heads, hash
    -> where the newest n-gram of that hash ends, and for each token where the one
    before it did (-1: nowhere).
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        self._base = 0  # absolute position of _tokens[0]
        self._gone = 0  # tokens at the front that are forgotten, but still held
        self._run = 0  # tokens since the last separator
        self._last, self._pairs, self._quads = 0, [0, 0], [0, 0, 0, 0]  # newest numbers
        self._heads = [_nowhere(FEWEST_HEADS) for _ in KEYS]
        self._before = [array("i") for _ in KEYS]

    def __len__(self) -> int:
        """Tokens and separators held."""
        return len(self._tokens) - self._gone

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        arrays = (self._tokens, *self._heads, *self._before)
        return sum(len(one) * one.itemsize for one in arrays)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the running sequence."""
        held = self._tokens
        many = len(tokens) >= max(MANY, len(held) // 4)
        if many or len(held) + len(tokens) > FULL * len(self._heads[0]):
            held.extend(tokens)
            self._run += len(tokens)
            self._link_all()
            return
        run, mask = self._run, len(self._heads[0]) - 1
        last, pairs, quads = self._last, self._pairs, self._quads
        tables = list(zip(KEYS, self._heads, self._before, strict=True))
        two, four, eight = FACTORS
        for at, token in enumerate(tokens):
            # Those of shorter runs than their n-grams aren't looked at.
            pair = (last * two + token) & NUMBERS
            quad = (pairs[at] * four + pair) & NUMBERS
            octet = (quads[at] * eight + quad) & NUMBERS
            pairs.append(pair)
            quads.append(quad)
            last = token
            run += 1
            here = len(held)
            held.append(token)
            numbers = (token, pair, quad, octet)
            for number, (size, heads, before) in zip(numbers, tables, strict=True):
                if size > run:
                    before.append(-1)
                    continue
                slot = number & mask
                before.append(heads[slot])
                heads[slot] = here
        self._run = run
        self._last, self._pairs, self._quads = last, pairs[-2:], quads[-4:]

    def separate(self) -> None:
        """End the running sequence: no match crosses this point."""
        self._tokens.append(SEPARATOR)
        for before in self._before:
            before.append(-1)
        self._run = 0

    def drop_first(self, count: int) -> None:
        """Forget the first ``count`` tokens: whole sequences with their separators."""
        self._gone += count
        gone = self._gone
        if gone < max(MANY, len(self._tokens) // 4):
            return
        del self._tokens[:gone]
        for before in self._before:
            del before[:gone]
        for links in (*self._heads, *self._before):
            places = np.frombuffer(links, dtype=np.int32)
            np.maximum(places - gone, -1, out=places)
        self._base += gone
        self._gone = 0

    def matches(self, context: Sequence[int], depth: int) -> list[Match]:
        """Newest occurrences of the end of ``context``, the longest first.

        An occurrence without a continuation isn't one.
        """
        found: dict[int, int] = {}
        held, gone, count = self._tokens, self._gone, len(self._tokens)
        last, mask = len(context), len(self._heads[0]) - 1
        endings = array("i", context[-KEYS[-1] :])
        tables = zip(KEYS, _numbers(endings), self._heads, self._before, strict=True)
        for size, number, heads, before in reversed(list(tables)):
            at = heads[number & mask]
            if at < gone or size > last or size > depth:
                continue
            ending = endings[-size:]
            left = MOST_LOOKED_AT
            while at >= gone and left and len(found) < OCCURRENCES:
                end = at + 1
                if (
                    end not in found
                    and end < count
                    and held[end] != SEPARATOR
                    and held[end - size : end] == ending
                ):
                    length, most = size, min(depth, end, last)
                    while (
                        length < most
                        and held[at - length] == context[last - 1 - length]
                    ):
                        length += 1
                    found[end] = length
                at = before[at]
                left -= 1
        longest_first = sorted(found.items(), key=lambda item: (-item[1], -item[0]))
        base = self._base
        return [Match(base + end, length) for end, length in longest_first]

    def _link_all(self) -> None:
        """Link all tokens again, in tables that are large enough."""
        tokens = np.frombuffer(self._tokens, dtype=np.int32).astype(np.int64)
        places = np.arange(len(tokens))
        separators = np.where(tokens == SEPARATOR, places, -1)
        # Tokens of its sequence up to each token, itself among them.
        runs = places - np.maximum.accumulate(separators)
        size = len(self._heads[0])
        while 2 * len(tokens) > FULL * size:  # room to grow
            size *= 2
        numbers, newest_numbers = tokens, []
        for which, length in enumerate(KEYS):
            if which:
                half = np.zeros_like(numbers)
                half[length // 2 :] = numbers[: -(length // 2)]
                numbers = (half * FACTORS[which - 1] + numbers) & NUMBERS
            newest_numbers.append(numbers[-length:].tolist())
            ends = places[runs >= length]
            slots = numbers[ends] & (size - 1)
            order = np.argsort(slots, kind="stable")
            ends, slots = ends[order], slots[order]
            same = slots[1:] == slots[:-1]
            before = np.full(len(tokens), -1, dtype=np.int32)
            before[ends[1:][same]] = ends[:-1][same]
            heads = np.full(size, -1, dtype=np.int32)
            newest = np.append(~same, True)[: len(ends)]
            heads[slots[newest]] = ends[newest]
            self._heads[which] = array("i", heads.tobytes())
            self._before[which] = array("i", before.tobytes())
        [self._last], self._pairs, self._quads, _ = newest_numbers

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
                copied = held[
                    at : at + min(budget - len(tokens), depth - level)
                ].tolist()
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


def _numbers(ending: Sequence[int]) -> list[int]:
    """What the n-grams that end ``ending`` are hashed by; 0s stand before its start."""
    level = [*[0] * (KEYS[-1] - len(ending)), *ending]
    numbers = [level[-1]]
    for factor in FACTORS:
        halves = zip(level[::2], level[1::2], strict=True)
        level = [(first * factor + second) & NUMBERS for first, second in halves]
        numbers.append(level[-1])
    return numbers


def _nowhere(count: int) -> array[int]:
    return array("i", [-1]) * count
