"""Token recycling against a dictionary filled from fresh forward passes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.acceleration import top_tokens
from adaptspec.acceleration.top_tokens import likeliest
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.knowledge import KnowledgeFile, KnowledgeWarning
from adaptspec.model.forward import Capability
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Outcome, Target
from adaptspec.testing.strategies import StrategyContract
from adaptspec.token_tree import TokenTree
from adaptspec_plugins.token_recycling import commonest as _commonest
from adaptspec_plugins.token_recycling.commonest import Commonest
from adaptspec_plugins.token_recycling.strategy import (
    CHANCES,
    TokenRecycling,
    TokenRecyclingParams,
    grow,
)
from adaptspec_plugins.token_recycling.successors import Successors

BuildModel = Callable[..., LanguageModel]
FreshLogits = Callable[[LanguageModel, list[int]], torch.Tensor]
Row = tuple[list[int], int]


class TestTokenRecycling(StrategyContract):
    strategy = TokenRecycling
    params = (
        {},
        {"successors": 3, "draft_length": 5, "min_chance": 0.05},
        {"persist": False, "prefill_positions": 0},
    )


def recycling(**params: Any) -> TokenRecycling:
    return TokenRecycling(TokenRecyclingParams.parse(params))


def start(
    strategy: TokenRecycling, model: LanguageModel, prompt: Sequence[int]
) -> Drafter:
    sampler = Sampler(Processors(Controls(), 1, model.device), 0)
    trees = model.capability.level == "tree"
    return strategy.start(
        Target(model, None, None, tuple(prompt), sampler, trees, perf_counter)
    )


def known(strategy: TokenRecycling) -> dict[int, Row]:
    """Token -> its successors and their level, as a file would hold them."""
    stored = strategy.sync(None)
    if not stored:
        return {}
    rows = [[i for i in row if i >= 0] for row in stored["successors"].tolist()]
    found = zip(rows, stored["levels"].tolist(), strict=True)
    return dict(zip(stored["tokens"].tolist(), found, strict=True))


class Recorded(TokenRecycling):
    """Keeps every outcome."""

    name = "recorded"

    def __init__(self, params: TokenRecyclingParams | None = None) -> None:
        super().__init__(params)
        self.outcomes: list[Outcome] = []

    def start(self, target: Target) -> Drafter:
        inner, outcomes = super().start(target), self.outcomes

        class Recorder(Drafter):
            def propose(self, context: Context) -> TokenTree:
                return inner.propose(context)

            def observe(self, outcome: Outcome) -> None:
                outcomes.append(outcome)
                inner.observe(outcome)

        return Recorder()


def naive_row(logits: torch.Tensor, k: int) -> Row:
    ranked = sorted(enumerate(logits.tolist()), key=lambda pair: -pair[1])
    weights = [math.exp(value - ranked[0][1]) for _, value in ranked[:8]]
    share = weights[0] / sum(weights)
    level = sum(share >= bound for bound in (0.4, 0.6, 0.85))
    return [token for token, _ in ranked[:k]], level


@pytest.mark.slow
@pytest.mark.parametrize("positions", [0, 5, 256])
def test_every_evaluated_node_teaches_and_committed_ones_teach_last(
    target: LanguageModel, fresh_logits: FreshLogits, prompt: list[int], positions: int
) -> None:
    strategy = Recorded(
        TokenRecyclingParams(successors=6, draft_length=9, prefill_positions=positions)
    )
    Engine(target).generate(strategy, prompt, Controls.greedy(40))

    naive: dict[int, Row] = {}
    ids = list(prompt)
    for at in range(max(0, len(prompt) - max(1, positions)), len(prompt)):
        naive[prompt[at]] = naive_row(fresh_logits(target, prompt[: at + 1]), 6)
    ids += strategy.outcomes[0].emitted
    rejected = 0
    for outcome in strategy.outcomes[1:]:
        tree = outcome.tree
        assert tree is not None
        wrong = [node for node in range(len(tree)) if node not in outcome.path]
        wrong.sort(key=lambda node: (-tree.depths[node], -node))
        rejected += len(wrong)
        for node in (*wrong, *outcome.path):  # later ones overwrite
            logits = fresh_logits(target, ids + tree.path_tokens(node))
            naive[tree.tokens[node]] = naive_row(logits, 6)
        ids += outcome.emitted
    assert rejected > len(strategy.outcomes)
    assert any(len(outcome.path) > 1 for outcome in strategy.outcomes)
    assert known(strategy) == naive


def test_it_learns_from_trees_of_others_and_passes_over_unread_nodes(
    target: LanguageModel,
) -> None:
    strategy = recycling(successors=4)
    drafter = start(strategy, target, [3])
    tree = TokenTree(
        (5, 6, 7, 8, 6),
        (-1, 0, 0, 2, 2),
        probes=frozenset({2, 3, 4}),
        unread=frozenset({3}),
    )
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    drafter.observe(Outcome(tree, (0,), (9,), {0: 0, 1: 1, 2: 2, 4: 3}, logits))
    expected = {5: 0, 6: 1, 7: 2}  # of the two 6, the shallower
    assert known(strategy) == {
        token: naive_row(logits[row], 4) for token, row in expected.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3000),
    st.integers(1, 13),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_the_likeliest_are_torchs_topk(
    rows: int, vocab: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:  # test_argmax.py is of the kernel's
        patch.setattr(top_tokens, "largest", lambda x, count: None)
        found = likeliest(logits, count)
    expected = logits.topk(min(count, vocab)).values
    assert torch.equal(logits.gather(1, found), expected)
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_a_slice_of_a_models_logits_need_not_be_contiguous() -> None:
    wide = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    logits = wide[:, 7:4007]
    assert torch.equal(likeliest(logits, 5), logits.topk(5).indices)


VOCABULARY = 12


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    rows = []
    for _ in range(VOCABULARY):
        successors = draw(st.permutations(range(VOCABULARY)))[:4]
        filled = draw(st.integers(0, 4))
        rows.append([*successors[:filled], *[-1] * (4 - filled)])
    states = st.lists(
        st.integers(0, len(CHANCES) - 1), min_size=VOCABULARY, max_size=VOCABULARY
    )
    return rows, draw(states)


def all_chances(
    rows: list[list[int]], states: list[int], root: int, depth: int, ranks: int
) -> dict[tuple[int, ...], float]:
    """Every path of tokens with the product of its ranks' chances."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(ranks), repeat=length):
            token, chance, tokens = root, 1.0, []
            for rank in path:
                chance *= CHANCES[states[token]][rank]
                token = rows[token][rank]
                tokens.append(token)
                if token < 0:
                    break
            else:
                found[tuple(tokens)] = chance
    return found


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    tables(),
    st.integers(0, VOCABULARY - 1),
    st.integers(0, 14),
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.02, 0.1]),
)
def test_the_tree_is_closed_and_holds_the_likeliest_known_paths(
    table: tuple[list[list[int]], list[int]],
    root: int,
    nodes: int,
    depth: int,
    ranks: int,
    least: float,
) -> None:
    rows, states = table
    tree = grow(
        root,
        rows.__getitem__,
        states.__getitem__,
        nodes=nodes,
        depth=depth,
        ranks=ranks,
        min_chance=least,
    )
    tree.check(root, VOCABULARY)
    chances = all_chances(rows, states, root, depth, ranks)
    found = [chances[tuple(tree.path_tokens(node))] for node in range(1, len(tree))]
    likely = sorted((c for c in chances.values() if c >= least), reverse=True)
    # Products of the same chances in another order may differ in the last bit.
    assert sorted(found, reverse=True) == pytest.approx(likely[:nodes])
    chain = tree.principal_chain()
    assert chain == tree.select(range(len(chain)))
    assert all(0 <= evidence <= 1023 for evidence in tree.evidence)


