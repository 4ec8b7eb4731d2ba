"""Confirmation on machines that pause and are loaded, short of memory, or doubtful."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from adaptspec.errors import AdaptSpecError
from adaptspec.params import Scalar
from adaptspec.profile import ANSWER, LATENCY, PLAIN, SPEED, Measurement
from adaptspec.testing.stores import example_profile
from adaptspec.workloads import Prompt
from adaptspec_tuner.confirming.confirm import Confirmed, confirm
from adaptspec_tuner.measuring.in_turns import Generating
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Sample,
    Setting,
)
from adaptspec_tuner.reporting.result import Row
from adaptspec_tuner.reporting.sentences import identical
from tuner_fakes import FakeGeneration, FakeMachine, FakeMeasurer, FakeStep

PROMPTS = [Prompt(str(i), "chat", text="x") for i in range(3)]
FAST, BIG = Setting("fast"), Setting("big")
STEPS = {
    PLAIN: [FakeStep(1)] * 48,
    "fast": [FakeStep(2, 4, 0.001)] * 24,
    "big": [FakeStep(3, 17, 0.004)] * 16,
}


def forward(rows: int) -> float:
    return 0.03 * (1 + (rows - 1) / 16)


class OnMachine(FakeMeasurer):
    """Decodes on a fake machine; prompts take 0.2 s to read."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.begun: list[tuple[str, str, int]] = []

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        self.begun.append((setting.strategy, prompt.id, repeat))
        return FakeGeneration(self.machine, 0.2, STEPS[setting.strategy], forward)


def confirmed(
    measurer: OnMachine, warn: Callable[[str], None] = pytest.fail, **more: Any
) -> dict[str, Confirmed]:
    arguments: dict[str, Any] = {"repeats": 1, "in_time": lambda seconds, count: True}
    return confirm(
        measurer,
        [FAST, BIG],
        PROMPTS,
        warn=warn,
        clock=measurer.machine.clock,
        processor=measurer.machine.processor,
        **{**arguments, **more},
    )


# 0.2 s and 48, 24, 16 steps.
SECONDS = {
    PLAIN: 0.2 + 48 * forward(1),
    "fast": 0.2 + 24 * (forward(4) + 0.001),
    "big": 0.2 + 16 * (forward(17) + 0.004),
}


def test_a_ratio_is_of_the_whole_answer_prefill_and_drafting_included() -> None:
    found = confirmed(OnMachine(FakeMachine()))
    for setting in (FAST, BIG):
        expected = SECONDS[PLAIN] / SECONDS[setting.strategy]
        told = found[setting.key]
        assert told.measurement.ratio == pytest.approx(expected)
        assert told.measurement.objective == ANSWER
        assert told.measurement.seconds_to_first == pytest.approx(0.2)
        assert set(told.ratios) == {"0", "1", "2"}
        for ratios in told.ratios.values():
            assert ratios == pytest.approx([expected])
    speeds = confirmed(OnMachine(FakeMachine()), objective=SPEED)
    assert speeds[FAST.key].measurement.ratio == pytest.approx(
        48 * forward(1) / (24 * (forward(4) + 0.001))
    )
    latency = confirmed(OnMachine(FakeMachine()), objective=LATENCY)
    assert latency[BIG.key].measurement.ratio == pytest.approx(
        forward(1) / ((forward(17) + 0.004) / 3)
    )


def test_a_pause_in_plain_decoding_makes_nothing_faster_and_is_said() -> None:
    """It stands still for two seconds in a plain step of the second prompt."""
    told: list[str] = []
    whole = sum(SECONDS.values())
    machine = FakeMachine({whole + 2.0: 2.0, whole + 6.0: 2.0})
    found = confirmed(OnMachine(machine), told.append)
    for setting in (FAST, BIG):
        expected = SECONDS[PLAIN] / SECONDS[setting.strategy]
        assert found[setting.key].measurement.ratio == pytest.approx(expected, rel=0.01)
    steps = 3 * (3 + 48 + 24 + 16)
    assert told == [
        f"chat: the machine held up 2 of {steps} steps, by 4.0 s in all; they count as "
        "long as steps of their size take"
    ]
    assert sum(one.held_up for one in found.values()) == 2


