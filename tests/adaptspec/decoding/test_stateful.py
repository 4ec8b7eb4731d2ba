"""Processors that keep state are asked as ``generate`` asks them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree
from adaptspec.testing.fakes import (
    VOCAB,
    ScriptedStrategy,
    random_ids,
    tiny_model,
    tiny_tokenizer,
)
from adaptspec.testing.strategies import Grammar, target_and_draft
from adaptspec.token_tree import Drawn

PROMPT = random_ids(9, seed=4)
EOS = 1


def own(model: LanguageModel, grammar: Grammar, **asked: Any) -> list[int]:
    """What transformers' ``generate`` emits."""
    done = model.source.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        logits_processor=[grammar],
        pad_token_id=0,
        **asked,
    )
    tokens: list[int] = done[0, len(PROMPT) :].tolist()
    return tokens


def told(truth: list[int], depth: int = 6) -> ScriptedStrategy:
    def script(context: Context) -> TokenTree:
        done = len(context.ids) - len(PROMPT)
        return TokenTree.chain(context.ids[-1], truth[done : done + depth])

    return ScriptedStrategy(script)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_a_grammar_gives_generates_tokens(architecture: str) -> None:
    model = target_and_draft(architecture)[0]
    grammar, again = Grammar(EOS), Grammar(EOS)
    expected = own(model, grammar, max_new_tokens=12, do_sample=False)
    controls = Controls(12, logits_processor=[again])
    done = Engine(model).generate(told(expected), PROMPT, controls)
    assert done.token_ids == expected
    assert again.calls == grammar.calls


@pytest.mark.parametrize("end", range(1, 7))
def test_nothing_is_asked_after_the_end(end: int) -> None:
    """A grammar whose text is complete raises when asked for more."""
    model = target_and_draft("llama")[0]
    grammar, again = Grammar(EOS, most=end), Grammar(EOS, most=end)
    asked = {"max_new_tokens": 20, "eos_token_id": EOS, "do_sample": False}
    expected = own(model, grammar, **asked)
    assert expected[-1] == EOS
    assert len(expected) == end + 1
    # What is drafted goes on behind the end.
    strategy = told([*expected, 5, 6, 7, 8])
    controls = Controls(20, logits_processor=[again], eos_token_ids=(EOS,))
    done = Engine(model).generate(strategy, PROMPT, controls)
    assert (done.token_ids, done.finish) == (expected, "eos")
    assert again.calls == grammar.calls
    # The end that was drafted counts as accepted.
    assert done.stats.accepted == end


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_asked_after_a_stop_string_or_the_limit(temperature: float) -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    plain = Controls(
        12, temperature=temperature, seed=1, logits_processor=[Grammar(EOS)]
    )
    truth = Engine(model).generate(told([]), PROMPT, plain).token_ids
    for limit, stops in ((12, (f"w{truth[5]}",)), (5, ())):
        grammar = Grammar(EOS)
        controls = replace(
            plain,
            max_new_tokens=limit,
            stop_strings=stops,
            logits_processor=[grammar],
        )
        done = Engine(model).generate(told(truth), PROMPT, controls)
        assert done.finish == ("stop" if stops else "length")
        assert done.token_ids == truth[: len(done.token_ids)]
        assert done.stats.accepted > 1
        grammar.check(PROMPT, done.token_ids)


class Draws(Strategy):
    """Draws from what drafters are given, siblings without replacement."""

    name = "draws"
    summary = "sampled trees"
    drawn = Drawn.WITHOUT_REPLACEMENT

    def start(self, target: Target) -> Drafter:
        class Drawing(Drafter):
            def propose(self, context: Context) -> TokenTree:
                logits = torch.zeros(VOCAB)
                probs = target.sampling.probs(context.ids, logits)
                tokens, parents, draft_probs = [context.ids[-1]], [-1], {}
                for parent in (0, 1):
                    for token in target.sampling.draw(probs, 6):
                        draft_probs[len(tokens)] = probs
                        tokens.append(token)
                        parents.append(parent)
                return TokenTree(tokens, parents, Draws.drawn, draft_probs)

        return Drawing()


def test_sampled_trees_ask_once_for_each_emitted_token_and_never_for_drafts() -> None:
    model = tiny_model("llama")
    for seed in range(6):
        grammar = Grammar(EOS)
        controls = Controls(12, temperature=2.0, logits_processor=[grammar], seed=seed)
        done = Engine(model).generate(Draws(), PROMPT, controls)
        grammar.check(PROMPT, done.token_ids)
        assert done.stats.accepted > 0


def test_drafters_see_the_controls_but_not_the_callers_processors() -> None:
    grammar = Grammar(EOS)
    given = [grammar, hf.SuppressTokensLogitsProcessor([7])]
    controls = Controls(4, temperature=1.0, top_k=9, logits_processor=given)
    processors = Processors(controls, 1, torch.device("cpu"))
    assert not processors.pure
    drafts = processors.for_drafts()
    assert drafts.pure
    scores = drafts([3], torch.arange(VOCAB).float())
    assert int((scores > -torch.inf).sum()) == 9
    assert float(scores[7]) == -torch.inf
    assert grammar.calls == []


def test_a_subclass_of_a_known_processor_is_not_known() -> None:
    class Moody(hf.TopKLogitsWarper):
        pass

    class Suppressed(hf.SuppressTokensLogitsProcessor, LogitsProcessor):
        pass

    for processor in (Moody(3), Suppressed([4]), lambda ids, scores: scores):
        controls = Controls(logits_processor=[processor])
        assert not Processors(controls, 1, torch.device("cpu")).pure
