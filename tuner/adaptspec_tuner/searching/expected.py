"""What settings of an engine are expected to reach, from those that were measured.

A Gaussian process over settings and classes: what is learnt of a parameter in one class
tells something of the others, and of other methods that have it (Rasmussen and Williams
2006, ch. 2; expected improvement: Jones, Schonlau and Welch 1998).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptspec.params import Params, ParamSpec, Scalar
from adaptspec_tuner.searching.space import active

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of the log of a ratio to plain decoding.

    Args:
        every: Of what all settings have in common.
        of_class: Of what the settings of a class have in common.
        method: Of a method's mean over classes.
        method_in_class: Of a method in a class, beside that mean.
        params: Of parameters, in all classes alike.
        params_in_class: Of parameters in a class, beside that.
        prompt: Of a method on one prompt, beside its class.
        measured: Of one measurement.
        reach: How far apart parameters tell of each other, as a part of their range.
        related: Correlation of two methods' parameters of the same name.
    """

    every: float = 0.1
    of_class: float = 0.1
    method: float = 0.1
    method_in_class: float = 0.2
    params: float = 0.2
    params_in_class: float = 0.1
    prompt: float = 0.07
    measured: float = 0.03
    reach: float = 0.5
    related: float = 0.6


@dataclass(frozen=True)
class Point:
    """A method's setting in a class, on one of its prompts or on any."""

    prompt_class: str
    method: str
    params: Mapping[str, Scalar]
    prompt: str | None = None


class Expected:
    """Means and spreads of the log ratio to plain decoding at any points.

    Args:
        spaces: Method -> its parameters.
        points: Where it was measured.
        logs: What was measured there.
    """

    def __init__(
        self,
        spaces: Mapping[str, type[Params]],
        points: Sequence[Point],
        logs: Sequence[float],
        spreads: Spreads | None = None,
    ) -> None:
        self._spaces, self._points = spaces, list(points)
        self._logs, self._spreads = np.array(logs, dtype=float), spreads or Spreads()
        self._axes = sorted(
            {axis for space in spaces.values() for axis in _axes_of(space)}
        )

    def at(self, points: Sequence[Point]) -> tuple[Floats, Floats]:
        """Mean and standard deviation at each of ``points``."""
        s = self._spreads
        prior = s.every**2 + s.of_class**2 + s.method**2 + s.method_in_class**2
        prior += s.params**2 + s.params_in_class**2
        if not self._points:
            return np.zeros(len(points)), np.full(len(points), math.sqrt(prior))
        known = self._alike(points, self._points)
        factor, weights = self._solved
        means = known @ weights
        half = np.linalg.solve(factor, known.T)
        variances = prior - np.einsum("ij,ij->j", half, half)
        return means, np.sqrt(np.maximum(variances, 1e-8))

    def believing(self, points: Sequence[Point]) -> Expected:
        """The same as if each of ``points`` had been measured to be as expected."""
        means, _ = self.at(points)
        return Expected(
            self._spaces,
            [*self._points, *points],
            [*self._logs, *means],
            self._spreads,
        )

    @cached_property
    def _solved(self) -> tuple[Floats, Floats]:
        covariance = self._alike(self._points, self._points)
        covariance += self._spreads.measured**2 * np.eye(len(self._points))
        factor = np.linalg.cholesky(covariance)
        weights = np.linalg.solve(factor.T, np.linalg.solve(factor, self._logs))
        return factor, weights

    def _alike(self, ones: Sequence[Point], others: Sequence[Point]) -> Floats:
        """The covariance of each of ``ones`` with each of ``others``."""
        s = self._spreads
        same_class = _same(ones, others, lambda p: p.prompt_class)
        same_method = _same(ones, others, lambda p: p.method)
        same_prompt = same_class * _same(
            ones, others, lambda p: object() if p.prompt is None else p.prompt
        )
        a, b = self._placed(ones), self._placed(others)
        squares = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
        near = np.exp(-0.5 * squares / s.reach**2)
        near *= s.related + (1 - s.related) * same_method
        found: Floats = (
            s.every**2
            + s.of_class**2 * same_class
            + (s.method**2 + s.method_in_class**2 * same_class) * same_method
            + (s.params**2 + s.params_in_class**2 * same_class) * near
            + s.prompt**2 * same_prompt * same_method
        )
        return found

    def _placed(self, points: Sequence[Point]) -> Floats:
        """Coordinates of settings: from 0 to 1 in each parameter; one that a setting
        doesn't have lies beside the middle of its range."""
        places = np.zeros((len(points), 2 * len(self._axes)))
        for row, point in enumerate(points):
            found = _places(self._spaces[point.method], point.params)
            for column, axis in enumerate(self._axes):
                place = found.get(axis)
                places[row, 2 * column : 2 * column + 2] = (
                    (0.5, 0.5) if place is None else (place, 0.0)
                )
        return places


def improvement(means: Floats, spreads: Floats, best: float) -> Floats:
    """By how much each is expected to be above ``best``, where it is at all."""
    from scipy.stats import norm

    sure = (means - best) / spreads
    found: Any = spreads * (sure * norm.cdf(sure) + norm.pdf(sure))
    return np.asarray(found, dtype=float)


def _axes_of(params: type[Params]) -> list[str]:
    axes: list[str] = []
    for spec in params.specs():
        if spec.tunable is not None:
            axes += [f"{spec.name}={value}" for value in spec.choices or ()] or [
                spec.name
            ]
    return axes


def _places(params: type[Params], values: Mapping[str, Scalar]) -> dict[str, float]:
    """Axis -> place, of the parameters that matter."""
    found: dict[str, float] = {}
    for spec in params.specs():
        if not active(spec, values):
            continue
        if spec.choices:
            for value in spec.choices:
                found[f"{spec.name}={value}"] = 0.5 * (value == values[spec.name])
        else:
            found[spec.name] = _place(spec, float(values[spec.name]))
    return found


def _place(spec: ParamSpec, value: float) -> float:
    """Of a number in its range, or in that of its logarithm where that is searched."""
    tunable = spec.tunable
    assert tunable is not None
    low, high = float(tunable.low or 0.0), float(tunable.high or 0.0)
    value = min(high, max(low, value))
    if tunable.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low) if high > low else 0.5


def _same(ones: Sequence[Point], others: Sequence[Point], key: Any) -> Floats:
    numbers: dict[Any, int] = {}
    a = [numbers.setdefault(key(p), len(numbers)) for p in ones]
    b = [numbers.setdefault(key(p), len(numbers)) for p in others]
    same: Floats = (np.array(a)[:, None] == np.array(b)[None, :]).astype(float)
    return same
