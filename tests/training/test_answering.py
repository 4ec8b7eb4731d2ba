"""Batched answers are the model's own, with the states they were chosen from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import hf_greedy, random_ids
from adaptspec_training.answering import Answers

PROMPTS = [random_ids(n, seed=n) for n in (3, 9, 21, 4)]
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "gemma3", "mistral", "gpt2", "gpt_neox", "opt"]
)
def test_greedy_answers_of_a_padded_batch_are_those_of_one_by_one(
    target: Callable[..., LanguageModel], architecture: str
) -> None:
    model = target(architecture)
    examples, _ = Answers(model, 0.0, 0, ()).answer(NAMES, PROMPTS, [8, 3, 8, 5])
    for example, prompt, limit in zip(examples, PROMPTS, (8, 3, 8, 5), strict=True):
        expected = hf_greedy(model, prompt, limit)
        assert list(example.tokens) == [*prompt, *expected]
        assert example.spans == ((len(prompt), len(prompt) + limit),)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_features_are_the_states_from_which_each_token_was_chosen(
    target: Callable[..., LanguageModel], architecture: str
) -> None:
    model = target(architecture)
    examples, features = Answers(model, 0.9, 1, ()).answer(NAMES, PROMPTS, [6] * 4)
    for example, states in zip(examples, features, strict=True):
        ids = torch.tensor([example.tokens])
        with torch.no_grad():
            output = model.source(ids, output_hidden_states=True)
        expected = output.hidden_states[-1][0, example.positions]
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)


def test_a_prompts_draws_do_not_depend_on_what_is_answered_beside_it(
    target: Callable[..., LanguageModel],
) -> None:
    answers = Answers(target(), 1.0, 5, ())
    together, _ = answers.answer(NAMES, PROMPTS, [7] * 4)
    alone, _ = answers.answer(NAMES[2:3], PROMPTS[2:3], [7])
    assert together[2] == alone[0]
    other, _ = Answers(target(), 1.0, 6, ()).answer(NAMES, PROMPTS, [7] * 4)
    assert [e.tokens for e in other] != [e.tokens for e in together]


def test_an_answer_ends_with_its_end_token_and_the_others_go_on(
    target: Callable[..., LanguageModel],
) -> None:
    model = target()
    free, _ = Answers(model, 0.0, 0, ()).answer(NAMES, PROMPTS, [12] * 4)
    end = free[0].tokens[len(PROMPTS[0]) + 2]
    ended, features = Answers(model, 0.0, 0, (end,)).answer(NAMES, PROMPTS, [12] * 4)
    for long, short, states in zip(free, ended, features, strict=True):
        start = short.spans[0][0]
        answer = list(long.tokens[start:])
        cut = answer.index(end) + 1 if end in answer else len(answer)
        assert list(short.tokens[start:]) == answer[:cut]
        assert len(states) == cut


def test_draws_follow_the_models_distribution(
    target: Callable[..., LanguageModel],
) -> None:
    from scipy.stats import chisquare

    model = target(vocab_size=5)
    prompt = [1, 4, 2]
    with torch.no_grad():
        logits = model.source(torch.tensor([prompt])).logits[0, -1]
    expected = (logits.double() / 1.5).softmax(-1)
    names = [f"n{i}" for i in range(2000)]
    examples, _ = Answers(model, 1.5, 0, (), hidden=False).answer(
        names, [prompt] * 2000, [1] * 2000
    )
    counts = [sum(e.tokens[-1] == token for e in examples) for token in range(5)]
    assert chisquare(counts, (expected * 2000).tolist()).pvalue > 1e-4


def test_models_whose_state_cannot_be_padded_answer_one_at_a_time(
    target: Callable[..., LanguageModel],
) -> None:
    assert Answers(target("mamba"), 0.0, 0, ()).most_at_once == 1
    assert Answers(target("llama"), 0.0, 0, ()).most_at_once is None