def test_candidates_of_equal_evidence_have_equal_chances_below_their_parent() -> None:
    seen: dict[int, set[float]] = {}
    rows = [[(token * 5 + rank) % 31 for rank in range(6)] for token in range(31)]
    for root in range(31):
        tree = grow(
            root,
            rows.__getitem__,
            lambda token: token % len(CHANCES),
            nodes=30,
            depth=6,
            ranks=6,
        )
        for node in range(1, len(tree)):
            before = tree.tokens[tree.parents[node]]
            rank = rows[before].index(tree.tokens[node])
            chance = CHANCES[before % len(CHANCES)][rank]
            seen.setdefault(tree.evidence[node], set()).add(chance)
    assert len(seen) > 40
    assert all(len(chances) == 1 for chances in seen.values())


def test_no_deeper_than_the_room_left_and_no_more_than_can_be_verified(
    target: LanguageModel, prompt: list[int]
) -> None:
    strategy = recycling(draft_length=20)
    Engine(target).generate(strategy, prompt, Controls.greedy(60))
    drafter = start(strategy, target, prompt)
    for room, most in ((1, 99), (2, 99), (3, 99), (50, 3), (50, 0)):
        tree = drafter.propose(Context(prompt, room, most, 0))
        assert max(tree.depths) <= room - 1
        assert tree.proposed <= most
        assert (tree.proposed == 0) == (room == 1 or most == 0)


