"""Where no token has a score to be chosen by, decoding says so and emits nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.errors import NoValidTokenError
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Strategy, TokenTree
from adaptspec.testing.fakes import (
    ScriptedStrategy,
    noisy_draft,
    random_ids,
    tiny_model,
    tiny_module,
)
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.draft.chain import DraftModel
from adaptspec_plugins.draft.tree import DraftTree
from adaptspec_plugins.hybrid.strategy import Hybrid

PROMPT = random_ids(9, seed=4)
# The sign of a NaN is the processor's choice; 0 * inf gives a negative one on x86.
NEGATIVE_NAN = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)[0]
BROKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all NaN": lambda logits: logits * torch.nan,
    "one NaN": lambda logits: logits.index_fill(-1, torch.tensor(9), torch.nan),
    "one negative NaN": lambda logits: torch.where(
        torch.arange(logits.shape[-1]) == 9, NEGATIVE_NAN.to(logits), logits
    ),
    "all -inf": lambda logits: logits - torch.inf,
}


def broken(
    how: Callable[[torch.Tensor], torch.Tensor], after: int | None = None
) -> LanguageModel:
    """A model whose logits break, everywhere or behind the token ``after``.

    It was sound when it was looked at what it can verify.
    """
    model = LanguageModel(tiny_module("llama"), accelerate=False)
    assert model.capability.level == "tree"
    seen: list[torch.Tensor] = []

    def remember(layer: Any, inputs: Any, output: Any) -> None:
        seen[:] = [inputs[0]]

    def spoil(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if after is None:
            return how(output)
        rows = seen[0][:, -output.shape[1] :]
        return torch.where((rows == after)[..., None], how(output), output)

    inner: Any = model.model
    inner.model.embed_tokens.register_forward_hook(remember)
    inner.lm_head.register_forward_hook(spoil)
    return model


def collect(run: Run, emitted: list[int]) -> None:
    """Put the run's tokens into ``emitted`` as they come."""
    for tokens in run:
        emitted += tokens


def told(truth: Sequence[int]) -> ScriptedStrategy:
    def script(context: Context) -> TokenTree:
        done = len(context.ids) - len(PROMPT)
        return TokenTree.chain(context.ids[-1], list(truth[done : done + 5]))

    return ScriptedStrategy(script)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_broken_logits_are_an_error_before_anything_is_emitted(
    how: str, temperature: float, penalty: float
) -> None:
    model = broken(BROKEN[how])
    controls = Controls(5, temperature=temperature, repetition_penalty=penalty, seed=1)
    run = Run(Engine(model), Autoregressive(), PROMPT, controls)
    with pytest.raises(NoValidTokenError, match="the model's logits are NaN or -inf"):
        next(iter(run))
    assert run.result.token_ids == []


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_was_accepted_before_is_emitted_whatever_drafted_it(
    how: str, temperature: float
) -> None:
    sound = tiny_model("llama")
    controls = Controls(14, temperature=temperature, seed=3)
    truth = Engine(sound).generate(Autoregressive(), PROMPT, controls).token_ids
    last = next(t for t in truth[3:] if t not in PROMPT and t not in truth[:3])
    until = truth[: truth.index(last) + 1]
    for strategy in (Autoregressive(), told(truth)):
        run = Run(Engine(broken(BROKEN[how], last)), strategy, PROMPT, controls)
        emitted: list[int] = []
        with pytest.raises(NoValidTokenError, match=f"position {9 + len(until)}"):
            collect(run, emitted)
        assert emitted == until
        assert run.result.token_ids == until


class Masks:
    """Masks every token from the call on that has this number."""

    def __init__(self, call: int) -> None:
        self._call = call

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._call -= 1
        return scores - torch.inf if self._call < 0 else scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("calls", [0, 3])
def test_controls_that_leave_no_token_are_named(temperature: float, calls: int) -> None:
    model = tiny_model("llama")
    plain = Controls(9, temperature=temperature, seed=2)
    truth = Engine(model).generate(Autoregressive(), PROMPT, plain).token_ids
    for strategy in (Autoregressive(), told(truth)):
        controls = Controls(
            9, temperature=temperature, seed=2, logits_processor=[Masks(calls)]
        )
        run = Run(Engine(model), strategy, PROMPT, controls)
        with pytest.raises(
            NoValidTokenError, match="the controls leave no finite score"
        ):
            list(run)
        assert run.result.token_ids == truth[:calls]


