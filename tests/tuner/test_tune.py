"""Behind how many tokens forwards are timed, and which answers tell their times."""

from __future__ import annotations

import pytest

import adaptspec_tuner
from adaptspec_tuner.measuring.profiler import Recording
from adaptspec_tuner.tune import contexts_for, forwards_of


@pytest.mark.parametrize(
    ("most", "contexts"),
    [
        (50, [128, 1024]),
        (2048, [128, 1024]),
        (2049, [128, 1024, 4096]),
        (90_000, [128, 1024, 4096]),
    ],
)
def test_forwards_are_timed_behind_as_many_tokens_as_prompts_need(
    most: int, contexts: list[int]
) -> None:
    assert contexts_for(most) == contexts


def test_only_answers_that_were_timed_tell_what_a_forward_takes() -> None:
    timed = Recording([1] * 10, [2] * 21, 32, forwards=20, seconds_target=4.0)
    assert forwards_of([timed, Recording([1], [2], 4)]) == [(20, 0.2)]


def test_what_the_package_names_is_no_module_of_the_same_name() -> None:
    found = [getattr(adaptspec_tuner, name) for name in adaptspec_tuner.__all__]
    assert [one.__name__ for one in found] == adaptspec_tuner.__all__
