"""Shadows tell the steps of a real run, and leave the answer as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptspec_plugins
from adaptspec.decoder import Decoder
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.forward_times import LatencyCurve
from adaptspec.shadow import Shadow, shadow, token_only
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Requirements,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec.testing.fakes import tiny_model

HOST = Host({"bundled": adaptspec_plugins})
PLAIN = "autoregressive"
few = settings(deadline=None, max_examples=10)


class Branches(Strategy):
    """Proposes a tree of what came earlier and of what didn't; a third party's."""

    name = "branches"
    summary = "trees of earlier tokens"
    replays = True

    def start(self, target: Target) -> Drafter:
        class Tree(Drafter):
            def propose(self, context: Context) -> TokenTree:
                last, before = context.ids[-1], context.ids[-2]
                again = sorted(set(context.ids[-9:]) - {before})[:2]
                below = [0] * (1 + len(again)) + [1] * len(again)
                return TokenTree([last, before, *again, *again], [-1, *below])

        return Tree()


def real(model: Any, strategy: Strategy, ids: list[int], controls: Controls) -> Any:
    """A real run of the strategy, without the guard."""
    return Engine(model, guard=False).generate(strategy, ids, controls)


def shadowed(
    model: Any, strategy: Strategy, ids: list[int], controls: Controls
) -> tuple[Shadow, list[int]]:
    run = Run(Engine(model), HOST.create(PLAIN, {}), ids, controls)
    list(run)
    return shadow(strategy, run, run.result), run.result.token_ids


def same_steps(model: Any, make: Any, ids: list[int], controls: Controls) -> Shadow:
    found, tokens = shadowed(model, make(), ids, controls)
    done = real(model, make(), ids, controls)
    assert tokens == done.token_ids
    stats = done.stats
    assert found.forwards == stats.target_forwards
    assert found.tokens_per_forward == pytest.approx(stats.tokens_per_forward)
    assert (found.proposed, found.accepted) == (stats.proposed, stats.accepted)
    return found


MAKERS: dict[str, Callable[[], Strategy]] = {
    "prompt_lookup": lambda: HOST.create("prompt_lookup", {"branches": 2}),
    "suffix": lambda: HOST.create("suffix", {}),
    "branches": Branches,
}


@pytest.mark.slow
@few
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=12),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from(list(MAKERS)),
)
def test_a_shadows_steps_are_those_of_a_real_greedy_run(
    text: list[int], times: int, new: int, name: str
) -> None:
    same_steps(tiny_model("llama"), MAKERS[name], text * times, Controls.greedy(new))


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "bloom", "mamba"])
def test_so_they_are_on_models_that_verify_chains_or_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    for name, make in MAKERS.items():
        if type(make()).unavailable(model, None) is None:
            same_steps(model, make, [4, 5, 6, 7] * 4, Controls.greedy(30))
        else:
            run = Run(Engine(model), HOST.create(PLAIN, {}), [1], Controls.greedy(2))
            assert token_only(MAKERS[name](), run)


def test_so_they_are_at_an_end_token_and_under_sampling() -> None:
    model = tiny_model("llama")
    ids = [4, 5, 6, 7] * 4
    answer = real(model, MAKERS["suffix"](), ids, Controls.greedy(40)).token_ids
    ends = Controls(max_new_tokens=40, temperature=0.0, eos_token_ids=(answer[25],))
    for controls in (ends, Controls(max_new_tokens=40, temperature=0.3, seed=5)):
        for make in MAKERS.values():
            same_steps(model, make, ids, controls)


def test_the_time_is_estimated_by_what_forwards_cost() -> None:
    model = tiny_model("llama")
    ids = [4, 5, 6, 7] * 6
    make, controls = MAKERS["prompt_lookup"], Controls.greedy(40)
    found = same_steps(model, make, ids, controls)
    assert not found.costs_known
    model.__dict__["latency"] = LatencyCurve((1, 64), (1.0, 1000.0))
    dear = same_steps(model, make, ids, controls)
    assert dear.costs_known
    assert dear.ratio is not None
    assert dear.ratio < 0.5
    assert dear.seconds_saved < 0


class Hidden(Branches):
    name = "hidden"

    def observes(self, model: Any) -> Observes:
        return Observes(hidden_layers=(-1,))


class Drafted(Branches):
    name = "drafted"
    requires = Requirements(draft="same vocabulary")


def test_what_reads_more_than_tokens_by_what_it_declares_is_left_out() -> None:
    model = tiny_model("llama")
    run = Run(Engine(model), HOST.create(PLAIN, {}), [1], Controls.greedy(2))
    assert token_only(Branches(), run) is None
    assert token_only(Hidden(), run) == "it reads hidden states"
    assert token_only(Drafted(), run) == "it needs a draft model"
    for name in ("token_recycling", "lookahead", "hybrid"):
        assert token_only(HOST.create(name, {}), run)
    assert token_only(HOST.create("medusa", {}), run) == "it needs trained heads"


class ThirdParty:
    """Its plugin."""

    @staticmethod
    def register_strategies() -> list[type[Strategy]]:
        return [Branches]


def test_a_decoder_tells_shadows_and_its_answer_is_plain_decodings() -> None:
    model = tiny_model("llama")
    host = Host({"bundled": adaptspec_plugins, "other": ThirdParty})
    decoder = Decoder(model, host=host)
    plain = decoder.generate(
        [4, 5, 6] * 5, strategy=PLAIN, max_new_tokens=30, temperature=0
    )
    assert plain.shadows == ()
    asked: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0, "shadow": True}
    with pytest.warns(UserWarning, match="plain decoding"):
        result = decoder.generate([4, 5, 6] * 5, **asked)
    assert result.token_ids == plain.token_ids
    assert result.choice.strategy == PLAIN
    assert "shadow" in result.choice.reason
    assert {one.strategy for one in result.shadows} == {
        "prompt_lookup",
        "suffix",
        "branches",
    }
    with decoder.stream([4, 5, 6] * 5, **asked) as stream:
        assert "".join(stream) == result.text
        assert len(stream.result.shadows) == 3
    with decoder.stream([4, 5, 6] * 5, **asked) as given_up:
        pass
    assert given_up.result.shadows == ()
    with pytest.raises(AdaptSpecError, match="shadow=True tells nothing under regex"):
        decoder.generate([4, 5, 6], regex="a+", **asked)
    with pytest.raises(AdaptSpecError, match="shadow=True decodes plainly"):
        decoder.generate([4, 5, 6], strategy="suffix", **asked)


class Fails:
    @staticmethod
    def register_strategies() -> list[type[Strategy]]:
        class Broken(Branches):
            name = "broken"

            def start(self, target: Target) -> Drafter:
                raise RuntimeError("no such file")

        return [Broken]


def test_a_strategy_that_fails_is_left_out_and_the_answer_stays() -> None:
    host = Host({"bundled": adaptspec_plugins, "other": Fails})
    decoder = Decoder(tiny_model("llama"), host=host)
    asked: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0, "shadow": True}
    with pytest.warns(UserWarning, match="plain decoding|left out") as warned:
        result = decoder.generate([4, 5, 6] * 5, **asked)
    said = [str(one.message) for one in warned]
    assert "broken is left out of the shadows: no such file" in said
    assert len(result.token_ids) == 9
    assert {one.strategy for one in result.shadows} == {"prompt_lookup", "suffix"}
