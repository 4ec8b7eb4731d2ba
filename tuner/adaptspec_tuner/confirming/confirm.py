"""Confirms finalists on held-out prompts, step by step in turns with plain decoding."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError, stopped_by_user
from adaptspec.profile import ANSWER, Measurement
from adaptspec_tuner.confirming.explained import Doubt, doubtful
from adaptspec_tuner.measuring.disturbances import (
    TimedRun,
    Undisturbed,
    undisturbed,
)
from adaptspec_tuner.measuring.in_turns import SharedAnswer, Timed, decode_in_turns
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    MeasuresAhead,
    Sample,
    Setting,
    TurnMeasurer,
    in_a_line,
    sample_of,
    sample_of_whole,
    spread,
)

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation
    from adaptspec.workloads import Prompt

PLAIN_KEY = PLAIN_SETTING.key


@dataclass(frozen=True)
class Confirmed:
    """One setting on the held-out prompts.

    Args:
        samples: Prompt id -> one per repeat, without what the machine held up.
        ratios: Prompt id -> how much better than plain decoding in the objective, of
            each repeat; plain decoding took turns with it.
        held_up: Of its steps and prefills, how many the machine held up.
    """

    setting: Setting
    measurement: Measurement
    lossless: bool
    samples: Mapping[str, Sequence[Sample]]
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    held_up: int = 0


@dataclass
class _Turn:
    """One prompt decoded once by every setting.

    Args:
        runs: Setting key -> its generation.
        answer: What they wrote together; None if each wrote its own.
        cleared: Setting key -> its generation without disturbances, once known.
        samples: Setting key -> what that took.
        held_up: Setting key -> how many of its pieces the machine held up.
    """

    prompt: Prompt
    runs: Mapping[str, Timed]
    answer: SharedAnswer | None
    cleared: dict[str, Generation] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    held_up: dict[str, int] = field(default_factory=dict)

    def ratio(self, key: str, objective: str) -> float:
        """How much better a setting was than plain decoding; positive."""
        # A generation that ended at once has no speed; of 0 there is no logarithm.
        return max(self.samples[key].gain(self.samples[PLAIN_KEY], objective), 1e-6)


def confirm(
    measurer: TurnMeasurer,
    finalists: Sequence[Setting],
    prompts: Sequence[Prompt],
    *,
    repeats: int,
    in_time: Callable[[float, int], bool],
    warn: Callable[[str], None],
    objective: str = ANSWER,
    clock: Callable[[], float] = time.monotonic,
    processor: Callable[[], float] | None = None,
    expected: float = 0.0,
    seed: int = 0,
) -> dict[str, Confirmed]:
    """What was found by setting key; plain decoding comes first.

    On each prompt plain decoding and the settings take turns step by step, in an order
    that is shuffled anew; held to one answer if they decode greedily. One prompt is
    decoded at least. A setting that fails is dropped with a warning; so is a prompt
    that can't be decoded plainly. Prompts on which plain decoding ends with its first
    token tell nothing. What the machine held up is replaced by what is typical, and
    told. A prompt with a ratio that forwards and tokens don't explain is decoded once
    more; the new ratios count.

    Args:
        prompts: Of one class.
        in_time: Whether another prompt may begin, given the seconds that the longest
            so far took with all settings, and how many were finished.
        clock: Seconds.
        processor: Seconds of processor time of this process; without it, that it stood
            still isn't seen.
        expected: Seconds that a prompt will take, before one was seen.
        seed: Of the order of turns.
    """
    turns = _Turns(measurer, finalists, warn, clock, processor or clock, seed)
    turns.warm_up(prompts)
    longest, count = expected, 0

    def decode(prompt: Prompt, repeat: int) -> bool:
        """False where there is no time left."""
        nonlocal longest, count
        if count and not in_time(longest, count):
            return False
        count += 1
        started = clock()
        turns.decode(prompt, repeat)
        taken = clock() - started
        longest = taken if count == 1 else max(longest, taken)
        return True

    def fitting(left: Sequence[Prompt]) -> Sequence[Prompt]:
        """Those that there is time for; all of what is measured already."""
        if isinstance(measurer, MeasuresAhead) and measurer.keeps:
            return left
        most = 0
        while most < len(left) and (
            count + most == 0 or in_time((most + 1) * longest, count + most)
        ):
            most += 1
        return left[:most]

    for repeat in range(repeats):
        # Or repeats would measure drafts copied from the same prompt's last answer.
        measurer.forget()
        left = [p for p in prompts if p.id not in turns.failed]
        ahead = fitting(left)
        started = clock()
        # Later repeats are known to fit.
        may_begin = functools.partial(in_time, 0.0, count) if not count else _always
        if turns.measured_ahead(ahead, may_begin):
            longest = max(longest, (clock() - started) / len(ahead))
            for prompt in ahead:
                turns.decode(prompt, repeat)
            count += len(ahead)
            left = left[len(ahead) :]
        for prompt in left:
            if not decode(prompt, repeat):
                break
    cleared = turns.clear()
    doubts = _doubts(turns, cleared, objective)
    again = [p for p in prompts if any(doubt.prompt == p.id for doubt in doubts)]
    if again:
        measurer.forget()
        renewed = {p.id for p in again if decode(p, repeats)}
        turns.renew(renewed)
        cleared = turns.clear()
        for doubt in _doubts(turns, cleared, objective):
            how = "measured twice" if doubt.prompt in renewed else "no time to repeat"
            warn(f"{doubt}; {how}")
    turns.tell(cleared, prompts)
    return _found(turns, prompts, objective)


def _always() -> bool:
    return True


class _Turns:
    """Decodes prompts with all settings, and keeps what came of it.

    Attributes:
        settings: Those that didn't fail, plain decoding first.
        failed: Ids of prompts that can't be decoded plainly.
        kept: The prompts decoded so far.
    """

    def __init__(
        self,
        measurer: TurnMeasurer,
        finalists: Sequence[Setting],
        warn: Callable[[str], None],
        clock: Callable[[], float],
        processor: Callable[[], float],
        seed: int,
    ) -> None:
        self.measurer, self.warn = measurer, warn
        self.settings = [PLAIN_SETTING, *finalists]
        self.failed: set[str] = set()
        self.kept: list[_Turn] = []
        self.memory: dict[str, int] = {}
        self._clock, self._processor, self._seed = clock, processor, seed
        self._numbers: Iterator[int] = itertools.count()
        self._together = True

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Load and compile what a first generation does, and see what memory it takes.

        Settings that don't pass are dropped.
        """
        for setting in list(self.settings):
            try:
                self.memory[setting.key] = self.measurer.warm_up(setting, prompts)
            # A third party's strategy may raise anything, and so may a model.
            except Exception as error:
                if stopped_by_user(error):
                    raise
                if setting != PLAIN_SETTING:  # else each prompt will tell
                    self._drop(setting, error)

    def measured_ahead(
        self, prompts: Sequence[Prompt], in_time: Callable[[], bool]
    ) -> bool:
        """Whether the settings were measured on ``prompts``, each of which is decoded
        next, at once. Those that there was no time for are dropped.

        Args:
            in_time: Whether another setting may begin.
        """
        if not (prompts and isinstance(self.measurer, MeasuresAhead)):
            return False
        asked = [(setting, prompts) for setting in self.settings[1:]]
        ahead = self.measurer.measure_ahead(asked, in_time)
        if ahead is None:
            return False
        keys = {setting.key for setting in ahead}
        for setting in [s for s, _ in asked if s.key not in keys]:
            self._drop(setting, AdaptSpecError("there was no time to confirm it"))
        return True

    def decode(self, prompt: Prompt, repeat: int) -> None:
        """Decode a prompt once with every setting."""
        order = list(self.settings)
        random.Random(f"{self._seed} {repeat} {prompt.id}").shuffle(order)
        together = self._together and self.measurer.fits(order, prompt)
        turn = self._decoded(prompt, repeat, order, together)
        short = [one.error for one in turn.runs.values() if _no_memory(one.error)]
        if short and together:
            turn = self._decoded(prompt, repeat, order, together=False)
            if not any(_no_memory(one.error) for one in turn.runs.values()):
                together = False
        if self._together and not together:
            self._together = False
            self.warn(
                f"{prompt.prompt_class}: memory is short, so settings decode a prompt "
                "one after the other, not step by step in turns"
            )
        errors = {key: one.error for key, one in turn.runs.items() if one.error}
        if (error := errors.get(PLAIN_KEY)) is not None:
            self.failed.add(prompt.id)
            self.warn(f"prompt {prompt.id!r} is left out: {in_a_line(error)}")
            return
        for setting in [s for s in self.settings if s.key in errors]:
            self._drop(setting, errors[setting.key])
        self.kept.append(turn)

    def renew(self, prompts: set[str]) -> None:
        """Of these prompts only the last time counts."""
        last = {turn.prompt.id: turn for turn in self.kept}
        self.kept = [
            turn
            for turn in self.kept
            if turn.prompt.id not in prompts or turn is last[turn.prompt.id]
        ]

    def clear(self) -> Undisturbed:
        """Work out what everything took without disturbances."""
        runs: list[TimedRun] = []
        where: list[tuple[_Turn, str]] = []
        for turn in self.kept:
            for key, one in turn.runs.items():
                if one.error is None:
                    name = turn.prompt.id
                    runs.append(
                        TimedRun(key, name, one.result, one.pieces, not one.whole)
                    )
                    where.append((turn, key))
        cleared = undisturbed(runs)
        for (turn, key), generation, held_up in zip(
            where, cleared.generations, cleared.held_up, strict=True
        ):
            turn.cleared[key] = generation
            of = sample_of_whole if turn.runs[key].whole else sample_of
            memory = self.memory.get(key, 0)
            turn.samples[key] = replace(of(generation), peak_memory=memory)
            turn.held_up[key] = held_up
        return cleared

    def tell(self, cleared: Undisturbed, prompts: Sequence[Prompt]) -> None:
        """Say how much the machine held up."""
        count = sum(cleared.held_up)
        if count and prompts:
            steps = sum(len(one.pieces) for t in self.kept for one in t.runs.values())
            self.warn(
                f"{prompts[0].prompt_class}: the machine held up {count} of {steps} "
                f"steps, by {sum(cleared.lost):.1f} s in all; they count as long as "
                "steps of their size take"
            )

    def _decoded(
        self, prompt: Prompt, repeat: int, order: Sequence[Setting], together: bool
    ) -> _Turn:
        answer = SharedAnswer() if self.measurer.greedy else None
        begin = {
            setting.key: functools.partial(
                self.measurer.begin,
                setting,
                prompt,
                None if answer is None else answer.follow(setting.key),
                repeat,
            )
            for setting in order
        }
        runs = decode_in_turns(
            begin,
            together=together,
            needed=PLAIN_KEY,
            numbers=self._numbers,
            clock=self._clock,
            processor=self._processor,
        )
        return _Turn(prompt, runs, answer)

    def _drop(self, setting: Setting, error: Exception) -> None:
        self.warn(f"{setting.strategy} dropped: {in_a_line(error)}")
        self.settings = [s for s in self.settings if s.key != setting.key]


