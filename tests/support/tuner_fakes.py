"""Stand-ins for tests of tuning: a strategy and measurers that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from adaptspec.params import Params, Tunable
from adaptspec.profile import Environment
from adaptspec.strategy import Drafter, Strategy, Target
from adaptspec.workloads import Prompt
from adaptspec_tuner.measuring.profiler import Agreement, Sample, Setting

PLACE = Environment("m", "model", None, None, "float32", "cpu", "cpu", 2)


class KnobParams(Params):
    k: Annotated[int, Tunable(1, 12)] = Field(default=4)


class Knob(Strategy):
    """One with something to search; another space in its subclasses."""

    name = "knob"
    summary = "a strategy that is never run"
    Params = KnobParams
    replays = True

    def start(self, target: Target) -> Drafter:
        raise NotImplementedError


class FakeMeasurer:
    """One whose subclasses say what they measured; there is nothing to forget."""

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """What a generation is said to have taken."""
        raise NotImplementedError

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """Equal tokens or not."""
        return "identical" if tuple(plain) == tuple(other) else "mismatch"

    def forget(self) -> None:
        """Nothing."""
