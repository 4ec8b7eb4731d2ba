"""Ratios on a machine that pauses, is loaded and drifts are those of a quiet one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import pytest

from adaptspec_tuner.measuring.disturbances import (
    TimedRun,
    Undisturbed,
    kind_of,
    undisturbed,
)
from adaptspec_tuner.measuring.in_turns import decode_in_turns
from tuner_fakes import FakeGeneration, FakeMachine, FakeStep

PREFILL = 0.3
TOKENS = 64
PROMPTS = 4
# Setting -> sizes of its trees, seconds of drafting, times plain decoding's prefill.
SETTINGS: Mapping[str, tuple[Sequence[int], float, float]] = {
    "plain": ((1,), 0.0, 1.0),
    "lookup": ((1, 2, 3, 5, 9), 0.0003, 1.0),
    "hybrid": ((1, 4, 8, 12, 16, 24, 33), 0.002, 1.3),
    "draft": ((5,), 0.02, 1.1),
}


def forward(rows: int) -> float:
    return 0.03 * (1 + (rows - 1) / 16)


def plans(prompt: int) -> dict[str, list[FakeStep]]:
    """What each setting's steps are; the same whatever the machine does."""
    drawn = random.Random(prompt)
    rate = drawn.uniform(0.3, 0.8)
    found: dict[str, list[FakeStep]] = {}
    for name, (sizes, drafting, _) in SETTINGS.items():
        found[name], left = [], TOKENS - 1
        while left:
            rows, emitted = drawn.choice(sizes), 1
            while emitted < min(rows, left) and drawn.random() < rate:
                emitted += 1
            seconds = drafting * drawn.uniform(0.7, 1.4)
            # A hybrid asks a draft model now and then: no disturbance.
            rare = name == "hybrid" and drawn.random() < 0.04
            found[name].append(FakeStep(emitted, rows, 0.12 if rare else seconds))
            left -= emitted
    return found


def decoded(
    machine: FakeMachine, *, together: bool = True, noise: float = 0.0
) -> list[TimedRun]:
    """All settings on all prompts, in turns."""
    drawn, numbers = random.Random(5), itertools.count()
    runs = []
    for prompt in range(PROMPTS):
        order = list(SETTINGS)
        drawn.shuffle(order)
        plan = plans(prompt)

        def noisy(rows: int) -> float:
            return forward(rows) * math.exp(drawn.gauss(0, noise))

        def beginning(
            name: str, steps: Sequence[FakeStep], seconds: Callable[[int], float]
        ) -> Callable[[], FakeGeneration]:
            prefill = PREFILL * SETTINGS[name][2]
            return lambda: FakeGeneration(machine, prefill, steps, seconds)

        done = decode_in_turns(
            {name: beginning(name, plan[name], noisy) for name in order},
            together=together,
            numbers=numbers,
            clock=machine.clock,
            processor=machine.processor,
        )
        runs += [
            TimedRun(name, f"{prompt}", one.result, one.pieces)
            for name, one in done.items()
        ]
    return runs


def ratios(runs: Sequence[TimedRun], found: Undisturbed | None) -> dict[str, float]:
    """Of each setting to plain decoding in time per answer, geometric mean."""
    seconds: dict[str, list[float]] = {}
    generations = [r.generation for r in runs] if found is None else found.generations
    for run, generation in zip(runs, generations, strict=True):
        stats = generation.stats
        taken = stats.seconds_prefill + stats.seconds_decode
        seconds.setdefault(run.name, []).append(math.log(taken))
    plain = seconds.pop("plain")
    return {
        name: math.exp(fmean(plain) - fmean(each)) for name, each in seconds.items()
    }


def errors(
    machine: FakeMachine, *, cleared: bool = True, together: bool = True
) -> list[float]:
    quiet = ratios(decoded(FakeMachine()), None)
    runs = decoded(machine, together=together)
    found = ratios(runs, undisturbed(runs) if cleared else None)
    return [abs(found[name] / quiet[name] - 1) for name in quiet]


LENGTH = 24.0  # seconds that the quiet machine takes, about


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pauses_of_two_seconds_leave_ratios_within_a_percent(
    seed: int, seen: bool
) -> None:
    drawn = random.Random(seed)
    pauses = {drawn.uniform(0, LENGTH): 2.0 for _ in range(3)}
    machine = FakeMachine(pauses, sees_processor_time=seen)
    assert max(errors(machine)) < 0.01
    machine = FakeMachine(pauses, sees_processor_time=seen)
    assert max(errors(machine, cleared=False)) > 0.03


