"""A generation that is held to a text, and what its first token and steps took."""

from __future__ import annotations

from typing import Any

import pytest

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Drafter, Target, TokenTree
from adaptspec.testing.fakes import (
    FakeClock,
    ScriptedStrategy,
    hf_greedy,
    random_ids,
    tiny_model,
)

PROMPT = random_ids(9, seed=3)
TEXT = [7, 8, 9, 7, 8, 9, 7, 8, 9, 7]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("llama")


def right(length: int) -> ScriptedStrategy:
    """Proposes the text, ``length`` tokens a step."""

    def script(context: Any) -> TokenTree:
        done = len(context.ids) - len(PROMPT)
        return TokenTree.chain(context.ids[-1], TEXT[done : done + length])

    return ScriptedStrategy(script)


@pytest.mark.parametrize("controls", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_run_that_follows_a_text_emits_it_whatever_the_model_says(
    model: LanguageModel, controls: dict[str, Any], length: int
) -> None:
    asked: list[tuple[int, int]] = []

    def follow(place: int, own: int) -> int:
        asked.append((place, own))
        return TEXT[place]

    limit = Controls(max_new_tokens=len(TEXT), **controls)
    run = Run(Engine(model), right(length), PROMPT, limit, follow)
    emitted = [token for tokens in run for token in tokens]
    assert emitted == run.result.token_ids == TEXT
    # Once for each place, in order; one more may be asked for behind the end.
    assert [place for place, _ in asked][: len(TEXT)] == list(range(len(TEXT)))
    if not controls:
        for place, own in asked[: len(TEXT)]:
            assert hf_greedy(model, [*PROMPT, *TEXT[:place]], 1) == [own]


def test_a_run_that_follows_its_own_choices_is_as_any_other(
    model: LanguageModel,
) -> None:
    limit = Controls(max_new_tokens=8)
    run = Run(Engine(model), right(3), PROMPT, limit, lambda place, own: own)
    assert [t for tokens in run for t in tokens] == hf_greedy(model, PROMPT, 8)


def test_the_first_token_takes_the_drafters_start_too_and_steps_know_their_rows(
    model: LanguageModel,
) -> None:
    clock = FakeClock()

    class Slow(ScriptedStrategy):
        def start(self, target: Target) -> Drafter:
            clock.advance(3.0)
            return super().start(target)

    strategy = Slow(right(4).script)
    run = Run(
        Engine(model, clock=clock),
        strategy,
        PROMPT,
        Controls(max_new_tokens=len(TEXT)),
        lambda place, own: TEXT[place],
    )
    for _ in run:
        clock.advance(100.0)  # what is done between two steps isn't decoding
    stats = run.result.stats
    assert stats.seconds_prefill == 3.0
    assert stats.seconds_decode == 0.0
    # One from the prefill; then four proposed and one behind them, and what is left.
    assert [step.rows for step in stats.steps] == [5, 4]
    assert [step.emitted for step in stats.steps] == [5, 4]
