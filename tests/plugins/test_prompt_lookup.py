"""Prompt lookup against a naive search of the whole context."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import InvalidParamsError
from adaptspec.strategy import Context, Drafter, Target, TokenTree
from adaptspec_plugins.prompt_lookup import (
    MOST_MATCHES,
    NgramIndex,
    PromptLookup,
    PromptLookupParams,
    continuation,
)

Tokens = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def start(prompt: Sequence[int], trees: bool = True, **params: Any) -> Drafter:
    nothing = cast(Any, None)  # prompt lookup asks neither model nor sampler
    strategy = PromptLookup(PromptLookupParams(**params))
    return strategy.start(
        Target(nothing, None, None, tuple(prompt), nothing, trees, perf_counter)
    )


def propose(ids: Sequence[int], trees: bool = True, **params: Any) -> TokenTree:
    return start(ids, trees, **params).propose(Context(list(ids), 100, 128, 0))


def paths(tree: TokenTree) -> list[list[int]]:
    leaves = [node for node, children in enumerate(tree.children) if not children]
    return [tree.path_tokens(leaf) for leaf in leaves]


def naive_starts(ids: Sequence[int], n: int) -> list[int]:
    """Where the last n tokens stood before, counted by comparing at every position."""
    if n > len(ids):
        return []
    gram = list(ids[len(ids) - n :])
    return [end for end in range(n, len(ids)) if list(ids[end - n : end]) == gram]


def naive_continuation(ids: Sequence[int], start: int, length: int) -> list[int]:
    """Append one copied token after the other, as if each were committed."""
    grown = list(ids)
    for offset in range(length):
        grown.append(grown[start + offset])
    return grown[len(ids) :]


@pytest.mark.slow
@given(Tokens, st.integers(1, 3), st.integers(0, 3), st.lists(st.integers(0, 40)))
def test_the_index_finds_what_a_scan_finds_however_it_was_fed(
    ids: list[int], low: int, more: int, cuts: list[int]
) -> None:
    index = NgramIndex(low, low + more)
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for begin, end in itertools.pairwise(bounds):
        index.extend(ids[begin:end])
    expected = [naive_starts(ids, n) for n in range(low + more, low - 1, -1)]
    found = [list(starts) for _, starts in index.matches()]
    assert found == [starts[-MOST_MATCHES:] for starts in expected if starts]


@pytest.mark.slow
@given(Tokens, st.data(), st.integers(1, 30))
def test_a_copy_runs_on_as_if_the_copied_tokens_were_committed(
    ids: list[int], data: st.DataObject, length: int
) -> None:
    begin = data.draw(st.integers(0, len(ids) - 1))
    expected = naive_continuation(ids, begin, length)
    assert continuation(ids, begin, length) == expected


@given(Tokens, st.integers(1, 4), st.integers(1, 12))
def test_recent_copies_after_the_newest_match_of_the_longest_ngram(
    ids: list[int], max_ngram: int, draft_length: int
) -> None:
    tree = propose(ids, max_ngram=max_ngram, draft_length=draft_length)
    starts = next(
        filter(None, (naive_starts(ids, n) for n in range(max_ngram, 0, -1))), []
    )
    expected = naive_continuation(ids, starts[-1], draft_length) if starts else []
    assert list(tree.tokens) == [ids[-1], *expected]
    assert tree.is_chain


@given(Tokens, st.integers(1, 8))
def test_frequent_takes_the_majority_at_every_fork(ids: list[int], length: int) -> None:
    tree = propose(ids, policy="frequent", max_ngram=1, draft_length=length, branches=1)
    copies = [naive_continuation(ids, s, length) for s in naive_starts(ids, 1)]
    for depth, token in enumerate(tree.tokens[1:]):
        counts = Counter(copy[depth] for copy in copies)
        assert counts[token] == max(counts.values())
        copies = [copy for copy in copies if copy[depth] == token]
    assert len(tree) - 1 == (length if len(naive_starts(ids, 1)) else 0)


@given(Tokens, st.sampled_from(["recent", "frequent"]), st.integers(1, 4))
def test_branches_are_distinct_continuations_of_matches_and_as_many_as_there_are(
    ids: list[int], policy: str, branches: int
) -> None:
    tree = propose(ids, policy=policy, branches=branches, max_ngram=3, draft_length=4)
    real = {
        tuple(naive_continuation(ids, begin, 4))
        for n in (1, 2, 3)
        for begin in naive_starts(ids, n)
    }
    proposed = [tuple(path) for path in paths(tree) if path]
    assert set(proposed) <= real
    assert len(set(proposed)) == len(proposed) == min(branches, len(real))


@given(Tokens, st.integers(1, 4))
def test_nodes_of_one_evidence_share_match_depth_and_rank(
    ids: list[int], branches: int
) -> None:
    tree = propose(ids, max_ngram=3, branches=branches, draft_length=20)
    copies: list[tuple[int, list[int]]] = []
    for n in (3, 2, 1):
        for begin in reversed(naive_starts(ids, n)):
            copy = naive_continuation(ids, begin, 20)
            if copy not in [known for _, known in copies]:
                copies.append((n, copy))
    for node in range(1, len(tree)):
        path = tree.path_tokens(node)
        rank, n = next(
            (rank, n)
            for rank, (n, copy) in enumerate(copies)
            if copy[: len(path)] == path
        )
        assert tree.evidence[node] == 64 * n + 4 * min(len(path), 15) + rank


def test_the_majority_beats_the_most_recent_match_only_when_asked_to() -> None:
    ids = [1, 7, 1, 7, 1, 9, 1]
    assert propose(ids, draft_length=1, max_ngram=1).tokens[1] == 9
    assert propose(ids, draft_length=1, max_ngram=1, policy="frequent").tokens[1] == 7


def test_a_target_that_verifies_only_chains_gets_one_branch() -> None:
    ids = [1, 7, 1, 8, 1]
    assert len(paths(propose(ids, branches=2, max_ngram=1))) == 2
    assert propose(ids, trees=False, branches=2, max_ngram=1).is_chain


@pytest.mark.parametrize(("room", "nodes"), [(1, 128), (2, 128), (4, 128), (100, 3)])
def test_no_more_is_drafted_than_can_be_emitted_or_verified(
    room: int, nodes: int
) -> None:
    ids = [1, 2, 3, 4] * 5
    tree = start(ids, draft_length=8, branches=3).propose(Context(ids, room, nodes, 0))
    assert tree.proposed == min(8, room - 1, nodes)


def test_tokens_committed_between_steps_are_found_in_the_next_step() -> None:
    drafter = start([1, 2, 3])
    ids = [1, 2, 3, 9, 8, 1]
    assert drafter.propose(Context(ids, 50, 128, 0)).tokens[1] == 2
    ids += [2, 9]
    assert list(drafter.propose(Context(ids, 50, 128, 1)).tokens[:3]) == [9, 8, 1]


def test_ngram_bounds_that_cross_are_refused_by_name() -> None:
    with pytest.raises(InvalidParamsError, match="min_ngram <= max_ngram"):
        PromptLookupParams.parse({"min_ngram": 5, "max_ngram": 2})
