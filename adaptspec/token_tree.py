"""The token tree a strategy proposes: flat tokens and parents, root first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from adaptspec.errors import InvalidTreeError

if TYPE_CHECKING:
    import torch


class Drawn(Enum):
    """How the proposed tokens were drawn, which decides the acceptance rule.

    * ``DETERMINISTIC``: a function of the committed tokens (n-grams, top-k, heads).
    * ``INDEPENDENT``: each child was sampled from its distribution, siblings
      independently; a child without a distribution counts as proposed with probability
      one.
    * ``WITHOUT_REPLACEMENT``: siblings were sampled one after the other, each from the
      distribution renormalised without its earlier siblings, and stand in that order.
    """

    DETERMINISTIC = "deterministic"
    INDEPENDENT = "independent samples"
    WITHOUT_REPLACEMENT = "samples without replacement"


@dataclass(frozen=True)
class TokenTree:
    """Candidate continuations of the committed tokens.

    Node 0 is the root: the last committed token, whose key and value are not cached
    yet. Every other node is a candidate. A chain is a tree; a root alone is plain
    decoding.

    Args:
        tokens: Token ids, ``tokens[0]`` the root.
        parents: Parent of each node, ``-1`` for the root, else a smaller index.
            Siblings stand in the order in which they were drawn; put the likeliest
            path first, keeping it costs no copy.
        drawn: How the tokens were drawn.
        draft_probs: For sampled tokens, node -> the distribution ``[vocab]`` (float,
            sums to one) its token was drawn from. Siblings drawn without replacement
            carry the same distribution, not the renormalised ones.
        probes: Nodes that are evaluated but never accepted (lookahead's window). A
            probe's children are probes.
        unread: Probes whose logits nobody reads, so that none are computed.
        evidence: One small integer (0..1023) per node, or empty: what its drafter goes
            by, e.g. a match length or a rank. Nodes of equal evidence should be right
            equally often; a hybrid learns how often that is.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    drawn: Drawn = Drawn.DETERMINISTIC
    draft_probs: Mapping[int, torch.Tensor] = field(default_factory=dict)
    probes: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    evidence: Sequence[int] = ()

    @classmethod
    def root_only(cls, root: int) -> TokenTree:
        """Propose nothing."""
        return cls((root,), (-1,))

    @classmethod
    def chain(
        cls,
        root: int,
        tokens: Sequence[int],
        drawn: Drawn = Drawn.DETERMINISTIC,
        draft_probs: Sequence[torch.Tensor] = (),
    ) -> TokenTree:
        """One continuation; ``draft_probs[i]`` is the distribution of ``tokens[i]``."""
        probs = {i + 1: row for i, row in enumerate(draft_probs)}
        return cls((root, *tokens), range(-1, len(tokens)), drawn, probs)

    @classmethod
    def from_paths(
        cls, root: int, paths: Iterable[Sequence[int]], max_nodes: int | None = None
    ) -> TokenTree:
        """Merge continuations, likeliest first, into one tree of distinct siblings.

        At most ``max_nodes`` candidates are kept; paths are cut, not reordered.
        """
        tokens, parents = [root], [-1]
        children: dict[tuple[int, int], int] = {}
        for path in paths:
            node = 0
            for token in path:
                child = children.get((node, token))
                if child is None:
                    if max_nodes is not None and len(tokens) > max_nodes:
                        break
                    child = len(tokens)
                    children[node, token] = child
                    tokens.append(token)
                    parents.append(node)
                node = child
        return cls(tokens, parents)

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.tokens)

    @property
    def proposed(self) -> int:
        """Candidates that could be accepted."""
        return len(self.tokens) - 1 - len(self.probes)

    @cached_property
    def depths(self) -> list[int]:
        """Distance of each node from the root."""
        depths = [0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    @property
    def depth(self) -> int:
        """Distance of the deepest candidate from the root, probes not counted."""
        if not self.probes:
            return max(self.depths)
        return max(
            depth for node, depth in enumerate(self.depths) if node not in self.probes
        )

    @cached_property
    def children(self) -> list[list[int]]:
        """Acceptable children of each node, in draw order."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            if node not in self.probes:
                children[self.parents[node]].append(node)
        return children

    @property
    def is_chain(self) -> bool:
        """Whether every node's parent is the node before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def ancestors(self) -> list[list[int]]:
        """For each node, the nodes it may attend to: its ancestors and itself."""
        found: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            found.append([*(found[parent] if parent >= 0 else []), node])
        return found

    def path_tokens(self, node: int) -> list[int]:
        """The tokens from the root's child down to ``node``."""
        path = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def principal_chain(self) -> TokenTree:
        """The path of first-drawn children: what a model without tree masks can verify.

        Exact however tokens were drawn: the first child of a node came from its
        distribution.
        """
        nodes = [0]
        while children := self.children[nodes[-1]]:
            nodes.append(children[0])
        return self.select(nodes)

    def cut(self, max_nodes: int, max_depth: int) -> TokenTree:
        """Keep the first ``max_nodes`` candidates no deeper than ``max_depth``."""
        if len(self) <= max_nodes + 1 and max(self.depths) <= max_depth:
            return self
        kept = [n for n in range(len(self)) if self.depths[n] <= max_depth]
        return self.select(kept[: max_nodes + 1])

    def select(self, nodes: Sequence[int]) -> TokenTree:
        """The sub-tree of ``nodes``: ascending, closed under parents, root included."""
        new = {old: i for i, old in enumerate(nodes)}
        return TokenTree(
            tokens=[self.tokens[old] for old in nodes],
            parents=[
                -1 if i == 0 else new[self.parents[o]] for i, o in enumerate(nodes)
            ],
            drawn=self.drawn,
            draft_probs={new[o]: q for o, q in self.draft_probs.items() if o in new},
            probes=frozenset(new[o] for o in self.probes if o in new),
            unread=frozenset(new[o] for o in self.unread if o in new),
            evidence=[self.evidence[old] for old in nodes] if self.evidence else (),
        )

    def check(self, root: int, vocab_size: int) -> None:
        """Raise :class:`InvalidTreeError` unless the engine can verify this."""
        if len(self.tokens) != len(self.parents) or not self.tokens:
            raise InvalidTreeError(
                "tokens and parents must have one length >= 1, "
                f"got {len(self.tokens)} and {len(self.parents)}"
            )
        if self.tokens[0] != root or self.parents[0] != -1:
            raise InvalidTreeError(
                f"node 0 must be the last committed token {root} with parent -1, "
                f"got token {self.tokens[0]}, parent {self.parents[0]}"
            )
        for node in range(1, len(self.tokens)):
            parent, token = self.parents[node], self.tokens[node]
            if not 0 <= parent < node:
                raise InvalidTreeError(
                    f"a parent must precede its child, got parent {parent} of {node}"
                )
            if not 0 <= token < vocab_size:
                raise InvalidTreeError(
                    f"token ids must be in 0..{vocab_size - 1}, got {token} at {node}"
                )
            if parent in self.probes and node not in self.probes:
                raise InvalidTreeError(f"node {node} hangs below the probe {parent}")
        if self.evidence and len(self.evidence) != len(self.tokens):
            raise InvalidTreeError(
                f"evidence must be given for all {len(self.tokens)} nodes or none, "
                f"got {len(self.evidence)}"
            )
        if not self.unread <= self.probes:
            raise InvalidTreeError("only probes may be unread")
        if 0 in self.probes or any(not 0 < n < len(self.tokens) for n in self.probes):
            raise InvalidTreeError(
                "probes must be nodes of the tree, the root excluded"
            )
        if self.drawn is not Drawn.INDEPENDENT:
            self._check_siblings()
        if self.drawn is Drawn.WITHOUT_REPLACEMENT:
            missing = set(range(1, len(self))) - self.probes - set(self.draft_probs)
            if missing:
                raise InvalidTreeError(
                    f"{self.drawn.value} need draft_probs, missing for "
                    f"{sorted(missing)}"
                )

    def _check_siblings(self) -> None:
        for node, children in enumerate(self.children):
            if len(children) < 2:
                continue
            tokens = [self.tokens[child] for child in children]
            if len(set(tokens)) != len(tokens):
                raise InvalidTreeError(
                    f"siblings must be distinct tokens, got {tokens} below {node}"
                )
