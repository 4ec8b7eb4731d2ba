"""What `tune` prints says when a strategy could not be chosen."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from adaptspec.profile import Profile
from adaptspec.selector import FEWEST_PROMPTS, select
from adaptspec.testing.stores import example_profile
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_profiles.older import choices_of
from adaptspec_tuner.commands import tune
from adaptspec_tuner.reporting.result import ClassResult, TuneResult
from adaptspec_tuner.reporting.tables import print_result

HERE = example_profile().environment


def confirmed(name: str, prompts: int) -> ClassResult:
    def profile(strategy: str) -> Profile:
        measurement = replace(example_profile().measurement, prompts=prompts)
        return example_profile(
            prompt_class=name, strategy=strategy, measurement=measurement
        )

    profiles = [profile("autoregressive"), profile("prompt_lookup")]
    return ClassResult(name, select(choices_of(profiles), HERE, name), tuple(profiles))


def printed(*classes: ClassResult) -> str:
    out = io.StringIO()
    result = TuneResult("r", HERE, "mine", "p.db", list(classes), [], {})
    print_result(result, Console(file=out, width=200, markup=False))
    return out.getvalue()


def test_a_class_on_one_held_out_prompt_is_named_with_what_it_takes() -> None:
    shown = printed(confirmed("chat", 1), confirmed("code", 2), confirmed("math", 1))
    (line,) = [line for line in shown.splitlines() if "too few" in line]
    assert "prompts: chat, math:" in line
    assert "give 4 prompts a class" in line
    assert "too few" not in printed(confirmed("code", 2))


@pytest.mark.parametrize("seed", range(5))
def test_the_prompts_asked_for_are_what_the_split_and_the_choice_take(
    seed: int,
) -> None:
    (limit,) = [option for option in tune.params if option.name == "limit"]
    needed = 4
    assert f"needs {needed}, {FEWEST_PROMPTS} of them" in str(vars(limit)["help"])

    def held_out(count: int) -> int:
        prompts = tuple(Prompt(str(i), "chat", text="w") for i in range(count))
        return len(split(Workload("w", prompts), seed)[1].prompts)

    assert held_out(needed) >= FEWEST_PROMPTS > held_out(needed - 1)