def _found(
    turns: _Turns, prompts: Sequence[Prompt], objective: str
) -> dict[str, Confirmed]:
    """What is known of each setting that didn't fail."""
    by_prompt: dict[str, list[_Turn]] = {}
    for turn in turns.kept:
        by_prompt.setdefault(turn.prompt.id, []).append(turn)
    # A generation that ended at once tells nothing.
    told = {
        p.id: found
        for p in prompts
        if (found := by_prompt.get(p.id)) and found[0].samples[PLAIN_KEY].speed
    }
    if not told:
        return {}
    confirmed = {}
    for setting in turns.settings:
        key = setting.key
        try:
            agreed = [
                _worst([_agreement(turns.measurer, turn, setting) for turn in found])
                for found in told.values()
            ]
        # A forward tells near ties, for which there may be no memory left.
        except Exception as error:
            if setting == PLAIN_SETTING or stopped_by_user(error):
                raise
            turns.warn(f"{setting.strategy} dropped: {in_a_line(error)}")
            continue
        lossless = setting.baseline or "mismatch" not in agreed
        if not lossless:
            turns.warn(
                f"NOT LOSSLESS: {setting.strategy} {dict(setting.params)} changed "
                f"{agreed.count('mismatch')} of {len(agreed)} outputs; never selected"
            )
        samples = {
            p: [turn.samples[key] for turn in found] for p, found in told.items()
        }
        ratios = {
            p: [turn.ratio(key, objective) for turn in found]
            for p, found in told.items()
        }
        measurement = _measurement(samples, ratios, agreed, objective, turns.measurer)
        held_up = sum(turn.held_up[key] for found in told.values() for turn in found)
        confirmed[key] = Confirmed(
            setting, measurement, lossless, samples, ratios, held_up
        )
    return confirmed


