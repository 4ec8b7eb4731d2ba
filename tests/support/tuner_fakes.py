"""Stand-ins for tests of tuning: a strategy and measurers that need no model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from adaptspec.decoding.engine import Generation
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.params import Params, Scalar, Tunable
from adaptspec.profile import Environment
from adaptspec.strategy import Drafter, Strategy, Target
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt
from adaptspec_tuner.measuring.in_turns import Generating
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

    controls: Mapping[str, Scalar | None] = {}
    greedy = True

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """What a generation is said to have taken."""
        raise NotImplementedError

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        """A generation of one piece that takes what :meth:`measure` says."""
        return MeasuredWhole(lambda: self.measure(setting, prompt))

    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        """Nothing, and no memory is known."""
        return 0

    def fits(self, settings: Sequence[Setting], prompt: Prompt) -> bool:
        """There is always memory."""
        return True

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """Equal tokens or not."""
        return "identical" if tuple(plain) == tuple(other) else "mismatch"

    def forget(self) -> None:
        """Nothing."""


class MeasuredWhole:
    """A generation that comes whole, with the statistics of a sample."""

    def __init__(self, measure: Callable[[], Sample]) -> None:
        self._measure = measure

    def __iter__(self) -> Generator[list[int], None, None]:
        sample = self._measure()
        decoded = len(sample.tokens) - 1
        decoding = decoded / sample.speed if sample.speed else 0.0
        steps = max(1, sample.forwards) if sample.speed else 0
        drafting = sample.seconds_draft / max(1, steps)
        self.result = Generation(
            list(sample.tokens),
            RunStats(
                new_tokens=len(sample.tokens),
                seconds_prefill=sample.seconds - decoding,
                steps=[
                    StepStats(
                        proposed=sample.proposed if step == 0 else 0,
                        accepted=sample.accepted if step == 0 else 0,
                        emitted=decoded // steps + (step < decoded % steps),
                        seconds_target=decoding / steps - drafting,
                        seconds_draft=drafting,
                        seconds_rest=0.0,
                    )
                    for step in range(steps)
                ],
            ),
            "length",
        )
        yield list(sample.tokens)


class FakeMachine:
    """A machine on which work takes time by a fake clock.

    Args:
        pauses: When it stands still -> for how many seconds.
        slow: By the time: how many times as long work takes there.
        sees_processor_time: Whether processor time stands still in pauses and while
            others work; otherwise it passes as the clock does.

    Attributes:
        clock: Seconds.
    """

    SLICE = 0.005

    def __init__(
        self,
        pauses: Mapping[float, float] | None = None,
        slow: Callable[[float], float] = lambda now: 1.0,
        *,
        sees_processor_time: bool = True,
    ) -> None:
        self.clock = FakeClock()
        self._pauses = dict(pauses or {})
        self._slow, self._sees, self._worked = slow, sees_processor_time, 0.0

    def processor(self) -> float:
        """Seconds of processor time."""
        return self._worked if self._sees else self.clock.now

    def work(self, seconds: float) -> None:
        """Do what takes ``seconds`` on the quiet machine."""
        while seconds > 0:
            part = min(seconds, self.SLICE)
            seconds -= part
            self._worked += 2 * part  # on two threads
            self.clock.advance(part * self._slow(self.clock.now))
            for when in [when for when in self._pauses if when <= self.clock.now]:
                self.clock.advance(self._pauses.pop(when))


class FakeStep(NamedTuple):
    """A step: tokens that it emits, rows of its tree, seconds of drafting."""

    emitted: int
    rows: int = 1
    drafting: float = 0.0


class FakeGeneration:
    """A generation on a fake machine.

    Args:
        prefill: Seconds.
        steps: What its steps do.
        forward: Seconds of a forward by its rows.
    """

    def __init__(
        self,
        machine: FakeMachine,
        prefill: float,
        steps: Sequence[FakeStep],
        forward: Callable[[int], float],
    ) -> None:
        self._machine, self._prefill = machine, prefill
        self._plan, self._forward = steps, forward
        self._stats, self._tokens = RunStats(prompt_tokens=8), list[int]()

    def __iter__(self) -> Generator[list[int], None, None]:
        self._stats.seconds_prefill = self._taken(self._prefill)
        yield self._emit(1)
        for step in self._plan:
            drafting = self._taken(step.drafting)
            target = self._taken(self._forward(step.rows))
            self._stats.steps.append(
                StepStats(
                    proposed=step.rows - 1,
                    accepted=step.emitted - 1,
                    emitted=step.emitted,
                    seconds_target=target,
                    seconds_draft=drafting,
                    seconds_rest=0.0,
                    rows=step.rows,
                )
            )
            yield self._emit(step.emitted)

    @property
    def result(self) -> Generation:
        """What was generated so far."""
        return Generation(list(self._tokens), self._stats, "length")

    def _taken(self, seconds: float) -> float:
        started = self._machine.clock.now
        self._machine.work(seconds)
        return self._machine.clock.now - started

    def _emit(self, count: int) -> list[int]:
        tokens = [len(self._tokens) + i for i in range(count)]
        self._tokens += tokens
        self._stats.new_tokens = len(self._tokens)
        return tokens
