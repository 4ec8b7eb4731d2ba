"""Strategy parameters, declared once: validated, tuned, shown from here."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptspec.errors import InvalidParamsError

Scalar = bool | int | float | str
P = TypeVar("P", bound="Params")


@dataclass(frozen=True)
class Tunable:
    """Marks a field as searched by the tuner, between ``low`` and ``high``.

    Put it in the field's ``Annotated`` metadata. ``bool`` and ``Literal`` fields need
    no bounds: ``Tunable()`` searches every value.

    Args:
        low: Smallest value tried, included.
        high: Largest value tried, included.
        log: Search on a logarithmic scale.
        step: Distance between tried values.
        when: The field matters only where these other fields have one of these values,
            e.g. ``{"shape": ("sampled",)}``; elsewhere it keeps its default.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ParamSpec:
    """What one parameter is: everything help, JSON, search space and docs print."""

    name: str
    kind: Literal["int", "float", "bool", "choice"]
    default: Scalar
    description: str
    choices: tuple[Scalar, ...] = ()
    tunable: Tunable | None = None

    @property
    def bounds(self) -> str:
        """The searched values in words, e.g. ``1..16`` or ``recent | frequent``."""
        if self.choices:
            return " | ".join(str(choice) for choice in self.choices)
        if self.tunable is None or self.tunable.low is None:
            return "fixed"
        return f"{self.tunable.low:g}..{self.tunable.high:g}"

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description."""
        described: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "default": self.default,
            "description": self.description,
            "tuned": self.tunable is not None,
        }
        if self.choices:
            described["choices"] = list(self.choices)
        if self.tunable is not None and self.tunable.low is not None:
            described["low"] = self.tunable.low
            described["high"] = self.tunable.high
            described["log"] = self.tunable.log
        if self.tunable is not None and self.tunable.when:
            described["when"] = {k: list(v) for k, v in self.tunable.when.items()}
        return described


class Params(BaseModel):
    """Base of every strategy's parameters: frozen, unknown names refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def specs(cls) -> tuple[ParamSpec, ...]:
        """One :class:`ParamSpec` per field, in declaration order."""
        return tuple(
            _spec(name, info, info.description or cls._inherited(name))
            for name, info in cls.model_fields.items()
        )

    @classmethod
    def _inherited(cls, name: str) -> str:
        """The nearest base's description of a field that gives none itself."""
        bases = [base for base in cls.__mro__[1:] if issubclass(base, Params)]
        fields = [base.model_fields.get(name) for base in bases]
        return next((f.description for f in fields if f and f.description), "")

    @classmethod
    def parse(cls: type[P], values: Mapping[str, Any], owner: str = "") -> P:
        """Validate ``values``.

        Raises:
            InvalidParamsError: naming the parameter, the value and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InvalidParamsError(_explain(cls, error, owner)) from None


class DraftingParams(Params):
    """Base for strategies that draft up to so many tokens in each step.

    A strategy declares ``draft_length`` with its own default and bounds; whoever asks
    how much a setting drafts reads this field.
    """

    draft_length: Annotated[int, Tunable(1, 16)] = Field(
        default=8,
        ge=1,
        le=256,
        description="most tokens drafted in a step, in a chain or a tree",
    )


def _spec(name: str, info: Any, description: str) -> ParamSpec:
    tunable = next((m for m in info.metadata if isinstance(m, Tunable)), None)
    kind, choices = _kind(name, info.annotation)
    if tunable is not None and kind in ("int", "float") and tunable.low is None:
        raise TypeError(f"{name}: a tuned {kind} needs Tunable(low, high)")
    return ParamSpec(
        name=name,
        kind=kind,
        default=info.default,
        description=description,
        choices=choices,
        tunable=tunable,
    )


def _kind(
    name: str, annotation: Any
) -> tuple[Literal["int", "float", "bool", "choice"], tuple[Scalar, ...]]:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "choice", tuple(typing.get_args(annotation))
    if annotation is bool:
        return "bool", (False, True)
    if annotation is int:
        return "int", ()
    if annotation is float:
        return "float", ()
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{name}: a parameter has one type, got {annotation}")
    raise TypeError(f"{name}: int, float, bool or Literal expected, got {annotation}")


def _explain(cls: type[Params], error: ValidationError, owner: str) -> str:
    known = {spec.name: spec for spec in cls.specs()}
    parts = []
    for problem in error.errors():
        name = ".".join(str(item) for item in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = ", ".join(f"{s.name} ({s.bounds})" for s in known.values())
            parts.append(f"no parameter {name!r}; it takes: {valid or 'none'}")
        elif not name:
            parts.append(problem["msg"].removeprefix("Value error, "))
        else:
            parts.append(f"{name}={problem['input']!r}: {problem['msg'].lower()}")
    prefix = f"{owner}: " if owner else ""
    return prefix + "; ".join(parts)
