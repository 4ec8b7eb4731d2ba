"""A draft model's cache, kept in step with the committed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from adaptspec.decoding.tree import TokenTree
from adaptspec.strategy import Context

if TYPE_CHECKING:
    from adaptspec.decoding.cache import TreeCache
    from adaptspec.models import LanguageModel


class DraftSequence:
    """Evaluates draft tokens; what the target confirms is never evaluated again.

    Between two :meth:`begin` the cache holds the committed tokens and, behind them, a
    tree of drafted ones. Node 0 is the last committed token.

    Args:
        model: The draft model.
        vocab_size: The target's; draft logits are cut or padded to it.
    """

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._cache: TreeCache | None = None
        self._base = 0  # cached rows before node 0
        self._tokens: list[int] = []
        self._parents: list[int] = []

    def room(self, context: Context) -> int:
        """How deep may be drafted; 0 past the draft model's longest context."""
        deepest = min(context.room - 1, context.max_nodes)
        if self._model.max_length is not None:
            # A drafted token needs its predecessor's position, not its own.
            deepest = min(deepest, self._model.max_length - len(context.ids) + 1)
        return max(0, deepest)

    def begin(self, context: Context) -> torch.Tensor:
        """Logits ``[1, vocab]`` after the last committed token, which becomes node 0.

        Of the tree drafted before, the committed path is kept; tokens that were never
        evaluated (the target's own) are fed together.
        """
        ids = context.ids
        if self._cache is None:
            self._cache = self._model.new_cache(len(ids) + context.room)
        else:
            self._keep(ids)
        unread = self._readable(ids[self._cache.length :])
        forward = self._model.prefill(unread, self._cache)
        self._base = len(ids) - 1
        self._tokens, self._parents = [ids[-1]], [-1]
        return self._fit(forward.logits)

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Evaluate new nodes below earlier ones: logits ``[len(tokens), vocab]``."""
        assert self._cache is not None
        done = len(self._tokens)
        self._tokens.extend(tokens)
        self._parents.extend(parents)
        tokens = self._readable(tokens)
        tree = TokenTree(self._readable(self._tokens), self._parents)
        if len(tokens) == 1 and tree.is_chain:  # plain causal attention, no mask needed
            return self._fit(self._model.prefill(tokens, self._cache).logits)
        return self._fit(self._model.extend(tree, self._cache, done).logits)

    def _readable(self, tokens: Sequence[int]) -> list[int]:
        """``tokens``, with 0 for those that only the target has an embedding for."""
        known = self._model.embedded
        return [token if token < known else 0 for token in tokens]

    def _keep(self, ids: Sequence[int]) -> None:
        """Keep the nodes that were committed: the path spelling ``ids`` from node 0."""
        assert self._cache is not None
        path = [0]
        # The last committed token is left out: its logits are needed again.
        for token in ids[self._base + 1 : -1]:
            child = next(
                (
                    node
                    for node in range(path[-1] + 1, len(self._tokens))
                    if self._parents[node] == path[-1] and self._tokens[node] == token
                ),
                None,
            )
            if child is None:
                break
            path.append(child)
        if len(ids) - 1 == self._base:  # nothing was committed since
            path = []
        self._cache.keep(self._base, path)

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut or pad with -inf to the target's vocabulary (paddings differ)."""
        missing = self._vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[..., : self._vocab_size]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
