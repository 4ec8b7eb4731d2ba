"""Settings that differ from a known one in a single parameter, the likeliest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from adaptspec.params import Params, ParamSpec, Scalar
from adaptspec_tuner.searching.space import active


def moves(
    params: type[Params], setting: Mapping[str, Scalar], part: float = 0.3
) -> Iterator[tuple[str, Scalar, dict[str, Scalar]]]:
    """What one step away from ``setting`` is: parameter, direction and new setting.

    Args:
        part: Of a parameter's range, the length of a step; of its logarithm's, where
            that is searched.
    """
    for spec in params.specs():
        if not active(spec, setting):
            continue
        if spec.choices:
            for value in spec.choices:
                if value != setting[spec.name]:
                    yield spec.name, value, {**setting, spec.name: value}
            continue
        for direction in (1, -1):
            value = _stepped(spec, float(setting[spec.name]), direction * part)
            if value != setting[spec.name]:
                yield spec.name, direction, {**setting, spec.name: value}


def _stepped(spec: ParamSpec, value: float, part: float) -> Scalar:
    """A parameter's value a part of its range away, within its bounds."""
    tunable = spec.tunable
    assert tunable is not None
    assert tunable.low is not None
    assert tunable.high is not None
    low, high = float(tunable.low), float(tunable.high)
    if tunable.log:
        moved = math.exp(math.log(max(value, low)) + part * math.log(high / low))
    else:
        moved = value + part * (high - low)
    moved = min(high, max(low, moved))
    step = tunable.step or (1 if spec.kind == "int" and not tunable.log else None)
    if step:
        moved = low + step * round((moved - low) / step)
    return round(moved) if spec.kind == "int" else round(min(high, moved), 6)