@pytest.mark.parametrize("seed", range(6))
def test_a_load_that_doubles_all_times_for_a_third_leaves_ratios_within_five_percent(
    seed: int,
) -> None:
    begin = random.Random(seed).uniform(0, LENGTH * 2 / 3)

    def slow(now: float) -> float:
        return 2.0 if begin < now < begin + 2 * LENGTH / 3 else 1.0

    assert max(errors(FakeMachine(slow=slow))) < 0.05


def test_without_turns_the_same_load_spoils_them() -> None:
    def slow(now: float) -> float:
        return 2.0 if now < 2 * LENGTH / 3 else 1.0

    assert max(errors(FakeMachine(slow=slow), together=False)) > 0.05


@pytest.mark.parametrize("end", [0.5, 2.0, 3.0])
def test_drift_leaves_ratios_within_three_percent(end: float) -> None:
    machine = FakeMachine(slow=lambda now: 1 + (end - 1) * min(1.0, now / LENGTH))
    assert max(errors(machine)) < 0.03


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("slow", [1.0, 4.0])
def test_a_steady_machine_holds_nothing_up_however_uneven_its_forwards(
    noise: float, slow: float
) -> None:
    """Neither the rare long drafting of one setting, nor a load of all."""
    runs = decoded(FakeMachine(slow=lambda now: slow), noise=noise)
    found = undisturbed(runs)
    assert sum(found.held_up) == 0
    assert [run.generation for run in runs] == list(found.generations)


def test_what_was_held_up_is_counted_and_so_are_its_seconds() -> None:
    found = undisturbed(decoded(FakeMachine({5.0: 2.0, 12.0: 2.0})))
    assert sum(found.held_up) == 2
    assert max(found.held_up) == 1
    assert sum(found.lost) == pytest.approx(4.0, rel=0.01)


def test_forwards_of_each_size_are_known_and_never_fall() -> None:
    found = undisturbed(decoded(FakeMachine(), noise=0.03))
    seconds = list(found.forwards.values())
    assert seconds == sorted(seconds)
    assert found.forward(1) == pytest.approx(forward(1), rel=0.03)
    assert found.forward(24) == pytest.approx(forward(24), rel=0.1)
    assert found.forward(1000) is None
    assert [kind_of(rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]


def test_a_gpu_on_which_no_processor_time_passes_is_not_held_up() -> None:
    runs = [
        TimedRun(
            run.name,
            run.prompt,
            run.generation,
            [piece._replace(processor=0.0) for piece in run.pieces],
        )
        for run in decoded(FakeMachine())
    ]
    assert sum(undisturbed(runs).held_up) == 0


def test_another_engines_run_is_freed_of_a_standstill() -> None:
    machine = FakeMachine({0.5: 2.0})
    plan = [FakeStep(10, 1)]
    runs = []
    for prompt in range(3):
        done = decode_in_turns(
            {"theirs": lambda: FakeGeneration(machine, 0.0, plan, lambda rows: 0.8)},
            clock=machine.clock,
            processor=machine.processor,
        )["theirs"]
        whole = [piece for piece in done.pieces if piece.seconds > 0]
        runs.append(TimedRun("theirs", f"{prompt}", done.result, whole, in_steps=False))
    took = [run.generation.stats.seconds_decode for run in runs]
    assert took == pytest.approx([2.8, 0.8, 0.8])
    found = undisturbed(runs)
    took = [generation.stats.seconds_decode for generation in found.generations]
    assert took == pytest.approx([0.8] * 3)
    assert found.held_up == [1, 0, 0]


def test_a_pause_while_a_prompt_is_read_is_seen_without_processor_time() -> None:
    quiet = decoded(FakeMachine())
    machine = FakeMachine({0.7: 2.0}, sees_processor_time=False)
    runs = decoded(machine)
    held = [at for at, one in enumerate(undisturbed(runs).held_up) if one]
    (at,) = [
        at for at, run in enumerate(runs) if run.generation.stats.seconds_prefill > 2.0
    ]
    assert held == [at]
    cleared = undisturbed(runs).generations[at].stats.seconds_prefill
    expected = quiet[at].generation.stats.seconds_prefill
    assert cleared == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("seen", [True, False])
def test_five_times_the_load_for_a_while_holds_up_few_and_spoils_nothing(
    seen: bool,
) -> None:
    """Only steps at its ends are unlike those around them."""

    def slow(now: float) -> float:
        return 5.0 if 8.0 < now < 28.0 else 1.0

    runs = decoded(FakeMachine(slow=slow, sees_processor_time=seen))
    assert sum(undisturbed(runs).held_up) <= 8
    assert max(errors(FakeMachine(slow=slow, sees_processor_time=seen))) < 0.1
