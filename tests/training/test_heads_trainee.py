"""The heads' loss, measures and calibrated tree, against slow oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.heads.medusa import MedusaHeads
from adaptspec_training.conversations import Example
from adaptspec_training.heads_trainee import (
    MISSED,
    NOT_JUDGED,
    HeadsTrainee,
    draft_vocabulary,
    rank_paths,
    rank_shares,
)
from adaptspec_training.trainer import Batch

HIDDEN, VOCAB = 6, 11
EXAMPLES = [
    Example("a", (1, 2, 3, 4, 5, 6, 7), ((2, 7),)),
    Example("b", (9, 8, 7, 1, 0), ((1, 3), (4, 5))),
]


def trainee(
    token_map: list[int] | None = None, chunk: int = 1024
) -> tuple[HeadsTrainee, list[torch.Tensor]]:
    torch.manual_seed(0)
    states = [torch.randn(len(e.positions), HIDDEN) for e in EXAMPLES]
    size = len(token_map) if token_map else VOCAB
    heads = MedusaHeads(HIDDEN, size, 3, output="own", token_map=token_map)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    made = HeadsTrainee(
        heads, lambda index, _: states[index], VOCAB, chunk=chunk, decay=0.5
    )
    return made, states


def naive_losses(made: HeadsTrainee, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each head's mean loss, one position at a time."""
    known = made.heads.token_map
    numbers = list(range(VOCAB)) if known is None else known.tolist()
    losses = []
    for head in range(3):
        terms = []
        for example, hidden in zip(EXAMPLES, states, strict=True):
            for row, position in enumerate(example.positions):
                end = next(e for s, e in example.spans if s - 1 <= position < e - 1)
                at = position + head + 2
                if at >= end or example.tokens[at] not in numbers:
                    continue
                logits = made.heads(hidden[row])[head]
                right = numbers.index(example.tokens[at])
                terms.append(-logits.log_softmax(-1)[right])
        losses.append(torch.stack(terms).mean())
    return losses


@pytest.mark.parametrize("token_map", [None, [1, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("chunk", [1024, 2])
def test_the_loss_and_its_gradients_are_those_of_one_position_at_a_time(
    token_map: list[int] | None, chunk: int
) -> None:
    made, states = trainee(token_map, chunk)
    losses = naive_losses(made, states)
    total = sum(0.5 ** (k + 1) * loss for k, loss in enumerate(losses))
    assert isinstance(total, torch.Tensor)
    parameters = list(made.heads.parameters())
    expected = torch.autograd.grad(total, parameters)
    found = made.backward(Batch(EXAMPLES, [0, 1]), 0.0)
    assert found.total == pytest.approx(float(total.detach()), rel=1e-5)
    for k, loss in enumerate(losses):
        assert found.parts[f"loss_head_{k + 1}"] == pytest.approx(
            float(loss.detach()), rel=1e-5
        )
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_ranks_count_the_tokens_that_a_head_finds_likelier() -> None:
    made, states = trainee([1, 3, 4, 5, 6, 7])
    ranks = made.ranks([Batch(EXAMPLES, [0, 1])])
    numbers = [1, 3, 4, 5, 6, 7]
    column = 0
    for example, hidden in zip(EXAMPLES, states, strict=True):
        for row, position in enumerate(example.positions):
            end = next(e for s, e in example.spans if s - 1 <= position < e - 1)
            for head in range(3):
                at = position + head + 2
                found = int(ranks[head, column])
                if at >= end:
                    assert found == NOT_JUDGED
                elif example.tokens[at] not in numbers:
                    assert found == MISSED
                else:
                    logits = made.heads(hidden[row])[head].tolist()
                    order = sorted(range(6), key=lambda i: -logits[i])
                    assert order[found] == numbers.index(example.tokens[at])
            column += 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_calibrated_paths_are_measured_chances_with_beginnings_first(
    data: st.DataObject,
) -> None:
    rows = data.draw(
        st.lists(
            st.lists(st.integers(-1, 3), min_size=3, max_size=3),
            min_size=1,
            max_size=40,
        )
    )
    ends = data.draw(
        st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))
    )
    columns = [
        [rank if i < end else NOT_JUDGED for i, rank in enumerate(row)]
        for row, end in zip(rows, ends, strict=True)
    ]
    found = rank_paths(torch.tensor(columns).T, 3, 1000)
    shares = dict(found)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    for place, (path, _) in enumerate(found):
        if len(path) > 1:
            assert path[:-1] in [p for p, _ in found[:place]]
    for depth in (1, 2, 3):
        judged = [c[:depth] for c in columns if NOT_JUDGED not in c[:depth]]
        for path in itertools.product(range(3), repeat=depth):
            hits = sum(tuple(c) == path for c in judged)
            if not hits:
                assert path not in shares
                continue
            bound = shares[path[:-1]] if depth > 1 else 1.0
            assert shares[path] == pytest.approx(min(hits / len(judged), bound))


def test_shares_of_ranks_leave_out_what_was_not_judged() -> None:
    ranks = torch.tensor([[0, 0, 1, MISSED, NOT_JUDGED]])
    assert rank_shares(ranks, 2) == [[0.5, 0.25]]


def test_the_draft_vocabulary_is_what_answers_hold_most_often() -> None:
    # Answers: 3 4 5 6 7, 8 7, 0. Then what prompts hold, then the lowest.
    assert draft_vocabulary(EXAMPLES, 1, VOCAB) == [7]
    assert set(draft_vocabulary(EXAMPLES, 7, VOCAB)) == {0, 3, 4, 5, 6, 7, 8}
    assert len(set(draft_vocabulary(EXAMPLES, 10, VOCAB))) == 10
    assert draft_vocabulary(EXAMPLES, VOCAB, VOCAB) == list(range(VOCAB))


def test_a_new_head_says_what_the_lm_head_says() -> None:
    heads = MedusaHeads(HIDDEN, VOCAB, 2, layers=2, output="own")
    weight = torch.randn(VOCAB, HIDDEN)
    heads.copy_outputs(weight)
    hidden = torch.randn(3, HIDDEN)
    for logits in heads(hidden):
        torch.testing.assert_close(logits, hidden @ weight.T)
    assert math.isfinite(float(heads(hidden).detach().sum()))
