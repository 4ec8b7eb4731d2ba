"""On how many prompts new settings are measured when the budget is small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaptspec_tuner.phases import opening_prompts

Seconds = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6)
)


@given(Seconds, st.integers(1, 9), st.floats(-5.0, 200.0))
def test_there_is_always_a_prompt_and_never_more_than_asked(
    seconds: dict[str, list[float]], settings: int, budget: float
) -> None:
    assert 1 <= opening_prompts(seconds, settings, budget, most=3) <= 3


def test_there_are_as_many_as_the_time_allows() -> None:
    seconds = {"a": [2.0] * 4, "b": [1.0, 2.0, 9.0]}  # 4 s for one of each class
    found = [opening_prompts(seconds, 5, budget, most=3) for budget in (19, 40, 61)]
    assert found == [1, 2, 3]
