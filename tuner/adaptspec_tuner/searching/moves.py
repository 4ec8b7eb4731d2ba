"""Settings that differ from a known one in a single parameter, the likeliest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from adaptspec.params import Params, ParamSpec, Scalar
from adaptspec_tuner.searching.space import active

# Method, parameter, and upward (1) or downward (-1), or the value that is chosen.
Move = tuple[str, str, Scalar]


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


@dataclass
class Learnt:
    """What moves brought so far, in any class.

    Args:
        gains: Move -> logarithms of how many times as fast the new setting was.
        doubt: As many times that a move brought nothing count, too.
    """

    gains: dict[Move, list[float]] = field(default_factory=dict)
    doubt: float = 1.0

    def tell(self, move: Move, gain: float) -> None:
        """Remember what a move brought."""
        self.gains.setdefault(move, []).append(gain)

    def expected(self, move: Move) -> float:
        """What a move is expected to bring; 0 of one that was never made."""
        found = self.gains.get(move, [])
        if not found:
            return 0.0
        return fmean(found) * len(found) / (len(found) + self.doubt)

    def settings(
        self,
        method: str,
        params: type[Params],
        setting: Mapping[str, Scalar],
        least: float = -0.03,
    ) -> list[tuple[Move, dict[str, Scalar]]]:
        """Moves from ``setting`` with where they lead, the most promising first.

        Args:
            least: What must be expected of one.
        """
        found = [
            ((method, name, direction), moved)
            for name, direction, moved in moves(params, setting)
        ]
        found = [pair for pair in found if self.expected(pair[0]) >= least]
        return sorted(found, key=lambda pair: -self.expected(pair[0]))
