"""Settings one step away, and what is learnt of such steps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from adaptspec.params import Params, Tunable
from adaptspec_tuner.searching.moves import Learnt, moves
from adaptspec_tuner.searching.one_by_one import fitting
from adaptspec_tuner.searching.space import defaults


class Space(Params):
    length: Annotated[int, Tunable(1, 16, log=True)] = Field(default=3, ge=1, le=16)
    least: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.0, ge=0.0, le=0.9
    )
    kind: Annotated[Literal["a", "b", "c"], Tunable()] = "a"
    extra: Annotated[int, Tunable(2, 9, when={"kind": ("b",)})] = Field(
        default=4, ge=2, le=9
    )
    fixed: int = 7


Setting = st.fixed_dictionaries(
    {
        "length": st.integers(1, 16),
        "least": st.sampled_from([n / 10 for n in range(10)]),
        "kind": st.sampled_from("abc"),
        "extra": st.integers(2, 9),
        "fixed": st.just(7),
    }
)


@given(Setting)
def test_a_move_changes_one_parameter_that_matters_to_an_allowed_value(
    setting: dict[str, int | float | str],
) -> None:
    seen = []
    for name, direction, moved in moves(Space, setting):
        changed = [key for key in setting if moved[key] != setting[key]]
        assert changed == [name]
        assert name != "fixed"
        assert name != "extra" or setting["kind"] == "b"
        Space.parse(moved, "space")
        if isinstance(direction, int):
            assert (moved[name] > setting[name]) == (direction > 0)  # type: ignore[operator]
        else:
            assert moved[name] == direction
        seen.append((name, direction))
    assert len(seen) == len(set(seen))
    # Every parameter that matters can be changed, upward or downward.
    assert {name for name, _ in seen} >= {"length", "least", "kind"}


def test_what_paid_comes_first_and_what_lost_is_left_out() -> None:
    learnt, start = Learnt(), defaults(Space)
    first = [move for move, _ in learnt.settings("m", Space, start)]
    assert len(first) == 5  # length both ways, least upward, two kinds
    learnt.tell(("m", "least", 1), math.log(1.3))
    learnt.tell(("m", "length", 1), math.log(0.7))
    learnt.tell(("other", "length", -1), math.log(0.5))
    found = [move for move, _ in learnt.settings("m", Space, start)]
    assert found[0] == ("m", "least", 1)
    assert ("m", "length", 1) not in found
    assert ("m", "length", -1) in found


def test_one_loss_counts_less_than_several() -> None:
    learnt = Learnt()
    move = ("m", "length", 1)
    learnt.tell(move, -0.1)
    once = learnt.expected(move)
    learnt.tell(move, -0.1)
    assert -0.1 < learnt.expected(move) < once < 0


def test_as_many_settings_are_opened_as_there_is_time_for() -> None:
    assert fitting(60.0, 10.0) == 5  # and plain decoding
    assert fitting(9.0, 10.0) == 0
    assert fitting(-5.0, 10.0) == 0
    assert fitting(math.inf, 10.0) is None
