"""A language that the output must be in, walked along token trees and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adaptspec.errors import SequenceStateError
from adaptspec.token_tree import Drawn, TokenTree


class Matcher(Protocol):
    """Where one sequence stands in a language. It is never shared by two."""

    def accept(self, token: int) -> bool:
        """Advance by a token if it is legal here; else stay, and say False.

        An end of sequence is legal where the language accepts; nothing is behind it.
        """

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""

    def allowed(self) -> torch.Tensor:
        """Which tokens are legal here: bool ``[any width]``, on the CPU."""

    def forced(self) -> list[int]:
        """Tokens whose text must come next whatever is chosen; may be empty.

        Other tokens may spell the same text, so they are drafts.
        """

    @property
    def finished(self) -> bool:
        """Whether nothing but an end of sequence can follow."""


@dataclass(frozen=True)
class Shaped:
    """A proposal as it is verified.

    Args:
        origins: By node of ``tree``, the node of the proposal that it was; -1 for a
            token that the language forced and the drafter didn't propose.
        forced: Nodes 1 to ``forced`` are the forced chain behind the root.
    """

    tree: TokenTree
    origins: Sequence[int]
    forced: int


class Constraint:
    """One sequence's language: prunes trees, drafts what is forced, masks scores.

    It is a function of the ids it is asked about, in whatever order, like a
    transformers logits processor without state.

    Args:
        matcher: Stands at the beginning of the output.
        prompt: Tokens of the prompt, which the language says nothing of.
        ends: Ids that end a sequence; as a draft one is proposed only if it is alone.
    """

    def __init__(self, matcher: Matcher, prompt: int, ends: Sequence[int] = ()) -> None:
        self._matcher = matcher
        self._committed = prompt
        self._tail: list[int] = []  # where the matcher stands, behind what is committed
        self._ends = sorted(set(ends))

    @property
    def finished(self) -> bool:
        """Whether nothing but an end can follow what is committed."""
        self._seek(())
        return self._matcher.finished

    def commit(self, tokens: Sequence[int]) -> None:
        """Tokens have become part of the output.

        Raises:
            SequenceStateError: if the language doesn't have them.
        """
        if not self._seek(tokens):
            place = self._committed + len(self._tail)
            raise SequenceStateError(
                f"token {tokens[len(self._tail)]} at position {place} isn't one that "
                "the grammar allows; it can't be part of this output"
            )
        self._committed += len(self._tail)
        self._tail = []

    def allows(self, tail: Sequence[int], token: int) -> bool:
        """Whether ``token`` may follow ``tail`` behind the committed tokens."""
        return self._seek([*tail, token])

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores [1, vocab]`` of the token after ``ids [1, length]``, masked.

        What a drafter asks about texts that aren't in the language, or about the past,
        isn't masked.
        """
        if ids.shape[1] < self._committed:
            return scores
        if not self._seek(ids[0, self._committed :].tolist()):
            return scores
        allowed = self._matcher.allowed()
        width = scores.shape[-1]
        if len(allowed) < width:  # rows of the LM head that no token has
            more = allowed.new_zeros(width - len(allowed))
            allowed = torch.cat([allowed, more])
        illegal = ~allowed[:width].to(scores.device)
        return scores.masked_fill(illegal, -torch.inf)

    def shape(
        self, tree: TokenTree, nodes: int, most: int, depth: int, chain: bool = False
    ) -> Shaped:
        """The proposal without illegal nodes, with forced tokens.

        Of deterministic proposals illegal nodes go with all below them. A sampled one
        is rejected as a token that was drawn, without which the sampling wouldn't be
        exact: only what is below it goes.

        Args:
            nodes: Most candidates of the drafter.
            most: Most candidates at all.
            depth: Deepest candidates.
            chain: Whether a chain alone can be verified.
        """
        legal = self._legal(tree, depth)
        if chain:
            legal = _principal(tree, legal)
        legal = legal[: nodes + 1]
        free = self._forced((), depth) if self._takes_forced(tree, legal) else []
        shaped = _merged(tree, legal, free)
        if tree.drawn is not Drawn.WITHOUT_REPLACEMENT:
            shaped = self._extended(shaped, depth)
        kept = list(range(min(len(shaped.tree), most + 1)))
        if chain:
            kept = _principal(shaped.tree, kept)
        return Shaped(
            shaped.tree.select(kept),
            [shaped.origins[node] for node in kept],
            min(shaped.forced, most),
        )

    def _seek(self, tail: Sequence[int]) -> bool:
        """Move the matcher behind ``tail``; False if that isn't in the language.

        Then it stands before the first illegal token.
        """
        same = 0
        for mine, theirs in zip(self._tail, tail, strict=False):
            if mine != theirs:
                break
            same += 1
        if back := len(self._tail) - same:
            self._matcher.rollback(back)
            del self._tail[same:]
        for token in tail[same:]:
            if not self._matcher.accept(token):
                return False
            self._tail.append(token)
        return True

    def _legal(self, tree: TokenTree, depth: int) -> list[int]:
        """Nodes to keep, in order. Probes are kept with what they hang from."""
        kept = [0]
        below: list[list[int]] = [[] for _ in tree.tokens]
        for node in range(1, len(tree)):
            below[tree.parents[node]].append(node)
        waiting = [(child, [tree.tokens[child]]) for child in reversed(below[0])]
        while waiting:
            node, path = waiting.pop()
            if len(path) > depth:
                continue
            probe = node in tree.probes
            legal = probe or self._seek(path)
            if legal or tree.drawn is not Drawn.DETERMINISTIC:
                kept.append(node)
            if legal:
                for child in reversed(below[node]):
                    waiting.append((child, [*path, tree.tokens[child]]))
        return sorted(kept)

    @staticmethod
    def _takes_forced(tree: TokenTree, kept: Sequence[int]) -> bool:
        """Whether forced tokens may stand beside the proposal's as its siblings.

        Beside sampled ones they may not, but these were drawn from masked
        distributions.
        """
        return tree.drawn is Drawn.DETERMINISTIC or len(kept) == 1

    def _forced(self, tail: Sequence[int], depth: int) -> list[int]:
        """Up to ``depth`` tokens that must follow ``tail``, the end included."""
        path = list(tail)
        while len(path) < len(tail) + depth and self._seek(path):
            found = self._matcher.forced()
            if not found and self._matcher.finished and len(self._ends) == 1:
                found = self._ends
            legal = len(path)
            for token in found:
                if not self._seek([*path, token]):
                    break
                path.append(token)
            if len(path) == legal:
                break
        return path[len(tail) : len(tail) + depth]

    def _extended(self, shaped: Shaped, depth: int) -> Shaped:
        """With what is forced behind the likeliest path, if that is the drafter's."""
        tree = shaped.tree
        leaf = _principal(tree, range(len(tree)))[-1]
        tail = tree.path_tokens(leaf)
        more = [] if leaf <= shaped.forced else self._forced(tail, depth - len(tail))
        if not more:
            return shaped
        first = len(tree)
        longer = TokenTree(
            [*tree.tokens, *more],
            [*tree.parents, leaf, *range(first, first + len(more) - 1)],
            tree.drawn,
            tree.draft_probs,
            tree.probes,
            tree.unread,
        )
        return Shaped(longer, [*shaped.origins, *[-1] * len(more)], shaped.forced)


