"""Several drafters' proposals as one trie, and the part of it that pays.

Sequoia (arXiv:2402.12374) sizes trees by the hardware's latency; here each node has a
chance of its own, so the best tree of every size is found without its recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adaptspec.errors import InvalidTreeError
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec_plugins.hybrid.chances import BUCKETS, Marks

Chance = Callable[[Marks], float]

# Some chance stays for a token nobody proposed.
MOST_TOGETHER = 0.99
# Evidence of drafters that give none: their own order, this deep and wide.
PLACES = 16


class Candidates:
    """Every proposal after one root, each token path once, with who proposed it.

    Args:
        root: The last committed token, node 0.
        max_depth: Deeper nodes are left out.
    """

    def __init__(self, root: int, max_depth: int) -> None:
        self.tokens = [root]
        self.parents = [-1]
        self.depths = [0]
        self.marks: list[list[tuple[int, int]]] = [[]]
        self.children: list[dict[int, int]] = [{}]
        self._max_depth = max_depth

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.tokens)

    def add(self, tree: TokenTree, member: int, name: str = "") -> None:
        """Merge one member's proposal; probes are left out.

        Raises:
            InvalidTreeError: if its tokens were sampled: a mixture of distributions
                can't be verified exactly.
        """
        if tree.drawn is not Drawn.DETERMINISTIC:
            raise InvalidTreeError(
                f"members of a hybrid must propose deterministically, {name!r} "
                f"proposes {tree.drawn.value}; give it `joins` that don't sample"
            )
        evidence = tree.evidence or _places(tree)
        here = [0] * len(tree)
        for node in range(1, len(tree)):
            parent = here[tree.parents[node]]
            if parent < 0 or node in tree.probes:
                here[node] = -1
                continue
            token = tree.tokens[node]
            child = self.children[parent].get(token)
            if child is None:
                if self.depths[parent] >= self._max_depth:
                    here[node] = -1
                    continue
                child = self._append(token, parent)
            here[node] = child
            marks = self.marks[child]
            if all(other != member for other, _ in marks):
                marks.append((member, min(max(evidence[node], 0), BUCKETS - 1)))
                marks.sort()

    def shares(self, node: int, chance: Chance) -> list[tuple[int, float]]:
        """The children of ``node`` with their chances if ``node`` is accepted.

        Siblings exclude each other: where their chances exceed certainty, the
        likeliest keeps its own and the others share what is left.
        """
        found = [
            (child, chance(self.marks[child])) for child in self.children[node].values()
        ]
        if len(found) < 2 or sum(share for _, share in found) <= MOST_TOGETHER:
            return found
        likeliest = max(found, key=lambda pair: pair[1])
        kept = min(likeliest[1], MOST_TOGETHER)
        rest = sum(share for _, share in found) - likeliest[1]
        scale = (MOST_TOGETHER - kept) / rest
        return [
            (child, kept if child == likeliest[0] else share * scale)
            for child, share in found
        ]

    def tree(self, nodes: Sequence[tuple[int, float]]) -> TokenTree:
        """The tree of ``nodes``, given with their chances, likeliest path first."""
        chances = dict(nodes)
        tokens, parents = [self.tokens[0]], [-1]
        waiting = [(0, 0)]
        while waiting:
            node, new = waiting.pop()
            if node:
                tokens.append(self.tokens[node])
                parents.append(new)
                new = len(tokens) - 1
            kept = [c for c in self.children[node].values() if c in chances]
            # Popped from the end: the likeliest child follows its parent at once.
            kept.sort(key=lambda child: (chances[child], -child))
            waiting.extend((child, new) for child in kept)
        return TokenTree(tokens, parents)

    def walk(self, emitted: Sequence[int]) -> list[int]:
        """The nodes that spell ``emitted``, root first, as far as there are any."""
        path = [0]
        for token in emitted:
            child = self.children[path[-1]].get(token)
            if child is None:
                break
            path.append(child)
        return path

    def _append(self, token: int, parent: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.marks.append([])
        self.children.append({})
        self.children[parent][token] = node
        return node


def _places(tree: TokenTree) -> list[int]:
    """Each node's depth and place among its siblings as one number."""
    places = [0] * len(tree)
    for children in tree.children:
        for place, child in enumerate(children):
            depth = min(tree.depths[child], PLACES - 1)
            places[child] = depth * PLACES + min(place, PLACES - 1)
    return places