def _agreement(measurer: TurnMeasurer, turn: _Turn, setting: Setting) -> Agreement:
    """How a setting's choices compare with plain decoding's after the same text."""
    plain = turn.samples[PLAIN_KEY].tokens
    found = [measurer.agreement(turn.prompt, plain, turn.samples[setting.key].tokens)]
    if turn.answer is not None and not setting.baseline:
        for place, one, other in turn.answer.differences(PLAIN_KEY, setting.key):
            if place < len(plain):
                before = plain[:place]
                found.append(
                    measurer.agreement(turn.prompt, [*before, one], [*before, other])
                )
    return _worst(found)


def _doubts(turns: _Turns, cleared: Undisturbed, objective: str) -> list[Doubt]:
    """Ratios of prompts that their tokens and forwards don't explain."""
    found = []
    compared = [s for s in turns.settings if s != PLAIN_SETTING and not s.baseline]
    prompts = dict.fromkeys(turn.prompt.id for turn in turns.kept)
    for prompt, setting in itertools.product(prompts, compared):
        repeats = [
            (turn.cleared[setting.key], turn.cleared[PLAIN_KEY])
            for turn in turns.kept
            if turn.prompt.id == prompt
        ]
        doubt = doubtful(prompt, setting.strategy, repeats, cleared, objective)
        if doubt is not None:
            found.append(doubt)
    return found


