"""What a tune is given, and what all of its phases need: store, clock, budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

from adaptspec.cli.progress import Progress
from adaptspec.errors import AdaptSpecError, ProfileStoreError
from adaptspec.profile import Environment, ProfileStore
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.measuring.profiler import (
    MeasuresAhead,
    Sample,
    Setting,
    TurnMeasurer,
)
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.searching.search import TrialPool
from adaptspec_tuner.time_budget import TimeBudget
from adaptspec_tuner.time_spent import Spending

if TYPE_CHECKING:
    from adaptspec.strategy import Strategy
    from adaptspec_tuner.measuring.other_programs import OtherPrograms
    from adaptspec_tuner.replaying.replayer import Replayer
    from adaptspec_tuner.reporting.usage import Usage
    from adaptspec_tuner.searching.space import Searched

# From plain decoding of prompts to what predicts from it, where anything can.
MakesReplayer = Callable[[Sequence[tuple[Prompt, Sample]]], "Replayer | None"]


class Stopped(AdaptSpecError):
    """Ended on its way.

    Args:
        result: The classes already confirmed.
    """

    def __init__(self, text: str, result: TuneResult) -> None:
        super().__init__(text)
        self.result = result


class Interrupted(Stopped):
    """Stopped by the user; what was finished is stored."""

    def __init__(self, result: TuneResult) -> None:
        super().__init__(
            "stopped; finished trials are kept, the same command continues", result
        )


@dataclass(frozen=True)
class TuneInputs:
    """What one tune is given; everything that touches a model, clock or disk.

    What an earlier one of the same ``id`` kept in ``store`` is continued, or forgotten
    where ``options.fresh``.

    Args:
        unavailable: Strategy or baseline -> why it can't run.
        started: When loading began; default: now.
        pool: Runs the search's trials in place of ``measurer``.
        notes: What there was to say before it began; belongs in the result.
        needs: Whether a setting of ours runs the draft model, and whether it asks
            trained heads.
        processor: Seconds of processor time of this process; without it, that it stood
            still isn't seen.
        others: Watches what other programs take of the processors, from its making on.
        usage: How it was asked for; None where models were given that have no path.
    """

    measurer: TurnMeasurer
    strategies: Sequence[Searched]
    workload: Workload
    store: ProfileStore
    environment: Environment
    options: TuneOptions
    _: KW_ONLY
    clock: Callable[[], float]
    progress: Progress
    baselines: Sequence[Setting] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    replayer: MakesReplayer | None = None
    pool: TrialPool | None = None
    notes: Sequence[str] = ()
    needs: Callable[[Setting], tuple[bool, bool]] = lambda setting: (False, False)
    processor: Callable[[], float] | None = None
    others: Callable[[], OtherPrograms] | None = None
    usage: Usage | None = None

    @property
    def of_engine(self) -> bool:
        """Whether another engine's settings are measured, which nothing predicts."""
        return isinstance(self.measurer, MeasuresAhead)

    @property
    def starting(self) -> float:
        """Seconds that a new setting takes to be ready, as far as is known."""
        if isinstance(self.measurer, MeasuresAhead):
            return self.measurer.starting
        return 0.0

    def starts_take(self, settings: int) -> float:
        """Seconds of the starts of as many settings beside plain decoding, where each
        is started but once; else 0."""
        if isinstance(self.measurer, MeasuresAhead) and self.measurer.keeps:
            return self.measurer.starting * self.measurer.starts_for(settings)
        return 0.0

    @property
    def at_once(self) -> int:
        """How many settings are measured beside the same plain answers."""
        if isinstance(self.measurer, MeasuresAhead):
            return self.measurer.beside_plain
        return 1

    @property
    def once(self) -> bool:
        """Whether each setting is measured but once on a prompt."""
        return isinstance(self.measurer, MeasuresAhead) and self.measurer.keeps

    @property
    def replaying(self) -> list[type[Strategy]]:
        """The strategies that can be predicted."""
        return [cls for cls in self.strategies if isinstance(cls, type) and cls.replays]


class TuningRun:
    """What every phase of a tune needs: its store, clock, budget and what it says.

    Phases pass values to each other, none through here.
    """

    def __init__(self, given: TuneInputs) -> None:
        self.given = given
        self.store, self.environment = given.store, given.environment
        self.options, self.clock = given.options, given.clock
        self.progress = given.progress
        self.id = run_id(self.environment, given.workload, self.options)
        if self.options.fresh:
            self.store.delete_run(self.id)
        started = self.clock() if given.started is None else given.started
        self.time = TimeBudget(self.clock, started + self.options.seconds)
        self.spending = Spending(self.store, self.id, self.clock, started)
        self.unstored: ProfileStoreError | None = None
        self.notes: list[str] = []
        for note in given.notes:
            self.warn(note)

    def warn(self, text: str) -> None:
        """Say something that belongs in the result, once."""
        if text in self.notes:
            return
        self.notes.append(text)
        self.progress.say(text)

    def doing(self, text: str) -> None:
        """Say what is being done now."""
        self.progress.doing(text, self.time.left)

    def begin(self, part: str) -> None:
        """Account for what is done from here on."""
        self.keep(lambda: self.spending.begin(part))

    def keep(self, write: Callable[[], object]) -> None:
        """Write to the store; if it fails, go on, and tell in the end.

        For what there is to show without: what was measured must not be lost with it.
        """
        try:
            write()
        except ProfileStoreError as error:
            self.unstored = self.unstored or error


def run_id(environment: Environment, workload: Workload, options: TuneOptions) -> str:
    """Equal for runs whose trials may be mixed: one is continued by the other."""
    parts = [
        list(environment.place()),
        dict(environment.versions),
        workload.digest,
        options.shared(),
    ]
    if environment.heads is not None:
        parts.append(environment.heads)
    # The environment tells only the threads for single tokens; these are as many where
    # nothing is said.
    if options.batch_threads not in (None, environment.threads):
        parts.append({"batch_threads": options.batch_threads})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
