"""What a tune may be asked, from Python and from the command line."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from adaptspec.errors import AdaptSpecError
from adaptspec_tuner.commands import tune
from adaptspec_tuner.options import TuneOptions


def test_the_command_has_an_option_for_every_field_with_the_same_default() -> None:
    asked = {option.name: option for option in tune.params}
    for field in fields(TuneOptions):
        if field.name not in ("budget", "budget_trials"):  # one text holds both
            default = asked[field.name].default
            assert (default or None) == (field.default or None), field.name


@pytest.mark.parametrize(
    ("changed", "mixed"),
    [
        ({"budget": 9.0}, True),
        ({"trials": 3}, True),
        ({"strategies": ["suffix"]}, False),
        ({"seed": 1}, False),
        ({"max_new_tokens": 9}, False),
        ({"objective": "latency"}, False),
        ({"objective": "speed"}, False),
        ({"temperature": 0.7}, False),
        ({"control": [("repetition_penalty", 1.1)]}, False),
        ({"max_memory": 2**30}, False),
    ],
)
def test_trials_are_mixed_where_what_decides_their_figures_is_equal(
    changed: dict[str, Any], mixed: bool
) -> None:
    usual = TuneOptions()
    assert (replace(usual, **changed).shared() == usual.shared()) is mixed


def test_the_order_of_strategies_makes_no_other_run() -> None:
    one, other = ["suffix", "hybrid"], ["hybrid", "suffix", "hybrid"]
    assert (
        TuneOptions(strategies=one).shared() == TuneOptions(strategies=other).shared()
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"objective": "joy"},
            "must be 'answer' or 'speed' or 'latency', got 'joy'",
        ),
        ({"limit": 0}, "limit must be 1 or more, got 0"),
        ({"max_new_tokens": 1}, "max_new_tokens must be 2 or more, got 1"),
        ({"baselines": True, "objective": "latency"}, "leave --baselines out"),
        ({"baselines": True, "temperature": 0.7}, "baselines decode greedily"),
        ({"ray": "auto", "worker": True}, "take one"),
        ({"api_key": "secret"}, "^api_key is for other engines .* leave it out$"),
    ],
)
def test_what_is_unknown_or_does_not_go_together_is_refused(
    asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptSpecError, match=said):
        TuneOptions(**asked)


def test_controls_of_generation_are_taken_as_generate_takes_them() -> None:
    asked = tune.make_context(
        "tune",
        [
            *("-t", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "5"),
            *("-c", "min_p", "0.1", "-c", "cache_implementation", "static"),
        ],
    ).params
    names = ("temperature", "top_k", "top_p", "control", "seed")
    options = TuneOptions(**{name: asked[name] for name in names})
    assert options.seed == 5
    assert options.controls == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
        "cache_implementation": "static",
    }
    assert TuneOptions().controls == {}
