"""Suffix decoding against counting over every position of every text."""

from __future__ import annotations

import gc
import random
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.knowledge import KnowledgeWarning
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Target, TokenTree
from adaptspec.testing import StrategyContract
from adaptspec_plugins.suffix.index import OCCURRENCES, SuffixIndex
from adaptspec_plugins.suffix.strategy import PastOutputs, Suffix, SuffixParams

Texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=4)
# Few enough that every occurrence is among the newest.
Context_ = st.lists(st.integers(0, 2), min_size=1, max_size=24)


class TestSuffix(StrategyContract):
    strategy = Suffix
    params = (
        {},
        {"tree": False, "spec_factor": 4.0, "min_probability": 0.02},
        {"use_global": False, "draft_length": 32, "spec_offset": 2},
    )


def indexed(texts: Sequence[Sequence[int]]) -> SuffixIndex:
    index = SuffixIndex()
    for text in texts:
        index.extend(text)
        index.separate()
    return index


def naive_followers(
    texts: Sequence[Sequence[int]], ending: Sequence[int]
) -> list[list[int]]:
    """What stands behind each occurrence of ``ending``, to the end of its text."""
    size = len(ending)
    return [
        list(text[at + size :])
        for text in texts
        for at in range(len(text) - size + 1)
        if list(text[at : at + size]) == list(ending) and at + size < len(text)
    ]


def naive_path(
    followers: Sequence[Sequence[int]], path: Sequence[int]
) -> tuple[int, int]:
    """Occurrences that go on as ``path``, and those that reached its parent."""
    parent = sum(list(f[: len(path) - 1]) == list(path[:-1]) for f in followers)
    return sum(list(f[: len(path)]) == list(path) for f in followers), parent


@given(Texts, Context_, st.integers(1, 12))
def test_every_occurrence_is_found_with_its_length(
    texts: list[list[int]], context: list[int], depth: int
) -> None:
    found = indexed(texts).matches(context, depth)
    lengths = Counter(match.length for match in found)
    expected: Counter[int] = Counter()
    for text in texts:
        for end in range(1, len(text)):
            length = 0
            while (
                length < min(depth, end, len(context))
                and text[end - 1 - length] == context[len(context) - 1 - length]
            ):
                length += 1
            if length:
                expected[length] += 1
    assert lengths == expected
    assert [m.length for m in found] == sorted((m.length for m in found), reverse=True)


@given(Texts, Context_, st.booleans(), st.integers(1, 12), st.integers(1, 6))
def test_a_drafts_shares_counts_and_score_are_the_counted_ones(
    texts: list[list[int]], context: list[int], tree: bool, budget: int, depth: int
) -> None:
    index = indexed(texts)
    matches = index.matches(context, 8)
    if not matches:
        return
    length = matches[0].length
    ends = [m.end for m in matches if m.length == length]
    # Occurrences of the longest match only: those of the ending of that length.
    followers = naive_followers(texts, context[-length:])
    assert len(followers) == len(ends)
    draft = index.draft(ends, budget, 0.05, depth, tree)
    score = 0.0
    paths: list[list[int]] = []
    values: list[float] = []
    for node, (token, parent) in enumerate(
        zip(draft.tokens, draft.parents, strict=True)
    ):
        path = [*(paths[parent] if parent >= 0 else []), token]
        count, above = naive_path(followers, path)
        value = count / above * (values[parent] if parent >= 0 else 1.0)
        assert draft.counts[node] == count
        assert draft.shares[node] == count / above
        paths.append(path)
        values.append(value)
        score += value
    assert draft.score == pytest.approx(score)
    assert len(set(map(tuple, paths))) == len(paths)
    assert max(map(len, paths)) <= depth
    assert values == sorted(values, reverse=True)
    if tree:
        # Nothing likelier was left out: every path not taken is worth no more.
        everything = {
            tuple(f[:n]) for f in followers for n in range(1, min(depth, len(f)) + 1)
        }
        left = [p for p in everything if list(p) not in paths]

        def value_of(path: Sequence[int]) -> float:
            value = 1.0
            for n in range(1, len(path) + 1):
                count, above = naive_path(followers, path[:n])
                value *= count / above
            return value

        if len(draft.tokens) < budget:
            assert all(value_of(path) < 0.05 for path in left)
        else:
            assert all(value_of(path) <= values[-1] + 1e-9 for path in left)
    else:
        assert list(draft.parents) == list(range(-1, len(draft.tokens) - 1))
        for path in paths:
            count, _ = naive_path(followers, path)
            rivals = {tuple([*path[:-1], t]) for t in range(3)}
            assert count == max(naive_path(followers, list(r))[0] for r in rivals)


