"""How many prompts a trial runs on when the budget is small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaptspec.workloads import Prompt
from adaptspec_tuner.phases import affordable

Classes = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6)
)


def prompts_of(
    classes: dict[str, list[float]],
) -> tuple[list[Prompt], dict[str, float]]:
    prompts, seconds = [], {}
    for name, times in classes.items():
        for at, time in enumerate(times):
            prompts.append(Prompt(f"{name}{at}", name, "text"))
            seconds[f"{name}{at}"] = time
    return prompts, seconds


@given(Classes, st.integers(1, 9), st.floats(-5.0, 200.0))
def test_every_class_keeps_its_first_prompts_and_at_least_one(
    classes: dict[str, list[float]], strategies: int, budget: float
) -> None:
    prompts, seconds = prompts_of(classes)
    found = affordable(prompts, seconds, strategies, budget)
    assert set(found) == set(classes)
    for name, kept in found.items():
        of_class = [p for p in prompts if p.prompt_class == name]
        assert kept == of_class[: len(kept)]
        assert kept


@given(Classes, st.integers(1, 9))
def test_with_time_for_all_none_is_left_out(
    classes: dict[str, list[float]], strategies: int
) -> None:
    prompts, seconds = prompts_of(classes)
    budget = strategies * sum(seconds.values()) + 1
    found = affordable(prompts, seconds, strategies, budget)
    assert [p for kept in found.values() for p in kept] == prompts


def test_half_the_time_keeps_half_the_prompts() -> None:
    prompts, seconds = prompts_of({"a": [2.0] * 4, "b": [2.0] * 4})
    found = affordable(prompts, seconds, 5, 5 * 16 / 2)
    assert [len(kept) for kept in found.values()] == [2, 2]