def test_a_target_that_verifies_chains_gets_the_path_of_first_successors(
    llama: BuildModel, prompt: list[int]
) -> None:
    model = llama()
    model.__dict__["capability"] = Capability("chain", "for the test")
    strategy = recycling(draft_length=5)
    logits = torch.full((64, 64), -9.0)
    tree = TokenTree(range(64), [-1] + [0] * 63)
    for token in range(64):
        logits[token, [(token + 1) % 64, (token + 2) % 64]] = torch.tensor([9.0, 8.0])
    rows = {node: node for node in range(64)}
    drafter = start(strategy, model, [60])
    drafter.observe(Outcome(tree, (0,), (1,), rows, logits))
    proposed = drafter.propose(Context([60], 50, 50, 0))
    assert list(proposed.tokens) == [60, 61, 62, 63, 0, 1]
    assert proposed.is_chain


def accepted(model: LanguageModel, strategy: TokenRecycling, ids: list[int]) -> int:
    return Engine(model).generate(strategy, ids, Controls.greedy(60)).stats.accepted


@pytest.mark.slow
def test_a_second_request_finds_the_table_warm_unless_it_is_told_to_forget(
    target: LanguageModel, prompt: list[int]
) -> None:
    warm, forgetful = recycling(), recycling(persist=False)
    first, second = (accepted(target, warm, prompt) for _ in range(2))
    assert second > first
    assert [accepted(target, forgetful, prompt) for _ in range(2)] == [first, first]


def test_what_is_stored_warms_the_first_request_of_the_next_process(
    target: LanguageModel, prompt: list[int], tmp_path: Path
) -> None:
    file = KnowledgeFile(tmp_path, target.digest, TokenRecycling)
    teacher, pupil = recycling(successors=4), recycling(successors=4)
    file.exchange(teacher)  # there is nothing to store yet
    cold = accepted(target, teacher, prompt)
    file.exchange(teacher)
    file.exchange(pupil)
    assert known(pupil) == known(teacher)
    assert accepted(target, pupil, prompt) > cold


def teach(strategy: TokenRecycling, model: LanguageModel, row: dict[int, int]) -> None:
    """Evaluate tokens whose likeliest successors ascend from a given one."""
    logits = torch.zeros(len(row), 64)
    for at, first in enumerate(row.values()):
        for rank in range(12):
            logits[at, (first + rank) % 64] = 20.0 - rank
    tree = TokenTree(list(row), [-1] + [0] * (len(row) - 1))
    rows = {node: node for node in range(len(row))}
    drafter = start(strategy, model, [0])
    drafter.observe(Outcome(tree, (0,), (0,), rows, logits))
    drafter.close()


def firsts(strategy: TokenRecycling) -> dict[int, int]:
    return {token: row[0] for token, (row, _) in known(strategy).items()}


def test_rows_learnt_since_the_last_exchange_win_and_others_rows_survive(
    target: LanguageModel, tmp_path: Path
) -> None:
    file = KnowledgeFile(tmp_path, target.digest, TokenRecycling)
    one, other = recycling(), recycling()
    teach(one, target, {1: 10, 2: 20})
    file.exchange(one)
    teach(other, target, {2: 22, 3: 33})
    file.exchange(other)
    assert firsts(other) == {1: 10, 2: 22, 3: 33}
    teach(one, target, {4: 40})
    file.exchange(one)
    assert firsts(one) == {1: 10, 2: 22, 3: 33, 4: 40}
    file.exchange(other)
    assert firsts(other) == firsts(one)


