"""A draft model's cache, kept in step with the committed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from adaptspec.strategy import Context, reading_from
from adaptspec.token_tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.model.cache import TreeCache
    from adaptspec.model.language_model import LanguageModel


UNKNOWN = -1e4  # logit of a token that the draft doesn't have; finite in every dtype


class DraftSequence:
    """Evaluates draft tokens; what the target confirms is never evaluated again.

    Between two :meth:`begin` the cache holds the committed tokens, from the first one
    that was read on, and, behind them, a tree of drafted ones. Node 0 is the last
    committed token.

    Args:
        model: The draft model.
        vocab_size: The target's; draft logits are cut or padded to it.
    """

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._readable = model.input_size
        self._stand_in = _stand_in(model)
        self._cache: TreeCache | None = None
        self._first = 0  # committed token that row 0 holds
        self._base = 0  # committed tokens before node 0
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
        read = 0 if self._cache is None else self._base + 1
        first = reading_from(self._first, read, len(ids), context.readable)
        if self._cache is None:
            self._cache = self._model.new_cache(len(ids) + context.room)
        elif first != self._first:
            self._cache.truncate(0)
        else:
            self._keep(ids, first)
        self._first = first
        unread = self._known(ids[first + self._cache.length :])
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
        tree = TokenTree(self._known(self._tokens), self._parents)
        if len(tokens) == 1 and tree.is_chain:  # plain causal attention, no mask needed
            return self._fit(
                self._model.prefill(self._known(tokens), self._cache).logits
            )
        return self._fit(self._model.extend(tree, self._cache, done).logits)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Tokens the draft can read: its stand-in for those that only the target has.

        What it drafts behind one is a worse guess, which verification makes good.
        """
        return [t if t < self._readable else self._stand_in for t in tokens]

    def _keep(self, ids: Sequence[int], first: int) -> None:
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
        self._cache.keep(self._base - first, path)

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut or pad to the target's vocabulary.

        Tokens that only the target has are drafted where the controls allow no others.
        """
        missing = self._vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[..., : self._vocab_size]
        return torch.nn.functional.pad(logits, (0, missing), value=UNKNOWN)


def _stand_in(model: LanguageModel) -> int:
    """What the draft reads in place of a token that it doesn't know."""
    for name in ("unk_token_id", "eos_token_id"):
        token = getattr(model.tokenizer, name, None)
        if isinstance(token, int) and 0 <= token < model.input_size:
            return token
    return 0