@given(Texts, Context_)
def test_the_best_draft_has_the_highest_score_over_all_match_lengths(
    texts: list[list[int]], context: list[int]
) -> None:
    index = indexed(texts)
    options: dict[str, Any] = dict(
        factor=1.0, offset=0.0, most=6, least=0.1, depth=8, room=20, tree=True
    )
    best = index.best_draft(context, **options)
    scores = [0.0]
    for length in range(1, min(8, len(context)) + 1):
        ends = [m.end for m in index.matches(context, 8) if m.length >= length]
        if ends:
            scores.append(index.draft(ends, min(6, length), 0.1, 20, True).score)
    assert best.score == pytest.approx(max(scores))


@pytest.mark.slow
@given(Texts, Context_, st.floats(0, 4))
def test_a_draft_that_must_beat_a_score_is_the_best_one_or_none(
    texts: list[list[int]], context: list[int], above: float
) -> None:
    index = indexed(texts)
    options: dict[str, Any] = dict(
        factor=1.0, offset=0.0, most=6, least=0.1, depth=8, room=3, tree=True
    )
    best = index.best_draft(context, **options)
    wanted = index.best_draft(context, **options, above=above)
    assert list(wanted.tokens) == (list(best.tokens) if best.score > above else [])


@given(st.lists(st.integers(0, 2), max_size=60), Context_, st.integers(1, 9))
def test_a_text_is_indexed_alike_in_pieces_and_at_once(
    text: list[int], context: list[int], piece: int
) -> None:
    whole, pieces = SuffixIndex(), SuffixIndex()
    for index in (whole, pieces):
        index.extend([0, 1])
        index.separate()
    whole.extend(text)
    for at in range(0, len(text), piece):
        pieces.extend(text[at : at + piece])
    assert len(whole) == len(pieces) == len(text) + 3
    assert whole.matches(context, 9) == pieces.matches(context, 9)


@pytest.mark.slow
@given(Texts, Context_, st.data())
def test_forgotten_texts_leave_nothing_behind(
    texts: list[list[int]], context: list[int], data: st.DataObject
) -> None:
    gone = data.draw(st.integers(0, len(texts)))
    index = indexed(texts)
    for text in texts[:gone]:
        index.drop_first(len(text) + 1)
    fresh = indexed(texts[gone:])
    assert len(index) == len(fresh)
    assert Counter(m.length for m in index.matches(context, 9)) == Counter(
        m.length for m in fresh.matches(context, 9)
    )


def test_the_newest_occurrences_are_those_that_count() -> None:
    index = indexed([[1, 2]] * 100 + [[1, 0]] * (OCCURRENCES - 1))
    draft = index.draft([m.end for m in index.matches([1], 4)], 4, 0.0, 1, True)
    assert dict(zip(draft.tokens, draft.counts, strict=True)) == {
        0: OCCURRENCES - 1,
        2: 1,
    }


@pytest.mark.slow
def test_what_is_held_is_compact_and_bounded_however_much_went_through() -> None:
    drawn = random.Random(3)
    past = PastOutputs(20_000)
    tracemalloc.start()
    try:
        for _ in range(600):
            past.add([drawn.randrange(50_000) for _ in range(99)])
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(past.index) == 20_000
    # Of 20 000 tokens four arrays of links and four tables, 4 bytes an entry.
    assert held < 80 * 20_000
    assert past.index.nbytes < 60 * 20_000
    assert SuffixIndex().nbytes < 10_000


