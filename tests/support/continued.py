"""A tune of two classes that may be run again, on a measurer that needs no model."""

from __future__ import annotations

import math
from typing import Any

from adaptspec.cli.progress import Progress
from adaptspec.profile import PLAIN, ProfileStore
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tuning_run import TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob

WORKLOAD = Workload(
    "w",
    tuple(Prompt(f"{c}{i}", c, text="x") for c in ("chat", "code") for i in range(8)),
)
HELD_OUT = {
    name: [prompt.id for prompt in prompts]
    for name, prompts in split(WORKLOAD)[1].by_class().items()
}


class Other(Knob):
    name = "other"


class Trace(FakeMeasurer):
    """Generations of a second; knobs are twice as fast, and ``failing`` ones fail."""

    def __init__(self, failing: list[str] | None = None) -> None:
        self.clock = FakeClock()
        self.failing = failing or []

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """What is true of the setting."""
        if prompt.id in self.failing:
            raise RuntimeError("no memory")
        self.clock.advance(1.0)
        speed = {PLAIN: 10.0, "knob": 20.0}.get(setting.strategy, 15.0)
        return Sample((1, 2, 3), speed, 2 / speed, forwards=2)


def tune(
    store: ProfileStore,
    failing: list[str] | None = None,
    strategies: tuple[type[Knob], ...] = (Knob, Other),
    budget: float = math.inf,
    **more: Any,
) -> TuneResult:
    """Begin the tune, or continue what the store has of it."""
    trace = Trace(failing)
    return tune_with(
        TuneInputs(
            trace,
            strategies,
            WORKLOAD,
            store,
            PLACE,
            TuneOptions(budget, trials=2),
            clock=trace.clock,
            progress=Progress(None, trace.clock),
            **more,
        )
    )
