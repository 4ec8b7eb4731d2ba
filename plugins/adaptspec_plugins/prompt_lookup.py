"""Prompt lookup: copy what followed the last n-gram earlier in the context.

Prompt Lookup Decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding;
also Yang et al. 2023, arXiv:2304.04487), with an incremental index in place of a scan,
several matches merged into a tree, and copies that run on periodically past the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from adaptspec.params import DraftingParams, Scalar, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Strategy,
    Target,
    TokenTree,
)

# Most recent matches of one n-gram looked at in a step: keeps a step's time flat where
# a token repeats thousands of times.
MOST_MATCHES = 64


class PromptLookupParams(DraftingParams):
    """Tuned bounds of the n-gram sizes don't overlap: every tuned pair is valid."""

    draft_length: Annotated[int, Tunable(2, 24, log=True)] = Field(
        default=8, ge=1, le=128, description="most tokens drafted along each branch"
    )
    max_ngram: Annotated[int, Tunable(3, 6)] = Field(
        default=3, ge=1, le=32, description="longest n-gram looked up, in tokens"
    )
    min_ngram: Annotated[int, Tunable(1, 3)] = Field(
        default=1, ge=1, le=32, description="shortest n-gram looked up, in tokens"
    )
    branches: Annotated[int, Tunable(1, 4)] = Field(
        default=1,
        ge=1,
        le=16,
        description="most distinct continuations proposed as a tree",
    )
    policy: Annotated[Literal["recent", "frequent"], Tunable()] = Field(
        default="recent", description="which matches of an n-gram come first"
    )

    @model_validator(mode="after")
    def _ordered(self) -> PromptLookupParams:
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                "min_ngram <= max_ngram must hold, "
                f"got min_ngram={self.min_ngram}, max_ngram={self.max_ngram}"
            )
        return self


class PromptLookup(Strategy):
    """Needs no draft model and costs microseconds: pays where output repeats input."""

    name = "prompt_lookup"
    summary = "copies what followed the same n-gram earlier in prompt and output"
    reference = "https://github.com/apoorvumang/prompt-lookup-decoding"
    Params = PromptLookupParams
    replays = True
    joins: ClassVar[Mapping[str, Scalar]] = {
        "draft_length": 16,
        "branches": 2,
        "max_ngram": 5,
    }
    params: PromptLookupParams

    def start(self, target: Target) -> Drafter:
        """Index the prompt."""
        return _Lookup(self.params, target.prompt, target.trees)


class _Lookup(Drafter):
    def __init__(
        self, params: PromptLookupParams, prompt: Sequence[int], trees: bool
    ) -> None:
        self._params = params
        self._branches = params.branches if trees else 1
        self.index = NgramIndex(params.min_ngram, params.max_ngram)
        self.index.extend(prompt)

    def propose(self, context: Context) -> TokenTree:
        ids = context.ids
        self.index.extend(ids[len(self.index) :])
        length = min(self._params.draft_length, context.room - 1, context.max_nodes)
        if length < 1:
            return TokenTree.root_only(ids[-1])
        paths = self._paths(length)
        tree = TokenTree.from_paths(
            ids[-1], [path for path, _ in paths], context.max_nodes
        )
        return TokenTree(tree.tokens, tree.parents, evidence=_evidence(tree, paths))

    def _paths(self, length: int) -> list[tuple[tuple[int, ...], int]]:
        """Distinct continuations, each with the size of the n-gram that matched."""
        paths: dict[tuple[int, ...], int] = {}
        search = _recent if self._params.policy == "recent" else _frequent
        for n, starts in self.index.matches():
            for path in search(self.index.tokens, starts, length):
                paths.setdefault(tuple(path), n)
                if len(paths) == self._branches:
                    return list(paths.items())
        return list(paths.items())


def _evidence(
    tree: TokenTree, paths: Sequence[tuple[tuple[int, ...], int]]
) -> list[int]:
    """Per node: size of the match, depth, and how many continuations came before."""
    evidence = [0] * len(tree)
    nodes = {
        (tree.parents[node], tree.tokens[node]): node for node in range(1, len(tree))
    }
    for rank, (path, n) in enumerate(paths):
        node = 0
        for depth, token in enumerate(path, 1):
            child = nodes.get((node, token))
            if child is None:
                break
            if not evidence[child]:
                evidence[child] = 64 * min(n, 15) + 4 * min(depth, 15) + min(rank, 3)
            node = child
    return evidence


class NgramIndex:
    """Where each n-gram of a growing token sequence is followed by another token.

    Adding a token costs one dictionary entry for each n-gram size.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._starts: dict[int, dict[tuple[int, ...], list[int]]] = {
            n: {} for n in range(max_ngram, min_ngram - 1, -1)
        }

    def __len__(self) -> int:
        """Tokens indexed."""
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``; the n-grams before each of them become findable."""
        for token in tokens:
            end = len(self.tokens)
            for n, starts in self._starts.items():
                if n <= end:
                    starts.setdefault(tuple(self.tokens[end - n :]), []).append(end)
            self.tokens.append(token)

    def matches(self) -> Iterator[tuple[int, Sequence[int]]]:
        """For the last n tokens, longest n first: n, where earlier ones went on.

        Oldest first, the ``MOST_MATCHES`` newest; sizes without a match are left out.
        """
        for n, starts in self._starts.items():
            found = starts.get(tuple(self.tokens[-n:]))
            if found:
                yield n, found[-MOST_MATCHES:]


def continuation(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """``length`` tokens from ``start`` on, run on periodically past the end.

    An n-gram that ends at ``start`` and again at the end says that the tokens between
    repeat; so does the copy.
    """
    copied = list(tokens[start : start + length])
    period = len(tokens) - start
    while len(copied) < length:
        copied.append(copied[-period])
    return copied


def _recent(
    tokens: Sequence[int], starts: Sequence[int], length: int
) -> Iterator[list[int]]:
    for start in reversed(starts):
        yield continuation(tokens, start, length)


def _frequent(
    tokens: Sequence[int], starts: Sequence[int], length: int
) -> Iterator[list[int]]:
    """At each fork the continuation most matches took; of equals, the most recent's.

    A further path leaves the known ones where most matches left them.
    """
    newest_first = [continuation(tokens, start, length) for start in reversed(starts)]
    left = [(newest_first, 0)]  # matches that agree on this many tokens
    while left:
        largest = max(range(len(left)), key=lambda i: len(left[i][0]))
        group, depth = left.pop(largest)
        while group.count(group[0]) < len(group):
            forks: dict[int, list[list[int]]] = {}
            for path in group:
                forks.setdefault(path[depth], []).append(path)
            depth += 1
            group = max(forks.values(), key=len)
            left.extend((fork, depth) for fork in forks.values() if fork is not group)
        yield group[0]