def test_a_load_for_a_part_of_the_time_falls_on_all_alike() -> None:
    machine = FakeMachine(slow=lambda now: 2.0 if 3.0 < now < 7.0 else 1.0)
    found = confirmed(OnMachine(machine))
    for setting in (FAST, BIG):
        expected = SECONDS[PLAIN] / SECONDS[setting.strategy]
        assert found[setting.key].measurement.ratio == pytest.approx(expected, rel=0.05)


class Crowded(OnMachine):
    """There is memory for one generation at a time."""

    def __init__(self, machine: FakeMachine, known: bool, most: int = 1) -> None:
        super().__init__(machine)
        self.known, self.most = known, most
        self.open = self.highest = 0

    def fits(self, settings: Sequence[Setting], prompt: Prompt) -> bool:
        return not self.known

    def begin(self, *arguments: Any, **more: Any) -> Generating:
        return Holding(super().begin(*arguments, **more), self)


class Holding:
    def __init__(self, inner: Generating, of: Crowded) -> None:
        self._inner, self._of = inner, of

    def __iter__(self) -> Any:
        of = self._of
        if of.open >= of.most:
            raise RuntimeError("can't allocate memory")
        of.open += 1
        of.highest = max(of.open, of.highest)
        try:
            yield from self._inner
        finally:
            of.open -= 1

    @property
    def result(self) -> Any:
        return self._inner.result


@pytest.mark.parametrize("known", [True, False])
def test_where_memory_is_short_settings_decode_one_after_the_other(known: bool) -> None:
    told: list[str] = []
    measurer = Crowded(FakeMachine(), known)
    found = confirmed(measurer, told.append)
    assert told == [
        "chat: memory is short, so settings decode a prompt one after the other, not "
        "step by step in turns"
    ]
    assert measurer.highest == 1
    assert len(found) == 3
    for setting in (FAST, BIG):
        expected = SECONDS[PLAIN] / SECONDS[setting.strategy]
        assert found[setting.key].measurement.ratio == pytest.approx(expected)
        assert len(found[setting.key].samples) == 3


def test_where_there_is_no_memory_for_one_the_prompt_is_left_out() -> None:
    told: list[str] = []
    measurer = Crowded(FakeMachine(), known=False, most=0)
    assert confirmed(measurer, told.append) == {}
    assert told == [
        f"prompt {i!r} is left out: RuntimeError: can't allocate memory" for i in "012"
    ]


class Moody(OnMachine):
    """Plain decoding of prompt 1 is slow in its first ``times``, for no reason."""

    def __init__(self, times: int) -> None:
        super().__init__(FakeMachine())
        self.times = times

    def begin(self, setting: Setting, prompt: Prompt, *more: Any) -> Generating:
        plain = setting == PLAIN_SETTING and prompt.id == "1"
        slow = plain and self.times > 0
        self.times -= plain
        made = super().begin(setting, prompt, *more)
        assert isinstance(made, FakeGeneration)
        if slow:
            made._forward = lambda rows: 2.5 * forward(rows)
        return made


def test_a_ratio_that_nothing_explains_is_measured_once_more() -> None:
    measurer = Moody(times=1)
    found = confirmed(measurer)
    assert [p for name, p, _ in measurer.begun if name == PLAIN] == ["0", "1", "2", "1"]
    for setting in (FAST, BIG):
        expected = SECONDS[PLAIN] / SECONDS[setting.strategy]
        assert found[setting.key].measurement.ratio == pytest.approx(expected)
        assert len(found[setting.key].samples["1"]) == 1


@pytest.mark.parametrize("in_time", [True, False])
def test_a_ratio_that_stays_unexplained_is_told(in_time: bool) -> None:
    told: list[str] = []
    confirmed(
        Moody(times=2),
        told.append,
        in_time=lambda seconds, count: in_time or count < 3,
    )
    assert len(told) == 2
    how = "measured twice" if in_time else "no time to repeat"
    slow = (0.2 + 48 * 2.5 * forward(1)) / SECONDS["fast"]
    usual = SECONDS[PLAIN] / SECONDS["fast"]
    assert told[0] == (
        f"prompt '1': fast had {slow:.2f}x plain decoding, but its 2.00 tokens per "
        f"forward explain {usual:.2f}x; {how}"
    )