@pytest.mark.slow
@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.data())
def test_a_long_text_is_indexed_as_if_it_came_token_by_token(
    text: list[int], data: st.DataObject
) -> None:
    """Many tokens at once are linked by another way than a few."""
    at_once, one_by_one = SuffixIndex(), SuffixIndex()
    for index in (at_once, one_by_one):
        index.extend([0, 1, 2])
        index.separate()
    long = text * (1 + 600 // len(text))
    at_once.extend(long)
    for token in long:
        one_by_one.extend([token])
    following = data.draw(st.lists(st.integers(0, 3), max_size=9))
    for index in (at_once, one_by_one):
        index.extend(following)
    context = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    assert at_once.matches(context, 12) == one_by_one.matches(context, 12)


@pytest.mark.slow
def test_a_text_whose_front_is_forgotten_still_leads_to_the_rest() -> None:
    """Forgetting in small pieces moves all places now and then."""
    drawn = random.Random(5)
    texts = [[drawn.randrange(9) for _ in range(30)] for _ in range(200)]
    index = indexed(texts[:40])
    for gone, text in enumerate(texts[40:]):
        index.drop_first(31)
        index.extend(text)
        index.separate()
        fresh = indexed(texts[gone + 1 : gone + 41])
        for context in (text[:8], text[5:7], texts[gone][:4]):
            found, expected = (
                Counter(m.length for m in one.matches(context, 12))
                for one in (index, fresh)
            )
            assert found == expected


def start(strategy: Suffix, prompt: Sequence[int], trees: bool = True) -> Drafter:
    nothing = cast(Any, None)

    class Model:
        vocab_size = 100

    target = Target(
        cast(Any, Model), None, None, tuple(prompt), nothing, trees, perf_counter
    )
    return strategy.start(target)


def propose(drafter: Drafter, ids: Sequence[int], room: int = 50) -> TokenTree:
    return drafter.propose(Context(list(ids), room, 64, 0))


def test_what_was_repeated_is_proposed_until_its_end() -> None:
    ids = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    tree = propose(start(Suffix(), ids), ids)
    assert list(tree.tokens) == [3, 4, 5, 6, 9, 1, 2][: len(tree.tokens)]
    assert tree.is_chain
    assert len(tree) >= 6


def test_an_output_helps_the_next_request_and_a_cut_off_one_too() -> None:
    strategy = Suffix()
    drafter = start(strategy, [1])
    propose(drafter, [1, 50, 51, 52, 53])
    drafter.close()
    tree = propose(start(strategy, [7, 50, 51]), [7, 50, 51])
    assert list(tree.tokens) == [51, 52, 53]
    alone = propose(start(Suffix(), [7, 50, 51]), [7, 50, 51])
    assert len(alone) == 1
    unshared = Suffix(SuffixParams(use_global=False))
    drafter = start(unshared, [1])
    propose(drafter, [1, 50, 51, 52, 53])
    drafter.close()
    assert len(unshared.past) == 0


def test_interleaved_sequences_dont_mix() -> None:
    strategy = Suffix()
    one, other = start(strategy, [1, 2]), start(strategy, [3, 4])
    propose(one, [1, 2, 60, 61])
    propose(other, [3, 4, 70, 71])
    propose(one, [1, 2, 60, 61, 62])
    other.close()
    one.close()
    outputs = [list(tokens) for _, tokens in strategy.past._outputs]
    assert outputs == [[70, 71], [60, 61, 62]]


def test_a_model_of_chains_gets_a_chain() -> None:
    ids = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]
    assert not propose(start(Suffix(), ids), ids).is_chain
    assert propose(start(Suffix(), ids, trees=False), ids).is_chain


@pytest.mark.parametrize("room", [1, 2, 3])
def test_nothing_is_proposed_beyond_the_room(room: int) -> None:
    ids = [1, 2, 3, 4, 5, 1, 2]
    tree = propose(start(Suffix(), ids), ids, room)
    assert max(tree.depths) <= room - 1


