"""A tune on measurements whose truth is known, with noise, pauses and a fake clock."""

from __future__ import annotations

import math
import random
from typing import Annotated, Any, cast

from pydantic import Field

from adaptspec.cli.progress import Progress
from adaptspec.params import Tunable
from adaptspec.profile import PLAIN
from adaptspec.strategy import Strategy
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Sample, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tuning_run import TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob, KnobParams

TOKENS = 48


class TreeParams(KnobParams):
    size: Annotated[int, Tunable(1, 32, log=True)] = Field(default=8)
    k: Annotated[int, Tunable(1, 8)] = Field(default=4)


class One(Knob):
    name, Params = "one", TreeParams


class Two(One):
    name = "two"


class Three(One):
    name = "three"


class Four(One):
    name = "four"


class General(One):
    name, general = "general", True


STRATEGIES: list[type[Strategy]] = [One, Two, Three, Four, General]


class World(FakeMeasurer):
    """Eight classes; a strategy's speed depends on class, setting, prompt and luck.

    Args:
        prompts: Standard deviation of a prompt's log ratio to its class's.
        runs: The same of one generation to the next.
        pauses: Share of generations that the machine interrupts for two seconds.
        token: Seconds of a plainly decoded token.
        replay: Standard deviation of the log error of a strategy's predictions.
    """

    def __init__(
        self,
        seed: int,
        *,
        prompts: float = 0.15,
        runs: float = 0.05,
        pauses: float = 0.01,
        token: float = 0.033,
        classes: int = 8,
        replay: float = 0.1,
    ) -> None:
        draw = random.Random(seed)
        self.clock = FakeClock()
        self._luck = random.Random(seed + 1)
        self._runs, self._pauses, self._token = runs, pauses, token
        self._seed, self._prompts, self._replay = seed, prompts, replay
        names = [f"class{number}" for number in range(classes)]
        # Of each class and strategy: the best ratio, and the setting that has it.
        self._best = {
            (name, cls.name): (
                draw.gauss(0.3 if cls.name == "general" else 0.1, 0.2),
                draw.uniform(math.log(2), math.log(24)),
                draw.uniform(2, 7),
            )
            for name in names
            for cls in STRATEGIES
        }
        self.workload = Workload(
            "world",
            tuple(
                Prompt(f"{name}/{number}", name, text="x")
                for name in names
                for number in range(8)
            ),
        )

    def ratio(self, prompt_class: str, setting: Setting) -> float:
        """What is true of a setting: how many times as fast as plain decoding."""
        if setting.strategy == PLAIN:
            return 1.0
        best, size, depth = self._best[prompt_class, setting.strategy]
        wrong_size = math.log(float(setting.params["size"])) - size
        wrong_depth = float(setting.params["k"]) - depth
        return math.exp(best - 0.05 * wrong_size**2 - 0.005 * wrong_depth**2)

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation, with the luck of prompt and moment."""
        seconds = self._expected(setting, prompt)
        seconds *= math.exp(self._luck.gauss(0.0, self._runs))
        if self._luck.random() < self._pauses:
            seconds += 2.0
        self.clock.advance(seconds + 0.1)  # and the prefill
        return Sample(
            tuple(range(TOKENS)), (TOKENS - 1) / seconds, seconds + 0.1, TOKENS
        )

    def _expected(self, setting: Setting, prompt: Prompt) -> float:
        """Seconds of decoding, but for the luck of the moment."""
        seconds = TOKENS * self._token / self.ratio(prompt.prompt_class, setting)
        if setting.strategy != PLAIN:
            draw = random.Random(f"{self._seed}/{setting.strategy}/{prompt.id}")
            seconds *= math.exp(draw.gauss(0.0, self._prompts))
        return seconds

    def predicted(self, setting: Setting, prompt: Prompt) -> Sample:
        """What a replay says of it: wrong by as much for all of a strategy."""
        self.clock.advance(0.01)
        seconds = self._expected(setting, prompt)
        if setting.strategy != PLAIN:
            draw = random.Random(f"{self._seed}/replay/{setting.strategy}")
            seconds *= math.exp(draw.gauss(0.0, self._replay))
        return Sample(tuple(range(TOKENS)), (TOKENS - 1) / seconds, seconds, TOKENS)

    def tune(self, budget: float) -> TuneResult:
        """A whole tune in its time."""
        began = self.clock.now
        result = tune_with(
            TuneInputs(
                self,
                STRATEGIES,
                self.workload,
                MemoryStore(),
                PLACE,
                TuneOptions(budget, objective="speed"),
                clock=self.clock,
                progress=Progress(None, self.clock),
                replayer=lambda _: cast("Any", Predictor(self)),
            )
        )
        self.took = self.clock.now - began
        return result

    def reached(self, result: TuneResult) -> float:
        """The true ratio of what was confirmed as the fastest: geometric mean over the
        classes. Whether that is sure enough to be chosen is decided elsewhere."""
        fastest = [
            max(found.profiles, key=lambda profile: profile.measurement.ratio)
            for found in result.named
        ]
        ratios = [
            self.ratio(p.prompt_class, Setting(p.strategy, p.params)) for p in fastest
        ]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    def best(self) -> float:
        """The same of the best setting of each class."""
        names = {name for name, _ in self._best}
        tops = [
            max(self._best[name, cls.name][0] for cls in STRATEGIES) for name in names
        ]
        return math.exp(sum(max(0.0, top) for top in tops) / len(tops))


class Predictor(FakeMeasurer):
    """The replayer of a world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """What it predicts."""
        return self._world.predicted(setting, prompt)
