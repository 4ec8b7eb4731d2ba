"""Which proposed tokens are kept: exact acceptance, pure functions.

Deterministic proposals: choose at the node as plain decoding would, descend if a child
has that token. Sampled proposals: speculative sampling (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), over siblings as in SpecInfer
(arXiv:2305.09781) and, without replacement, Sequoia (arXiv:2402.12374).

Typical acceptance (Cai et al. 2024, arXiv:2401.10774) alone isn't exact: strategies
that ask for it are lossy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adaptspec.token_tree import Drawn, TokenTree

TINY = 1e-12


class Accepted(NamedTuple):
    """Kept nodes, root first, and the token after the last of them.

    No token where the output ends with the last node, or nothing more can be said.
    """

    path: list[int]
    token: int | None


@dataclass(frozen=True)
class Typical:
    """A token passes that is likelier than ``min(threshold, alpha * exp(-entropy))``.

    Args:
        threshold: Epsilon of the paper, where the target is sure.
        alpha: Delta of the paper: an unsure target lets less likely tokens pass.
    """

    threshold: float
    alpha: float

    def bar(self, distribution: torch.Tensor) -> float:
        """What a token's probability under ``distribution [vocab]`` must be above."""
        entropy = float(torch.special.entr(distribution).sum())
        return min(self.threshold, self.alpha * math.exp(-entropy))


def accept_matching(
    tree: TokenTree, choose: Callable[[int, Sequence[int]], int | None]
) -> Accepted:
    """Follow the tokens that ``choose(node, path tokens)`` picks while they are there.

    It is asked once at each kept node, in order, and about no other; None ends it.

    Exact for greedy decoding, and for sampling from deterministic proposals: the picked
    token is emitted whether or not it was proposed.
    """
    path: list[int] = [0]
    tokens: list[int] = []
    while True:
        token = choose(path[-1], tokens)
        if token is None:
            return Accepted(path, None)
        child = next(
            (c for c in tree.children[path[-1]] if tree.tokens[c] == token), None
        )
        if child is None:
            return Accepted(path, token)
        path.append(child)
        tokens.append(token)


def accept_sampled(
    tree: TokenTree,
    distribution: Callable[[int, Sequence[int]], torch.Tensor | None],
    uniform: Callable[[int, int], float],
    pick: Callable[[torch.Tensor, int], int],
) -> Accepted:
    """Test sampled siblings in draw order against what is left of the target's.

    Args:
        distribution: ``(node, path tokens) ->`` the target's ``[vocab]`` after the
            node; asked once at each kept node, in order, and about no other; None ends
            the path.
        uniform: ``(depth, attempt) ->`` independent number in (0, 1).
        pick: ``(probs, depth) ->`` a token sampled from unnormalised ``probs``.
    """
    path: list[int] = [0]
    tokens: list[int] = []
    while True:
        node, depth = path[-1], len(tokens)
        target = distribution(node, tokens)
        if target is None:
            return Accepted(path, None)
        child, remaining = _test_children(tree, node, target, depth, uniform)
        if child is None:
            return Accepted(path, pick(remaining, depth))
        path.append(child)
        tokens.append(tree.tokens[child])


def accept_typical(
    tree: TokenTree,
    rule: Typical,
    distribution: Callable[[int, Sequence[int]], torch.Tensor],
    pick: Callable[[torch.Tensor, int], int],
) -> Accepted:
    """The longest path whose every token is typical for the target; lossy.

    Of equally long ones the likelier is taken, then the earlier. The token after it is
    sampled.

    Args:
        distribution: ``(node, path tokens) ->`` the target's ``[vocab]`` after the
            node.
        pick: ``(probs, depth) ->`` a token sampled from ``probs``.
    """
    best: tuple[int, float] = (0, 0.0)
    kept: list[int] = [0]
    distributions = {0: distribution(0, ())}
    waiting: list[tuple[list[int], list[int], float]] = [([0], [], 0.0)]
    while waiting:
        path, tokens, likelihood = waiting.pop(0)
        node = path[-1]
        if (len(tokens), likelihood) > best or node == 0:
            best, kept = (len(tokens), likelihood), path
        if not tree.children[node]:
            continue
        if node not in distributions:
            distributions[node] = distribution(node, tokens)
        bar = rule.bar(distributions[node])
        for child in tree.children[node]:
            token = tree.tokens[child]
            chance = float(distributions[node][token])
            if chance > bar:
                passed = [*path, child], [*tokens, token], likelihood + math.log(chance)
                waiting.append(passed)
    last, spelt = kept[-1], [tree.tokens[node] for node in kept[1:]]
    if last not in distributions:
        distributions[last] = distribution(last, spelt)
    return Accepted(kept, pick(distributions[last], len(spelt)))


def _test_children(
    tree: TokenTree,
    node: int,
    target: torch.Tensor,
    depth: int,
    uniform: Callable[[int, int], float],
) -> tuple[int | None, torch.Tensor]:
    """The accepted child, or None and the distribution its correction is drawn from."""
    remaining = target
    tried: list[int] = []
    for attempt, child in enumerate(tree.children[node]):
        token = tree.tokens[child]
        draft = _draft_distribution(tree, child, target, tried)
        if draft is None:  # nothing is left to draw: no further sibling is a draw
            break
        chance = float(draft[token])
        if math.isnan(chance):  # nor is it where the draft has no distribution at all
            break
        if chance > 0 and uniform(depth, attempt) * chance < float(remaining[token]):
            return child, remaining
        tried.append(token)
        remaining = residual(remaining, draft, target, tried)
    return None, remaining


def residual(
    remaining: torch.Tensor,
    draft: torch.Tensor,
    target: torch.Tensor,
    tried: Sequence[int],
) -> torch.Tensor:
    """What is left of the target's probabilities after a rejected draw from ``draft``.

    Where rounding leaves nothing (draft and target nearly equal), the target without
    the tried tokens, and the target itself if they were all of it.
    """
    left = (remaining - draft).clamp_min(0)
    total = float(left.sum())
    if total <= TINY:
        left = target.clone()
        left[list(tried)] = 0
        total = float(left.sum())
        if total <= 0:
            return target
    return left / total


def _draft_distribution(
    tree: TokenTree, child: int, target: torch.Tensor, tried: Sequence[int]
) -> torch.Tensor | None:
    draft = tree.draft_probs.get(child)
    if draft is None:
        certain = torch.zeros_like(target)
        certain[tree.tokens[child]] = 1.0
        return certain
    draft = draft.to(target.device, target.dtype)
    if tree.drawn is Drawn.WITHOUT_REPLACEMENT and tried:
        draft = draft.clone()
        draft[list(tried)] = 0
        total = float(draft.sum())
        if total <= TINY:
            return None
        draft = draft / total
    return draft