def test_a_high_threshold_proposes_nothing() -> None:
    ids = [1, 2, 3, 4, 5, 1, 2]
    patient = Suffix(SuffixParams(min_score=50.0))
    assert len(propose(start(patient, ids), ids)) == 1


def test_evidence_is_given_for_every_node_within_bounds() -> None:
    ids = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]
    tree = propose(start(Suffix(), ids), ids)
    assert len(tree.evidence) == len(tree)
    assert all(0 <= code < 1024 for code in tree.evidence)
    assert len(set(tree.evidence[1:])) > 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=12))
def test_past_outputs_are_bounded_and_the_newest_stay(
    outputs: list[list[int]],
) -> None:
    past = PastOutputs(15)
    for output in outputs:
        past.add(output)
    expected: list[list[int]] = []
    size = 0
    for output in reversed(outputs):
        size += len(output) + 1
        if size > 15:
            break
        expected.insert(0, output)
    assert [list(tokens) for _, tokens in past._outputs] == expected
    assert len(past.index) <= 15


def test_two_processes_merge_without_loss_or_doubles() -> None:
    one, other = PastOutputs(1000), PastOutputs(1000)
    one.add([1, 2, 3])
    stored = one.sync(None)
    other.add([4, 5])
    stored = other.sync(stored)
    one.add([6])
    stored = one.sync(stored)
    stored = other.sync(stored)
    assert sorted(list(t) for _, t in one._outputs) == [[1, 2, 3], [4, 5], [6]]
    assert sorted(list(t) for _, t in other._outputs) == [[1, 2, 3], [4, 5], [6]]
    assert stored["tokens"].tolist() == [1, 2, 3, 4, 5, 6]
    assert stored["ends"].tolist() == [0, 3, 5, 6]


def test_the_file_is_bounded_and_outputs_it_dropped_dont_return() -> None:
    one, other = PastOutputs(8), PastOutputs(8)
    one.add([1, 1, 1])
    stored = one.sync(None)
    other.add([2, 2, 2])
    other.add([3, 3, 3])
    stored = other.sync(stored)
    assert stored["tokens"].tolist() == [2, 2, 2, 3, 3, 3]
    stored = one.sync(stored)
    assert stored["tokens"].tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"ends": torch.tensor([0, 5, 3])},
        {"ends": torch.tensor([0])},
        {"ends": torch.tensor([], dtype=torch.int64)},
        {"tokens": torch.tensor([-4, 1, 2, 3, 4], dtype=torch.int32)},
        {"tokens": torch.tensor([0.5, 1, 2, 3, 4])},
        {"tokens": torch.tensor(3)},
        {"ids": torch.tensor([1])},
    ],
    ids=["order", "short", "empty", "negative", "fractions", "shape", "ids"],
)
def test_contents_that_make_no_sense_are_left_out_by_name(
    change: Mapping[str, torch.Tensor],
) -> None:
    good = {
        "ids": torch.tensor([1, 2]),
        "ends": torch.tensor([0, 3, 5]),
        "tokens": torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
    }
    past = PastOutputs(100)
    with pytest.warns(KnowledgeWarning, match="suffix: kept outputs are left out"):
        past.sync({**good, **change})
    assert len(past) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past.sync(good)
    assert len(past) == 2


def test_tokens_the_model_hasnt_are_forgotten_by_name() -> None:
    strategy = Suffix()
    strategy.past.add([1, 2, 100])
    with pytest.warns(KnowledgeWarning, match=r"token 100, the model has 0\.\.99"):
        start(strategy, [1])
    assert len(strategy.past) == 0


def test_a_repeated_request_takes_fewer_forwards(target: LanguageModel) -> None:
    strategy, engine = Suffix(), Engine(target)
    prompt, controls = [5, 17, 3], Controls.greedy(40)
    first = engine.generate(strategy, prompt, controls)
    second = engine.generate(strategy, prompt, controls)
    assert first.token_ids == second.token_ids
    assert second.stats.target_forwards < first.stats.target_forwards / 2