def test_a_narrow_table_leaves_the_rows_of_a_wide_one_wide(
    target: LanguageModel, tmp_path: Path
) -> None:
    file = KnowledgeFile(tmp_path, target.digest, TokenRecycling)
    wide, narrow, third = (
        recycling(successors=6),
        recycling(successors=2),
        recycling(successors=6),
    )
    teach(wide, target, {1: 10, 2: 20})
    file.exchange(wide)
    file.exchange(narrow)
    assert {token: row for token, (row, _) in known(narrow).items()} == {
        1: [10, 11],
        2: [20, 21],
    }
    teach(narrow, target, {2: 30, 3: 40})
    file.exchange(narrow)
    file.exchange(third)
    assert {token: row for token, (row, _) in known(third).items()} == {
        1: [10, 11, 12, 13, 14, 15],
        2: [30, 31],
        3: [40, 41],
    }


def test_a_forgetful_instance_leaves_the_stored_table_as_it_is(
    target: LanguageModel,
) -> None:
    teacher = recycling()
    teach(teacher, target, {1: 10})
    stored = teacher.sync(None)
    forgetful = recycling(persist=False)
    teach(forgetful, target, {1: 11, 2: 20})
    assert forgetful.sync(stored) == stored


def damaged(**changes: Any) -> dict[str, torch.Tensor]:
    stored: dict[str, Any] = {
        "vocab_size": torch.tensor(64),
        "tokens": torch.tensor([3, 5]),
        "successors": torch.tensor([[1, 2], [4, -1]]),
        "levels": torch.tensor([0, 3], dtype=torch.uint8),
    }
    stored.update(changes)
    return {
        name: tensor.int() if tensor.dtype is torch.int64 else tensor
        for name, tensor in stored.items()
        if tensor is not None
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"levels": None}, "tensors .* expected"),
        ({"tokens": torch.tensor([3.0, 5.0])}, "tokens must be torch.int32"),
        ({"vocab_size": torch.tensor([64, 64])}, "vocab_size must be one number"),
        ({"vocab_size": torch.tensor(0)}, "vocab_size must be one number"),
        ({"vocab_size": torch.tensor(65)}, "vocab_size must be the model's 64, got 65"),
        ({"tokens": torch.tensor([3])}, r"successors \[n, k\] expected"),
        ({"levels": torch.zeros(1, dtype=torch.uint8)}, r"levels \[n\] .* expected"),
        ({"successors": torch.tensor([1, 2])}, r"successors \[n, k\] expected"),
        ({"successors": torch.zeros(2, 99)[:, :0].int()}, "1..32 columns, got 0"),
        ({"tokens": torch.tensor([5, 3])}, "tokens must ascend"),
        ({"tokens": torch.tensor([3, 64])}, "tokens must be in 0..63"),
        ({"tokens": torch.tensor([-1, 3])}, "tokens must be in 0..63"),
        ({"successors": torch.tensor([[1, 64], [4, 5]])}, "successors must be in"),
        ({"successors": torch.tensor([[1, -2], [4, 5]])}, "successors must be in"),
        ({"successors": torch.tensor([[1, 2], [-1, 5]])}, "before the -1s"),
        ({"successors": torch.tensor([[1, 1], [4, 5]])}, "must be distinct"),
        ({"levels": torch.tensor([0, 4], dtype=torch.uint8)}, "levels must be in 0..3"),
    ],
)
def test_a_stored_table_that_cannot_be_right_is_named_and_replaced(
    target: LanguageModel, changes: dict[str, Any], reason: str
) -> None:
    strategy = recycling()
    teach(strategy, target, {7: 20})
    with pytest.warns(KnowledgeWarning, match=f"token_recycling: .*{reason}"):
        kept = strategy.sync(damaged(**changes))
    assert kept["tokens"].tolist() == [7]


