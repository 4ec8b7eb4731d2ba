"""Trials: settings of strategies, measured beside plain decoding and checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError, EngineError, stopped_by_user
from adaptspec.params import Params, Scalar
from adaptspec.profile import ANSWER, Trial
from adaptspec_tuner.measuring.in_turns import Timed, decode_in_turns
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Measurer,
    MeasuresAhead,
    Sample,
    Setting,
    TurnMeasurer,
    in_a_line,
    sample_of,
    sample_of_whole,
)

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt

LEAST_RATIO = 1e-6  # of a generation that ended at once, which has speed 0


@dataclass(frozen=True, eq=False)
class Job:
    """What a trial measures; can be sent to another machine.

    Args:
        number: Of the trial; -1 for a setting that is measured once more.
        predicted: The ratio that a replay promised, if it was replayed.
    """

    run: str
    prompt_class: str
    strategy: str
    number: int
    space: type[Params]
    params: Mapping[str, Scalar]
    prompts: Sequence[Prompt]
    objective: str = ANSWER
    predicted: float | None = None

    @property
    def setting(self) -> Setting:
        """The strategy with its parameters."""
        return Setting(self.strategy, dict(self.params))


def run_trial(
    measurer: Measurer,
    job: Job,
    report: Callable[[int, float], bool],
    warn: Callable[[str], None],
) -> Trial:
    """Measure one setting alone beside plain decoding.

    Args:
        report: Told the running ratio after each prompt; whether to give it up.
    """

    def given_up(ratios: Mapping[Job, Mapping[str, float]]) -> Collection[Job]:
        ended = [
            report(len(found) - 1, geometric_mean(found.values()))
            for found in ratios.values()
        ]
        return [job] if any(ended) else []

    (trial,) = run_together(measurer, [job], given_up, warn)
    assert trial is not None  # there always is time
    return trial


def run_together(
    measurer: Measurer,
    jobs: Sequence[Job],
    given_up: Callable[[Mapping[Job, Mapping[str, float]]], Collection[Job]],
    warn: Callable[[str], None],
    *,
    in_time: Callable[[], bool] = lambda: True,
    ahead: Collection[Setting] | None = None,
) -> list[Trial | None]:
    """Measure settings of one class prompt by prompt, in turns with plain decoding.

    What fails or changes an output is recorded so. A prompt that can't be decoded
    plainly, or of which plain decoding gives a single token, is left out.

    Args:
        jobs: All with the same prompts.
        given_up: Told the ratios by prompt id of those still running, after each prompt
            but the last; which of them end here.
        in_time: Whether another prompt may begin; the first is measured anyway.
        ahead: Settings that are measured already, which takes no more time; there is
            none for the others. None: none is.

    Returns:
        A trial for each job, in their order; None for one that there was no time for.
    """
    if ahead is None:
        measurer.forget()
    runs = {job: _Running(job) for job in jobs}
    for run in runs.values():
        run.prepare(measurer, warn)
    prompts = jobs[0].prompts if jobs else ()
    late: set[Job] = set()
    ready = [run.job for run in runs.values() if run.state is None]
    if ahead is None and isinstance(measurer, MeasuresAhead):
        ahead = measurer.measure_ahead([(j.setting, prompts) for j in ready], in_time)
    if ahead is not None:
        keys = {setting.key for setting in ahead}
        late = {job for job in ready if job.setting.key not in keys}
    for place, prompt in enumerate(prompts):
        going = [
            run for job, run in runs.items() if run.state is None and job not in late
        ]
        if not going or (place and ahead is None and not in_time()):
            break
        found = measured(
            measurer, [PLAIN_SETTING, *(r.job.setting for r in going)], prompt, place
        )
        plain = found[PLAIN_SETTING.key]
        if isinstance(plain, Exception):
            warn(f"prompt {prompt.id!r} is left out: {in_a_line(plain)}")
            continue
        if not plain.speed:
            continue
        for run in going:
            run.take(measurer, prompt, found[run.job.setting.key], plain, warn)
        if place + 1 < len(prompts):
            ratios = {r.job: r.ratios for r in going if r.state is None}
            for job in given_up(ratios) if ratios else ():
                runs[job].state = "pruned"
    return [None if job in late else runs[job].trial() for job in jobs]


def measured(
    measurer: Measurer, settings: Sequence[Setting], prompt: Prompt, turn: int
) -> dict[str, Sample | Exception]:
    """One generation of each setting on a prompt; of what fails the error.

    Step by step in turns, where that can be.

    Args:
        turn: Where the order begins: no setting is always the first.

    Returns:
        By setting key.
    """
    start = turn % len(settings)
    order = [*settings[start:], *settings[:start]]
    if isinstance(measurer, MeasuresAhead):
        order = measurer.ready_first(order)
    if isinstance(measurer, TurnMeasurer):
        runs = decode_in_turns(
            {s.key: functools.partial(measurer.begin, s, prompt) for s in order},
            together=measurer.fits(order, prompt),
            needed=PLAIN_SETTING.key,
        )
        # Without plain decoding the others may not have begun.
        plain = runs.get(PLAIN_SETTING.key)
        if plain is not None and plain.error is not None:
            return {PLAIN_SETTING.key: plain.error}
        return {
            key: _sample(run) if run.error is None else run.error
            for key, run in runs.items()
        }
    found: dict[str, Sample | Exception] = {}
    for setting in order:
        try:
            found[setting.key] = measurer.measure(setting, prompt)
        # A third party's strategy may raise anything, and so may a model.
        except Exception as error:
            if stopped_by_user(error):
                raise
            found[setting.key] = error
    return found


def _sample(run: Timed) -> Sample:
    return (sample_of_whole if run.whole else sample_of)(run.result)


@dataclass
class _Running:
    """A trial on its way.

    Args:
        ratios: Prompt id -> ratio to plain decoding.
        state: How it ended; None while it goes on.
    """

    job: Job
    ratios: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    near_ties: int = 0
    state: str | None = None
    error: str | None = None

    def prepare(self, measurer: Measurer, warn: Callable[[str], None]) -> None:
        """Decode a little with a new setting: the first prompt must not be slow."""
        try:
            self.job.space.parse(dict(self.job.params), self.job.strategy)
            if isinstance(measurer, TurnMeasurer) and self.job.number >= 0:
                measurer.warm_up(self.job.setting, self.job.prompts)
        # A third party's strategy may raise anything, and so may a model.
        except Exception as error:
            self._fail(error, warn)

    def take(
        self,
        measurer: Measurer,
        prompt: Prompt,
        sample: Sample | Exception,
        plain: Sample,
        warn: Callable[[str], None],
    ) -> None:
        """What it did on a prompt, beside plain decoding."""
        job = self.job
        try:
            if isinstance(sample, Exception):
                raise sample
            agreement = measurer.agreement(prompt, plain.tokens, sample.tokens)
        # A forward tells near ties, for which there may be no memory left.
        except Exception as error:
            self._fail(error, warn)
            return
        if agreement == "mismatch":
            self.state, self.error = "failed", f"mismatch: prompt {prompt.id!r}"
            warn(
                f"NOT LOSSLESS: {job.strategy} {dict(job.params)} changed the output "
                f"of prompt {prompt.id!r}; the setting is disqualified"
            )
            return
        self.near_ties += agreement == "near_tie"
        self.speeds.append(sample.speed)
        gain = sample.gain(plain, job.objective)
        self.ratios[prompt.id] = max(gain, LEAST_RATIO)

    def _fail(self, error: Exception, warn: Callable[[str], None]) -> None:
        if stopped_by_user(error):
            raise error
        self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        # What another engine says of its end is worth telling.
        if isinstance(error, EngineError) or not isinstance(error, AdaptSpecError):
            warn(f"{self.job.strategy} {dict(self.job.params)} failed: {self.error}")

    def trial(self) -> Trial:
        """What is stored of it; without any prompt it failed."""
        job, state = self.job, self.state or "complete"
        if not self.ratios and state != "failed":
            state, self.error = "failed", "no prompt could be decoded plainly"
        ratios = list(self.ratios.values())
        detail: dict[str, Any] = {
            "prompts": list(self.ratios),
            "ratios": ratios,
            "running": [
                geometric_mean(ratios[:count]) for count in range(1, len(ratios) + 1)
            ],
            "near_ties": self.near_ties,
        }
        if job.predicted is not None:
            detail["predicted"] = job.predicted
        if self.error is not None:
            detail["error"] = self.error
        if self.ratios:
            detail["ratio"] = geometric_mean(ratios)
        return Trial(
            job.run,
            job.prompt_class,
            job.strategy,
            job.number,
            dict(job.params),
            state,
            None if state == "failed" else median(self.speeds),
            detail,
        )


def geometric_mean(ratios: Collection[float]) -> float:
    """Of one ratio or more, all above zero."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