@pytest.mark.parametrize(
    "extra", [{}, {"top_h": 0.5}, {"typical_p": 0.9}, {"eta_cutoff": 0.01}]
)
def test_a_temperature_too_small_for_floats_is_refused(extra: dict[str, Any]) -> None:
    controls = Controls(5, temperature=1e-40, seed=0, extra=extra)
    with pytest.raises(NoValidTokenError, match="raise the temperature"):
        Engine(tiny_model("llama")).generate(Autoregressive(), PROMPT, controls)


@pytest.mark.parametrize("how", ["one NaN", "all NaN"])
@pytest.mark.parametrize("sampled", [False, True])
def test_invalid_values_are_removed_where_that_is_asked_for(
    how: str, sampled: bool
) -> None:
    model = broken(BROKEN[how])
    asked = {"remove_invalid_values": True, "do_sample": sampled, "max_new_tokens": 6}
    controls = Controls.for_model(model, seed=1, **asked)
    found = Engine(model).generate(Autoregressive(), PROMPT, controls).token_ids
    module: Any = model.model
    expected = module.generate(torch.tensor([PROMPT]), pad_token_id=0, **asked)[
        0, len(PROMPT) :
    ].tolist()
    assert len(found) == 6
    if not sampled:
        assert found == expected


def test_an_infinite_score_is_one_that_greedy_decoding_takes() -> None:
    """As ``generate`` does: processors force a token so."""

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, torch.tensor(ids.shape[1] % 7), torch.inf)

    controls = Controls(4, logits_processor=[force])
    done = Engine(tiny_model("llama")).generate(Autoregressive(), PROMPT, controls)
    assert done.token_ids == [2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_nan_is_seen_in_any_type_and_among_many_tokens(dtype: torch.dtype) -> None:
    module = tiny_module("llama", vocab_size=5000).to(dtype)
    with torch.no_grad():
        module.lm_head.weight[4321] = NEGATIVE_NAN.to(dtype)
    model = LanguageModel(module)
    with pytest.raises(NoValidTokenError):
        Engine(model).generate(Autoregressive(), PROMPT, Controls(3))


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "strategy",
    [
        DraftModel(),
        DraftModel(DraftModel.Params(stop=0.4)),
        DraftModel(DraftModel.Params(draft_sampling="coupled", stop=0.4)),
        DraftTree(),
        DraftTree(DraftTree.Params(mode="sampled")),
        Hybrid(),
    ],
    ids=lambda strategy: f"{strategy.name}",
)
def test_a_broken_draft_model_breaks_nothing(
    how: str, temperature: float, strategy: Strategy
) -> None:
    model, draft = tiny_model("llama"), broken(BROKEN[how])
    controls = Controls(8, temperature=temperature, seed=5)
    plain = Engine(model).generate(Autoregressive(), PROMPT, controls).token_ids
    done = Engine(model, draft).generate(strategy, PROMPT, controls)
    # Where nothing is drafted, sampling's tokens are plain sampling's.
    assert done.token_ids == plain
    assert done.stats.accepted == 0 or temperature == 0 or strategy.name == "hybrid"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_breaks_on_some_tokens_is_of_use_before(
    temperature: float,
) -> None:
    model = tiny_model("llama")
    sound = noisy_draft(model, 0.0)
    controls = Controls(30, temperature=temperature, seed=5)
    plain = Engine(model).generate(Autoregressive(), PROMPT, controls).token_ids
    draft = broken(BROKEN["all NaN"], plain[10])
    coupled = DraftModel(DraftModel.Params(draft_sampling="coupled"))
    done = Engine(model, draft).generate(coupled, PROMPT, controls)
    assert done.token_ids == plain
    assert done.stats.accepted > 0
    best = Engine(model, sound).generate(coupled, PROMPT, controls)
    assert best.stats.accepted > done.stats.accepted
