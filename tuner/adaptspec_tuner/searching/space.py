"""From a strategy's declared parameters to what Optuna suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptspec.params import Params, ParamSpec, Scalar

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

    from adaptspec.engines.inference_engine import Method
    from adaptspec.strategy import Strategy

    # What is searched: a strategy of ours, or another engine's method.
    Searched = type[Strategy] | Method


def distributions(params: type[Params]) -> dict[str, BaseDistribution]:
    """Name -> distribution of every tuned parameter."""
    return {s.name: _distribution(s) for s in params.specs() if s.tunable is not None}


def defaults(params: type[Params]) -> dict[str, Scalar]:
    """Every parameter's default."""
    return {spec.name: spec.default for spec in params.specs()}


def active(spec: ParamSpec, values: Mapping[str, Scalar]) -> bool:
    """Whether ``spec`` matters where the other parameters have ``values``."""
    if spec.tunable is None:
        return False
    return all(values[name] in wanted for name, wanted in spec.tunable.when.items())


def tuned(params: type[Params], values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Those of ``values`` that are searched and matter."""
    return {s.name: values[s.name] for s in params.specs() if active(s, values)}


def suggest(params: type[Params], trial: Trial) -> dict[str, Scalar]:
    """A full setting; parameters that don't matter keep their defaults."""
    values = defaults(params)
    space = distributions(params)
    # Conditions may refer to fields declared later.
    for spec in sorted(params.specs(), key=_conditional):
        if active(spec, values):
            values[spec.name] = trial._suggest(spec.name, space[spec.name])
    return values


def _conditional(spec: ParamSpec) -> int:
    return len(spec.tunable.when) if spec.tunable is not None else 0


def _distribution(spec: ParamSpec) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if spec.choices:
        return CategoricalDistribution(spec.choices)
    tunable: Any = spec.tunable
    if spec.kind == "int":
        return IntDistribution(
            int(tunable.low), int(tunable.high), tunable.log, int(tunable.step or 1)
        )
    return FloatDistribution(tunable.low, tunable.high, tunable.log, tunable.step)
