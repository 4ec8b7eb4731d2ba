"""What settings are expected to reach, from those that were measured."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from adaptspec.params import Params, Tunable
from adaptspec_tuner.searching.expected import Expected, Point, improvement


class Space(Params):
    length: Annotated[int, Tunable(1, 16, log=True)] = Field(default=3)
    kind: Annotated[Literal["a", "b"], Tunable()] = "a"
    extra: Annotated[int, Tunable(2, 9, when={"kind": ("b",)})] = Field(default=4)


SPACES: dict[str, type[Params]] = {"one": Space, "other": Space}


def at(
    name: str, method: str = "one", prompt: str | None = None, **params: int | str
) -> Point:
    """A setting in a class, with defaults where nothing is said."""
    return Point(name, method, {"length": 3, "kind": "a", "extra": 4, **params}, prompt)


POINTS = st.builds(
    Point,
    st.sampled_from(["chat", "code"]),
    st.sampled_from(["one", "other"]),
    st.fixed_dictionaries(
        {
            "length": st.integers(1, 16),
            "kind": st.sampled_from("ab"),
            "extra": st.integers(2, 9),
        }
    ),
    st.sampled_from(["p", "q", None]),
)


@given(st.lists(st.tuples(POINTS, st.floats(-1, 1)), max_size=12), POINTS)
def test_measuring_more_never_makes_less_sure(
    known: list[tuple[Point, float]], point: Point
) -> None:
    _, before = Expected(SPACES, [], []).at([point])
    spread = before[0]
    for count in range(1, len(known) + 1):
        points, logs = zip(*known[:count], strict=True)
        means, spreads = Expected(SPACES, points, logs).at([point])
        assert math.isfinite(means[0])
        assert spreads[0] <= spread + 1e-6
        spread = spreads[0]


def test_what_was_measured_is_expected_again_and_less_far_away() -> None:
    expected = Expected(SPACES, [at("code", prompt="p", length=4)], [0.5])
    means, spreads = expected.at(
        [
            at("code", length=4),
            at("code", length=5),
            at("code", length=16),
            at("chat", length=4),
            at("code", "other", length=4),
        ]
    )
    assert 0.3 < means[0] < 0.5
    assert means[0] > means[1] > means[2] > 0
    assert means[0] > means[3] > 0
    assert means[0] > means[4] > 0
    assert spreads[0] < spreads[1] < spreads[2]


def test_a_parameter_that_does_not_matter_changes_nothing() -> None:
    expected = Expected(SPACES, [at("code", prompt="p", extra=2)], [0.5])
    means, _ = expected.at([at("code", extra=2), at("code", extra=9)])
    assert means[0] == pytest.approx(means[1])
    means, _ = expected.at([at("code", kind="b", extra=2), at("code", kind="b")])
    assert means[0] != pytest.approx(means[1])


def test_what_is_believed_keeps_means_and_makes_sure() -> None:
    expected = Expected(SPACES, [at("code", prompt="p")], [0.4])
    asked = [at("code", length=8), at("chat", length=8)]
    means, spreads = expected.at(asked)
    again, surer = expected.believing(asked).at(asked)
    assert again == pytest.approx(means)
    assert all(surer < spreads)


@given(st.floats(-1, 1), st.floats(0.01, 0.5), st.floats(-1, 1))
def test_the_improvement_is_the_mean_of_what_is_above_the_best(
    mean: float, spread: float, best: float
) -> None:
    values = mean + spread * np.linspace(-6, 6, 20001)
    weights = np.exp(-0.5 * np.linspace(-6, 6, 20001) ** 2)
    wanted = np.average(np.maximum(values - best, 0), weights=weights)
    (found,) = improvement(np.array([mean]), np.array([spread]), best)
    assert found == pytest.approx(wanted, abs=1e-5)
