"""Where output begins and ends, what is counted, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import (
    InvalidPromptError,
    UnavailableStrategyError,
    UnsupportedControlError,
)
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.rotary import depth_limit
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree
from adaptspec.testing.fakes import (
    hf_greedy,
    random_ids,
    tiny_model,
    tiny_module,
)

PROMPT = random_ids(14, seed=3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("llama")


class Oracle(Strategy):
    """Proposes what plain decoding said, ``length`` tokens a step."""

    name = "oracle"
    summary = "the right answer"

    def __init__(self, truth: Sequence[int], length: int = 4) -> None:
        super().__init__()
        self.truth, self.length = list(truth), length
        self.closed = 0

    def start(self, target: Target) -> Drafter:
        strategy = self

        class Telling(Drafter):
            def propose(self, context: Context) -> TokenTree:
                done = len(context.ids)
                ahead = strategy.truth[done : done + strategy.length]
                return TokenTree.chain(context.ids[-1], ahead)

            def close(self) -> None:
                strategy.closed += 1

        return Telling()


class Nothing(Strategy):
    name = "nothing"
    summary = "plain decoding"

    def start(self, target: Target) -> Drafter:
        class Silent(Drafter):
            def propose(self, context: Context) -> TokenTree:
                return TokenTree.root_only(context.ids[-1])

        return Silent()


def test_right_guesses_save_forwards_and_are_counted(model: LanguageModel) -> None:
    truth = hf_greedy(model, PROMPT, 21)
    done = Engine(model).generate(
        Oracle([*PROMPT, *truth]), PROMPT, Controls.greedy(21)
    )
    assert done.token_ids == truth
    # The prefill gives one token, each step four accepted and one more.
    assert done.stats.target_forwards == 4
    assert done.stats.tokens_per_forward == 5
    assert done.stats.accepted == 16
    assert done.stats.acceptance == 1
    assert done.stats.new_tokens == 21


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
def test_the_limit_inside_an_accepted_path_ends_the_output_there(
    model: LanguageModel, limit: int
) -> None:
    truth = hf_greedy(model, PROMPT, 30)
    done = Engine(model).generate(
        Oracle([*PROMPT, *truth], 12), PROMPT, Controls.greedy(limit)
    )
    assert done.token_ids == truth[:limit]
    assert done.finish == "length"


def test_any_eos_inside_an_accepted_path_ends_the_output_there(
    model: LanguageModel,
) -> None:
    truth = hf_greedy(model, PROMPT, 30)
    eos = truth[9]
    first = truth.index(eos)
    done = Engine(model).generate(
        Oracle([*PROMPT, *truth], 12), PROMPT, Controls.greedy(30, [eos, 999])
    )
    assert done.token_ids == truth[: first + 1]
    assert done.finish == "eos"


def test_on_tokens_and_stream_deliver_the_output_in_order(
    model: LanguageModel,
) -> None:
    truth = hf_greedy(model, PROMPT, 20)
    pieces: list[list[int]] = []
    engine = Engine(model)
    engine.generate(
        Oracle([*PROMPT, *truth]), PROMPT, Controls.greedy(20), pieces.append
    )
    assert [token for piece in pieces for token in piece] == truth
    streamed = engine.stream(Oracle([*PROMPT, *truth]), PROMPT, Controls.greedy(20))
    assert list(streamed) == truth


def test_a_stream_given_up_closes_the_drafter(model: LanguageModel) -> None:
    strategy = Oracle([*PROMPT, *hf_greedy(model, PROMPT, 20)])
    stream = Engine(model).stream(strategy, PROMPT, Controls.greedy(20))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert strategy.closed == 1


def test_any_logits_processor_is_honoured_as_in_generate(model: LanguageModel) -> None:
    class NoRepeats(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores.scatter(1, input_ids, -torch.inf)

    controls = Controls(max_new_tokens=25, logits_processor=[NoRepeats()])
    plain = Engine(model).generate(Nothing(), PROMPT, controls).token_ids
    assert len(set(plain)) == 25
    assert not set(plain) & set(PROMPT)
    guessed = Engine(model).generate(Oracle([*PROMPT, *plain]), PROMPT, controls)
    assert guessed.token_ids == plain
    assert guessed.stats.tokens_per_forward > 3


@pytest.mark.parametrize(
    "control",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 6, 7, 8, 9, 10, 11]},
        {"bad_words_ids": [[5], [6], [7, 8], [30]]},
        {"min_new_tokens": 12, "eos_token_id": list(range(40))},
    ],
)
def test_controls_give_what_generate_gives(
    model: LanguageModel, control: dict[str, Any]
) -> None:
    expected = model.source.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]),
        max_new_tokens=25,
        do_sample=False,
        pad_token_id=0,
        **control,
    )[0, len(PROMPT) :].tolist()
    controls = Controls.for_model(model, max_new_tokens=25, temperature=0, **control)
    plain = Engine(model).generate(Nothing(), PROMPT, controls)
    assert plain.token_ids == expected
    told = Oracle([*PROMPT, *expected], 6)
    assert Engine(model).generate(told, PROMPT, controls).token_ids == expected


@pytest.mark.parametrize(
    ("control", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop_strings": ["x"]}, "stop_strings"),
    ],
)
def test_what_cant_be_honoured_is_refused_by_name(
    model: LanguageModel, control: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedControlError, match=named):
        Controls.for_model(model, **control)


def test_the_models_generation_defaults_are_honoured() -> None:
    module = tiny_module("llama")
    module.generation_config.do_sample = True
    module.generation_config.temperature = 0.7
    module.generation_config.top_k = 11
    module.generation_config.repetition_penalty = 1.1
    module.generation_config.eos_token_id = [3, 4]
    controls = Controls.for_model(LanguageModel(module))
    assert (controls.temperature, controls.top_k) == (0.7, 11)
    assert controls.repetition_penalty == 1.1
    assert controls.eos_token_ids == (3, 4)
    assert Controls.for_model(LanguageModel(module), temperature=0).temperature == 0
    assert Controls.for_model(LanguageModel(module), do_sample=False).temperature == 0


def test_prompts_without_room_are_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidPromptError, match="at least one token"):
        Engine(model).generate(Nothing(), [], Controls.greedy(4))
    longest = model.max_length
    assert longest is not None
    with pytest.raises(InvalidPromptError, match=str(longest)):
        Engine(model).generate(Nothing(), [5] * longest, Controls.greedy(4))
    done = Engine(model).generate(
        Oracle([5] * 999), [5] * (longest - 3), Controls.greedy(50)
    )
    assert len(done.token_ids) == 3


def test_a_strategy_that_cant_run_says_why() -> None:
    recurrent = tiny_model("mamba")
    with pytest.raises(UnavailableStrategyError, match=r"rolled back"):
        Engine(recurrent).generate(Nothing(), PROMPT, Controls.greedy(4))


def test_depth_stops_where_a_rotary_scaling_would_switch() -> None:
    class Config:
        max_position_embeddings = 64
        rope_parameters = {  # noqa: RUF012
            "rope_type": "longrope",
            "original_max_position_embeddings": 32,
        }

    assert depth_limit(Config, 20) == 11  # the deepest node sits at position 31
    assert depth_limit(Config, 31) == 0
    assert depth_limit(Config, 40) > 1000
    Config.rope_parameters = {"rope_type": "dynamic"}
    Config.max_position_embeddings = 32
    assert depth_limit(Config, 40) == 0
    Config.rope_parameters = {"rope_type": "default"}
    assert depth_limit(Config, 40) > 1000