def test_a_stored_table_without_rows_or_damage_is_taken(target: LanguageModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recycling().sync(damaged())["tokens"].tolist() == [3, 5]
        empty = Successors(64, 3).sync(None)
        assert recycling().sync(empty)["tokens"].tolist() == []


def test_a_table_of_another_vocabulary_is_refused_when_the_model_is_known(
    target: LanguageModel, prompt: list[int]
) -> None:
    strategy = recycling()
    strategy.sync(damaged(vocab_size=torch.tensor(70), tokens=torch.tensor([3, 69])))
    with pytest.warns(KnowledgeWarning, match="vocab_size must be the model's 64"):
        drafter = start(strategy, target, prompt)
    assert drafter.propose(Context(prompt, 50, 50, 0)).proposed == 0


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8),
    st.sampled_from([1.0005, 1e100]),
)
def test_the_commonest_are_those_of_most_weight_and_late_ones_weigh_more(
    width: int, texts: list[list[int]], largest: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_commonest, "LARGEST", largest)  # rescaled often, or never
        commonest = Commonest(width)
        for text in texts:
            commonest.count(text)
    text = [token for part in texts for token in part]
    weights: dict[int, float] = {}
    for age, token in enumerate(reversed(text)):
        weights[token] = weights.get(token, 0.0) + _commonest.KEPT**age
    ranked = sorted(weights.values(), reverse=True)[:width]
    assert [weights[t] for t in commonest.tokens] == pytest.approx(ranked)
    assert len(set(commonest.tokens)) == len(ranked)


@pytest.mark.slow
@given(
    tokens=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    asked=st.sets(st.integers(0, 39)),
)
def test_steps_that_are_passed_over_teach_as_those_that_are_not(
    target: LanguageModel, tokens: list[int], asked: set[int]
) -> None:
    taught = []
    for passes in (False, True):
        strategy = recycling()
        drafter = start(strategy, target, [0])
        for step, token in enumerate(tokens):
            shown = torch.randn(2, 64, generator=torch.Generator().manual_seed(step))
            if not passes or step in asked:
                drafter.propose(Context([0, token], 50, 50, step))
            root = TokenTree.root_only(token)
            drafter.observe(Outcome(root, (0,), (1,), {0: 1}, shown))
        drafter.close()
        taught.append(known(strategy))
    assert taught[0] == taught[1]
    assert set(taught[0]) >= set(tokens)


def counted(model: LanguageModel, emitted: Sequence[int], **params: Any) -> Drafter:
    """After a prompt of 60 and 3s, of which the row of 60 was learnt."""
    drafter = start(recycling(**params), model, [3, 3, 3, 60])
    rising = torch.arange(64.0)[None]
    drafter.observe(Outcome(None, (), emitted[:1], {3: 0}, rising))
    root = TokenTree.root_only(emitted[0])
    for token in emitted[1:]:
        drafter.observe(Outcome(root, (0,), (token,), {}, rising[:0]))
    return drafter


def first_tokens(drafter: Drafter, root: int) -> list[int]:
    tree = drafter.propose(Context([60, root], 50, 50, 0))
    return [tree.tokens[node] for node in tree.children[0]]


def test_the_commonest_emitted_tokens_follow_one_that_was_never_evaluated(
    target: LanguageModel,
) -> None:
    drafter = counted(target, [9, 5, 7, 5, 9, 7, 5], common=3, draft_length=4)
    # 7 is as common as 9, but later.
    assert first_tokens(drafter, 8) == [5, 7, 9]
    assert first_tokens(drafter, 7) == [5, 9]  # not after itself
    assert first_tokens(drafter, 60)[:2] == [63, 62]  # its row stands as it is


def test_the_commonest_follow_unknown_candidates_as_well(target: LanguageModel) -> None:
    drafter = counted(target, [9, 5, 7, 5, 9, 7, 5], common=3, draft_length=6)
    tree = drafter.propose(Context([60, 8], 50, 50, 0))
    below = tree.children[tree.children[0][0]]
    assert [tree.tokens[node] for node in below] == [7, 9]


def test_without_common_or_a_tree_nothing_follows_an_unknown_token(
    target: LanguageModel, llama: BuildModel
) -> None:
    assert first_tokens(counted(target, [9, 5], common=0), 8) == []
    chain = llama()
    chain.__dict__["capability"] = Capability("chain", "for the test")
    assert first_tokens(counted(chain, [9, 5]), 8) == []


@pytest.mark.parametrize("persist", [True, False])
def test_a_request_that_keeps_nothing_counts_only_its_own_tokens(
    target: LanguageModel, persist: bool
) -> None:
    strategy = recycling(persist=persist, common=4)
    for emitted in ((4, 3), (6, 5)):
        drafter = start(strategy, target, [60])
        drafter.observe(Outcome(None, (), emitted, {}, torch.zeros(0, 64)))
    assert first_tokens(drafter, 9) == ([5, 6, 3, 4] if persist else [5, 6])
