"""Settings one step away."""

from __future__ import annotations

from typing import Annotated, Literal

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from adaptspec.params import Params, Tunable
from adaptspec_tuner.searching.moves import moves


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
