"""Suffix decoding: what followed the longest known endings, here or in past outputs.

Oliaro et al. 2024, arXiv:2411.04975, and Snowflake's ArcticInference.
"""

from __future__ import annotations

import itertools
import secrets
import warnings
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from adaptspec.knowledge import KnowledgeWarning
from adaptspec.params import DraftingParams, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec_plugins.suffix.index import Draft, SuffixIndex

# Upper ends of the buckets of what a node's evidence says.
LENGTHS = (1, 2, 3, 4, 6, 9, 15)
SHARES = (0.2, 0.4, 0.6, 0.8, 0.999)
COUNTS = (1, 2, 4)

_EMPTY = np.zeros(0, dtype=np.int32)


class SuffixParams(DraftingParams):
    """``max_depth`` and ``max_cached_tokens`` bound time and memory."""

    draft_length: Annotated[int, Tunable(2, 32, log=True)] = Field(
        default=12, ge=1, le=256
    )
    spec_factor: Annotated[float, Tunable(0.5, 4.0, step=0.5)] = Field(
        default=2.0, ge=0.0, le=64.0, description="tokens per matched token"
    )
    spec_offset: Annotated[int, Tunable(-2, 2)] = Field(
        default=0, ge=-64, le=64, description="tokens beside those of spec_factor"
    )
    min_probability: Annotated[float, Tunable(0.02, 0.6, log=True)] = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="propose no token whose path followed less often than this",
    )
    min_score: Annotated[float, Tunable(0.0, 3.0, step=0.25)] = Field(
        default=0.0,
        ge=0.0,
        description="propose nothing where fewer tokens are expected to be right",
    )
    tree: Annotated[bool, Tunable()] = Field(
        default=True, description="several continuations, not the most frequent only"
    )
    use_global: Annotated[bool, Tunable()] = Field(
        default=True, description="match earlier outputs too, not this request only"
    )
    max_depth: int = Field(
        default=32, ge=1, le=256, description="longest match told apart, in tokens"
    )
    max_cached_tokens: int = Field(
        default=262_144, ge=0, description="tokens of earlier outputs that are kept"
    )


class Suffix(Strategy):
    """Prompt lookup with counts, trees and a memory of earlier outputs."""

    name = "suffix"
    summary = "copies what most often followed the same ending, here or in past outputs"
    reference = "arXiv:2411.04975"
    Params = SuffixParams
    replays = True
    joins = {"draft_length": 24, "min_probability": 0.05}  # noqa: RUF012
    knowledge = 1
    params: SuffixParams

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self.past = PastOutputs(self.params.max_cached_tokens)

    def start(self, target: Target) -> Drafter:
        """Indexes the prompt at the first step."""
        self.past.check(target.model.vocab_size)
        return _SuffixDrafter(self.params, self.past, len(target.prompt), target.trees)

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """The newest outputs of all processes, oldest first."""
        return self.past.sync(stored)


