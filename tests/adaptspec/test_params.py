"""Parameters are declared once; specs, bounds and errors follow from the fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from adaptspec.errors import InvalidParamsError
from adaptspec.params import Params, Tunable


class Knobs(Params):
    """One parameter of each kind."""

    width: Annotated[int, Tunable(1, 16, log=True)] = Field(
        4, ge=1, le=64, description="tokens per step"
    )
    stop: Annotated[float, Tunable(0.0, 0.9, step=0.1, when={"policy": ("new",)})] = (
        Field(0.0, ge=0.0, lt=1.0, description="least confidence")
    )
    policy: Annotated[Literal["new", "old"], Tunable()] = Field(
        "new", description="which come first"
    )
    merge: bool = Field(True, description="merge branches")

    @model_validator(mode="after")
    def _together(self) -> Knobs:
        if self.width == 13 and not self.merge:
            raise ValueError("width 13 needs merge=true, got merge=false")
        return self


def test_specs_come_in_declaration_order_with_what_the_fields_say() -> None:
    width, stop, policy, merge = Knobs.specs()
    assert (width.name, width.kind, width.default) == ("width", "int", 4)
    assert width.description == "tokens per step"
    assert width.tunable == Tunable(1, 16, log=True)
    assert (stop.kind, stop.tunable and stop.tunable.step) == ("float", 0.1)
    assert (policy.kind, policy.choices) == ("choice", ("new", "old"))
    assert (merge.kind, merge.choices, merge.tunable) == ("bool", (False, True), None)


def test_bounds_are_told_in_words() -> None:
    bounds = {spec.name: spec.bounds for spec in Knobs.specs()}
    assert bounds == {
        "width": "1..16",
        "stop": "0..0.9",
        "policy": "new | old",
        "merge": "False | True",
    }


def test_json_holds_what_a_search_space_needs() -> None:
    described = {spec.name: spec.as_json() for spec in Knobs.specs()}
    assert described["width"] == {
        "name": "width",
        "kind": "int",
        "default": 4,
        "description": "tokens per step",
        "tuned": True,
        "low": 1,
        "high": 16,
        "log": True,
    }
    assert described["stop"]["when"] == {"policy": ["new"]}
    assert described["policy"]["choices"] == ["new", "old"]
    assert described["merge"]["tuned"] is False


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"width": 0}, ["echo: width=0", "greater than or equal to 1"]),
        ({"width": 65}, ["width=65", "less than or equal to 64"]),
        ({"width": "many"}, ["width='many'", "integer"]),
        ({"stop": 1.0}, ["stop=1.0", "less than 1"]),
        ({"policy": "any"}, ["policy='any'", "'new' or 'old'"]),
        ({"depth": 3}, ["no parameter 'depth'", "width (1..16)", "policy (new | old)"]),
        ({"width": 13, "merge": False}, ["width 13 needs merge=true"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(
    values: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(InvalidParamsError) as raised:
        Knobs.parse(values, owner="echo")
    for part in told:
        assert part in str(raised.value)


def test_text_from_the_command_line_becomes_the_declared_type() -> None:
    parsed = Knobs.parse({"width": "8", "stop": "0.5", "merge": "false"})
    assert (parsed.width, parsed.stop, parsed.merge) == (8, 0.5, False)


def test_parameters_do_not_change_after_they_were_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Knobs.parse({}).width = 5


def test_a_field_the_tuner_cannot_search_is_refused_at_declaration() -> None:
    class Unbounded(Params):
        """Tuned without bounds."""

        width: Annotated[int, Tunable()] = 4

    class Optional(Params):
        """Two types at once."""

        width: int | None = None

    class Textual(Params):
        """No kind of parameter."""

        width: str = "4"

    with pytest.raises(TypeError, match=r"width: a tuned int needs Tunable"):
        Unbounded.specs()
    with pytest.raises(TypeError, match="width: a parameter has one type"):
        Optional.specs()
    with pytest.raises(TypeError, match="width: int, float, bool or Literal"):
        Textual.specs()