class Sampled(OnMachine):
    """Decodes at a temperature; another text with each setting."""

    controls: Mapping[str, Scalar | None] = {"temperature": 0.7, "top_p": 0.9}
    greedy = False

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        return "not_compared"

    def begin(self, *arguments: Any) -> Generating:
        follow = arguments[2]
        assert follow is None
        return super().begin(*arguments)


def test_sampled_outputs_are_not_compared_and_each_repeat_has_a_seed() -> None:
    measurer = Sampled(FakeMachine())
    found = confirmed(measurer, repeats=2)
    assert {repeat for _, _, repeat in measurer.begun} == {0, 1}
    fast = found[FAST.key]
    assert fast.lossless
    assert (fast.measurement.identical, fast.measurement.near_ties) == (0, 0)
    assert fast.measurement.measured_how == "measured at temperature 0.7 with top_p 0.9"
    profile = example_profile(measurement=fast.measurement)
    assert identical(Row(profile, winner=False)) == "sampled"
    greedy = confirmed(OnMachine(FakeMachine()))[FAST.key].measurement
    assert greedy.measured_how == "measured greedily"


def test_answers_of_other_lengths_are_compared_over_as_many_tokens() -> None:
    plain = Sample(tuple(range(11)), 10.0, 1.5, seconds_to_first=0.5)
    short = Sample(tuple(range(6)), 20.0, 0.65, seconds_to_first=0.4)
    assert short.gain(plain, ANSWER) == pytest.approx(1.5 / (0.4 + 10 / 20))
    assert short.gain(plain, SPEED) == pytest.approx(2.0)
    assert plain.gain(plain, ANSWER) == 1.0


class Wrong(OnMachine):
    """One setting would choose another token at one place; what that is, is given."""

    def __init__(self, kind: Agreement) -> None:
        super().__init__(FakeMachine())
        self.kind = kind

    def begin(
        self,
        setting: Setting,
        prompt: Prompt,
        follow: Callable[[int, int], int] | None = None,
        repeat: int = 0,
    ) -> Generating:
        assert follow is not None
        for place in range(49):
            odd = setting == FAST and place == 7 and prompt.id == "0"
            follow(place, 999 if odd else place)
        return super().begin(setting, prompt, follow, repeat)

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        if list(plain) == list(other):
            return "identical"
        assert (len(plain), len(other)) == (8, 8)
        assert sorted([plain[7], other[7]]) == [7, 999]
        assert list(plain[:7]) == list(other[:7]) == list(range(7))
        return self.kind


def test_what_a_setting_would_have_chosen_is_compared_though_it_followed() -> None:
    found = confirmed(Wrong("near_tie"))
    fast = found[FAST.key]
    assert fast.lossless
    assert (fast.measurement.identical, fast.measurement.near_ties) == (2, 1)
    assert found[BIG.key].measurement.identical == 3
    told: list[str] = []
    found = confirmed(Wrong("mismatch"), told.append)
    assert not found[FAST.key].lossless
    assert found[BIG.key].lossless
    assert told == ["NOT LOSSLESS: fast {} changed 1 of 3 outputs; never selected"]


class Greedy(OnMachine):
    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        if setting == BIG:
            raise AdaptSpecError("big takes 9 GiB, --max-memory is 1 GiB")
        return 77


def test_who_takes_too_much_memory_when_alone_is_dropped() -> None:
    told: list[str] = []
    found = confirmed(Greedy(FakeMachine()), told.append)
    assert set(found) == {PLAIN_SETTING.key, FAST.key}
    assert told == ["big dropped: big takes 9 GiB, --max-memory is 1 GiB"]
    assert found[FAST.key].measurement.peak_memory == 77


def test_older_measurements_are_of_greedy_decoding_speed() -> None:
    older: Measurement = example_profile().measurement
    assert older.seconds_to_first is None
    assert older.measured_how == "measured greedily"
    assert math.isfinite(older.ratio)