class PastOutputs:
    """Outputs of earlier requests, the newest up to a number of tokens.

    Args:
        most: Tokens kept, one more counted for each output.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._checked = 0  # vocabulary the tokens were held against
        self.forget()

    def forget(self) -> None:
        """Begin anew, without any output."""
        self.index = SuffixIndex()
        self._outputs: deque[tuple[int, array[int]]] = deque()  # (id, tokens)
        self._known: set[int] = set()
        self._fresh: set[int] = set()  # not in any file yet

    def __len__(self) -> int:
        return len(self._outputs)

    def add(self, tokens: Sequence[int]) -> None:
        """Remember an output; the oldest make room."""
        identifier = secrets.randbits(62)
        if self._append(identifier, tokens):
            self._fresh.add(identifier)

    def check(self, vocab_size: int) -> None:
        """Forget everything if it holds tokens the model hasn't."""
        if self._checked == vocab_size:
            return
        highest = max((max(tokens) for _, tokens in self._outputs), default=-1)
        if highest >= vocab_size:
            warnings.warn(
                f"suffix: kept outputs are left out: they hold token {highest}, the "
                f"model has 0..{vocab_size - 1}",
                KnowledgeWarning,
                stacklevel=2,
            )
            self.forget()
        self._checked = vocab_size

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Add what others wrote; return theirs and ours, within the bound."""
        theirs = _read(stored)
        fresh = [(i, tokens) for i, tokens in self._outputs if i in self._fresh]
        for identifier, tokens in theirs:
            if identifier not in self._known:
                self._append(identifier, tokens)
                self._checked = 0
        kept: list[tuple[int, array[int]]] = []
        size = 0
        for identifier, tokens in reversed([*theirs, *fresh]):
            size += len(tokens) + 1
            if size > self._most:
                break
            kept.append((identifier, tokens))
        kept.reverse()
        self._fresh.clear()
        ends = torch.tensor([0, *(len(tokens) for _, tokens in kept)]).cumsum(0)
        joined = np.concatenate([_EMPTY, *(tokens for _, tokens in kept)])
        return {
            "ids": torch.tensor([i for i, _ in kept], dtype=torch.int64),
            "ends": ends,
            "tokens": torch.from_numpy(joined),
        }

    def _append(self, identifier: int, tokens: Sequence[int]) -> bool:
        if not tokens or len(tokens) + 1 > self._most:
            return False
        self._outputs.append((identifier, array("i", tokens)))
        self._known.add(identifier)
        self.index.extend(tokens)
        self.index.separate()
        while len(self.index) > self._most:
            old, gone = self._outputs.popleft()
            self._known.discard(old)
            self._fresh.discard(old)
            self.index.drop_first(len(gone) + 1)
        return True


def _read(stored: Mapping[str, torch.Tensor] | None) -> list[tuple[int, array[int]]]:
    """The outputs a file holds; none, with a warning, if they make no sense."""
    if not stored:
        return []
    try:
        ids, ends = stored["ids"].tolist(), stored["ends"].tolist()
        ordered = all(a < b for a, b in itertools.pairwise(ends))
        tokens = array("i", stored["tokens"].to(torch.int32).numpy().tobytes())
        whole = len(ends) == len(ids) + 1 and ends[0] == 0 and ends[-1] == len(tokens)
        integer = all(not stored[k].is_floating_point() for k in ("ids", "tokens"))
        flat = stored["tokens"].dim() == 1
        if not (ordered and whole and integer and flat and min(tokens, default=0) >= 0):
            raise ValueError("ends or tokens out of order")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        warnings.warn(
            f"suffix: kept outputs are left out: {error!r}",
            KnowledgeWarning,
            stacklevel=2,
        )
        return []
    return [
        (identifier, tokens[ends[i] : ends[i + 1]]) for i, identifier in enumerate(ids)
    ]


class _SuffixDrafter(Drafter):
    def __init__(
        self, params: SuffixParams, past: PastOutputs, prompt: int, trees: bool
    ) -> None:
        self._params, self._past = params, past
        self._prompt, self._tree = prompt, trees and params.tree
        self._index = SuffixIndex()
        self._ids: Sequence[int] = ()

    def propose(self, context: Context) -> TokenTree:
        self._ids = context.ids
        self._index.extend(context.ids[len(self._index) :])
        params = self._params
        root = context.ids[-1]
        depth = context.room - 1
        if depth < 1:
            return TokenTree.root_only(root)

        def best(index: SuffixIndex, above: float = 0.0) -> Draft:
            return index.best_draft(
                context.ids,
                factor=params.spec_factor,
                offset=params.spec_offset,
                most=min(params.draft_length, context.max_nodes),
                least=params.min_probability,
                depth=params.max_depth,
                room=depth,
                tree=self._tree,
                above=above,
            )

        draft, past = best(self._index), False
        if params.use_global:
            other = best(self._past.index, draft.score)
            if other.tokens:
                draft, past = other, True
        if not draft.tokens or draft.score < params.min_score:
            return TokenTree.root_only(root)
        return TokenTree(
            [root, *draft.tokens],
            [-1, *(parent + 1 for parent in draft.parents)],
            evidence=[0, *_evidence(draft, past)],
        )

    def observe(self, outcome: Any) -> None:
        """Only the committed tokens matter; they are read from the context."""

    def close(self) -> None:
        """The output joins the past ones, also one that was cut off."""
        if self._params.use_global:
            self._past.add(list(self._ids[self._prompt :]))


def _evidence(draft: Draft, past: bool) -> list[int]:
    """Match length, share and number of occurrences, and own or earlier output."""
    length = _bucket(draft.length, LENGTHS)
    found = []
    for share, count in zip(draft.shares, draft.counts, strict=True):
        code = length * (len(SHARES) + 1) + _bucket(share, SHARES)
        code = code * (len(COUNTS) + 1) + _bucket(count, COUNTS)
        found.append(2 * code + past)
    return found


def _bucket(value: float, ends: Sequence[float]) -> int:
    return sum(value > end for end in ends)