def _principal(tree: TokenTree, kept: Sequence[int]) -> list[int]:
    """The path of first children among the nodes that are ``kept``."""
    left, path = set(kept), [0]
    while True:
        child = next((c for c in tree.children[path[-1]] if c in left), None)
        if child is None:
            return path
        path.append(child)


def _merged(tree: TokenTree, kept: Sequence[int], free: Sequence[int]) -> Shaped:
    """The nodes that are ``kept``, behind the chain of ``free`` tokens.

    Where the proposal has these tokens, too, what is below them stays there.
    """
    tokens, parents, origins = [tree.tokens[0]], [-1], [0]
    new = {0: 0}
    left, at = set(kept), 0
    for token in free:
        same = (c for c in tree.children[at] if c in left and tree.tokens[c] == token)
        at = next(same, -1) if at >= 0 else -1
        if at >= 0:
            new[at] = len(tokens)
        parents.append(len(tokens) - 1)
        tokens.append(token)
        origins.append(at)
    for node in kept:
        if node not in new:
            new[node] = len(tokens)
            parents.append(new[tree.parents[node]])
            tokens.append(tree.tokens[node])
            origins.append(node)
    own = len(kept) > 1
    merged = TokenTree(
        tokens,
        parents,
        tree.drawn if own else Drawn.DETERMINISTIC,
        {new[node]: probs for node, probs in tree.draft_probs.items() if node in new},
        frozenset(new[node] for node in tree.probes if node in new),
        frozenset(new[node] for node in tree.unread if node in new),
    )
    return Shaped(merged, origins, len(free))