def _no_memory(error: Exception | None) -> bool:
    return error is not None and (
        isinstance(error, MemoryError) or "memory" in str(error).lower()
    )


def as_record(confirmed: Mapping[str, Confirmed]) -> dict[str, Any]:
    """Speeds and ratios by prompt and acceptance by position, for the report.

    ``prompts``: prompt id -> setting key -> tokens/s per repeat; ``ratios``: the same
    of ratios to plain decoding in the objective; ``positions``: setting key ->
    ``[accepted, offered]`` by depth from 1.
    """
    prompts: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, list[float]]] = {}
    positions: dict[str, list[list[int]]] = {}
    for key, found in confirmed.items():
        summed: list[list[int]] = []
        for prompt, runs in found.samples.items():
            prompts.setdefault(prompt, {})[key] = [run.speed for run in runs]
            ratios.setdefault(prompt, {})[key] = list(found.ratios.get(prompt, ()))
            for run in runs:
                for depth, (accepted, offered) in enumerate(run.positions):
                    if depth == len(summed):
                        summed.append([0, 0])
                    summed[depth][0] += accepted
                    summed[depth][1] += offered
        positions[key] = summed
    return {"prompts": prompts, "ratios": ratios, "positions": positions}


def _measurement(
    samples: Mapping[str, Sequence[Sample]],
    ratios: Mapping[str, Sequence[float]],
    agreed: Sequence[Agreement],
    objective: str,
    measurer: TurnMeasurer,
) -> Measurement:
    speeds = [median(run.speed for run in runs) for runs in samples.values()]
    firsts = [median(run.seconds_to_first for run in runs) for runs in samples.values()]
    every = [run for runs in samples.values() for run in runs]
    tokens = sum(len(run.tokens) for run in every)
    forwards = sum(run.forwards for run in every)
    proposed = sum(run.proposed for run in every)
    latencies = [run.latency_p95 for run in every if run.latency_p95]
    low, middle, high = spread(speeds)
    # It is decided on for all classes together, with an interval.
    typical = [median(repeats) for repeats in ratios.values()]
    ratio_low, _, ratio_high = spread(typical)
    return Measurement(
        tokens_per_second=middle,
        tokens_per_second_low=low,
        tokens_per_second_high=high,
        ratio=geometric_mean(typical),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        # The first token of each generation is the prefill's.
        tokens_per_forward=(tokens - len(every)) / forwards if forwards else 0.0,
        acceptance=sum(r.accepted for r in every) / proposed if proposed else 0.0,
        prompts=len(samples),
        tokens=tokens,
        identical=agreed.count("identical"),
        near_ties=agreed.count("near_tie"),
        seconds_target=sum(run.seconds_target for run in every),
        seconds_draft=sum(run.seconds_draft for run in every),
        seconds_rest=sum(run.seconds_rest for run in every),
        latency_p95=median(latencies) if latencies else None,
        peak_memory=max((run.peak_memory for run in every), default=0) or None,
        objective=objective,
        seconds_to_first=median(firsts) if any(firsts) else None,
        controls=dict(measurer.controls),
    )


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    kinds: tuple[Agreement, ...] = ("mismatch", "near_tie", "not_compared")
    return next((kind for kind in kinds if kind in agreements), "identical")
