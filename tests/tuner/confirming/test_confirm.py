"""Confirmation: intervals, what is compared with what, when it stops, what is kept."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import AdaptSpecError
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.confirming.confirm import as_record, confirm
from adaptspec_tuner.measuring.bootstrap import interval, overall
from adaptspec_tuner.measuring.peak_memory import PeakMemory
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Sample, Setting
from adaptspec_tuner.reporting.result import ClassResult, break_even
from adaptspec_tuner.time_spent import Spending
from tuner_fakes import FakeMeasurer

PROMPTS = [Prompt(str(i), "chat", text="x") for i in range(4)]
FAST = Setting("fast")
positive = st.floats(0.1, 10)
tables = st.lists(st.lists(positive, min_size=1, max_size=3), min_size=2, max_size=6)


def test_the_ratio_is_the_geometric_mean_of_the_prompts_medians() -> None:
    assert overall([[2.0], [8.0]]) == pytest.approx(4.0)
    assert overall([[1.0, 9.0, 2.0]]) == pytest.approx(2.0)


@given(tables)
def test_an_interval_lies_within_what_was_seen_whatever_the_order(
    table: list[list[float]],
) -> None:
    low, high = interval(table)
    seen = [value for repeats in table for value in repeats]
    assert min(seen) * 0.999 <= low <= high <= max(seen) * 1.001
    assert interval([repeats[::-1] for repeats in reversed(table)]) == (low, high)


@given(tables, st.floats(0.2, 5))
def test_faster_by_a_factor_moves_the_interval_by_it(
    table: list[list[float]], factor: float
) -> None:
    scaled = interval([[value * factor for value in repeats] for repeats in table])
    for found, one in zip(scaled, interval(table), strict=True):
        assert found == pytest.approx(one * factor)


def test_two_prompts_are_the_ends_and_one_tells_nothing() -> None:
    assert interval([[0.9], [1.7]]) == pytest.approx((0.9, 1.7))
    assert interval([[1.5, 1.6]]) == (0.0, math.inf)


def test_of_three_prompts_it_is_what_all_drawings_give() -> None:
    """Twenty-seven drawings, enumerated: the quantiles of their means."""
    ratios = [1.0, 2.0, 8.0]
    means = sorted(
        math.exp(sum(map(math.log, drawn)) / 3)
        for drawn in itertools.product(ratios, repeat=3)
    )
    low, high = interval([[r] for r in ratios])
    # 1/27 > 2.5%: the ends are the drawings of one prompt three times.
    assert (low, high) == pytest.approx((means[0], means[-1]))


def test_of_many_prompts_it_is_the_normal_interval_of_their_mean() -> None:
    random_ = random.Random(1)
    logs = [random_.gauss(0.3, 0.2) for _ in range(200)]
    mean = sum(logs) / 200
    spread = (sum((x - mean) ** 2 for x in logs) / 200) ** 0.5 / 200**0.5
    low, high = interval([[math.exp(x)] for x in logs])
    normal = NormalDist(mean, spread)
    assert math.log(low) == pytest.approx(normal.inv_cdf(0.025), abs=0.004)
    assert math.log(high) == pytest.approx(normal.inv_cdf(0.975), abs=0.004)


class Scripted(FakeMeasurer):
    """Speeds by setting and prompt, no time to the first token.

    A second passes with each generation, whatever is said of it.
    """

    def __init__(self, speed: Callable[[Setting, Prompt], float]) -> None:
        self.clock = FakeClock()
        self.speed = speed
        self.order: list[tuple[str, str]] = []

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        self.clock.advance(1.0)
        self.order.append((setting.strategy, prompt.id))
        speed = self.speed(setting, prompt)
        return Sample((1, 2, 3), speed, 2 / speed, forwards=2)

    def warm_up(self, setting: Setting, prompts: Sequence[Prompt]) -> int:
        return 103

    def forget(self) -> None:
        self.order.append(("forget", ""))


def doubled(setting: Setting, prompt: Prompt) -> float:
    plain = 10.0 * (1 + int(prompt.id))
    return plain if setting.strategy == PLAIN else plain * (2.0 + int(prompt.id))


def test_ratios_are_paired_by_prompt_and_carry_their_interval() -> None:
    found = confirm(
        Scripted(doubled),
        [FAST],
        PROMPTS,
        repeats=2,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
    )
    assert list(found) == [PLAIN_SETTING.key, FAST.key]
    fast = found[FAST.key].measurement
    assert fast.ratio == pytest.approx((2 * 3 * 4 * 5) ** 0.25)
    assert fast.interval_low is not None
    assert fast.interval_high is not None
    assert 2 < fast.interval_low < fast.ratio < fast.interval_high < 5
    assert fast.peak_memory == 103
    plain = found[PLAIN_SETTING.key].measurement
    assert (plain.interval_low, plain.interval_high) == pytest.approx((1.0, 1.0))


def test_plain_decoding_stands_at_no_place_by_rule_and_repeats_start_afresh() -> None:
    scripted = Scripted(doubled)
    others = [Setting(name) for name in ("fast", "slow")]
    confirm(
        scripted,
        others,
        PROMPTS,
        repeats=10,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
    )
    text = [name for name, _ in scripted.order]
    repeats = " ".join(text).split("forget")[1:]
    assert len(repeats) == 10
    turns = [name for name in text if name != "forget"]
    places = [turns[at : at + 3].index(PLAIN) for at in range(0, len(turns), 3)]
    assert all(8 <= places.count(place) <= 20 for place in range(3))


@pytest.mark.parametrize(("budget", "prompts"), [(0, 1), (3.9, 1), (4, 2), (100, 4)])
def test_a_prompt_that_would_end_too_late_is_not_begun(
    budget: float, prompts: int
) -> None:
    scripted = Scripted(doubled)
    found = confirm(
        scripted,
        [FAST],
        PROMPTS,
        repeats=1,
        in_time=lambda seconds, prompts: scripted.clock.now + seconds <= budget,
        warn=pytest.fail,
        clock=scripted.clock,
    )
    assert found[FAST.key].measurement.prompts == prompts


def test_the_record_has_speeds_and_ratios_by_prompt() -> None:
    found = confirm(
        Scripted(doubled),
        [FAST],
        PROMPTS[:2],
        repeats=2,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
    )
    record = as_record(found)
    prompts, ratios = record["prompts"]["1"], record["ratios"]["1"]
    assert prompts[PLAIN_SETTING.key] == pytest.approx([20.0, 20.0])
    assert prompts[FAST.key] == pytest.approx([60.0, 60.0])
    assert ratios[FAST.key] == pytest.approx([3.0, 3.0])


def test_what_was_spent_adds_up_over_runs_and_a_kill_loses_one_part() -> None:
    store, clock = MemoryStore(), FakeClock(10.0)
    first = Spending(store, "r", clock, started=7.0)
    first.begin("plain")
    clock.advance(5)
    first.begin("trials")
    clock.advance(100)  # killed here
    second = Spending(store, "r", clock, clock.now)
    clock.advance(2)
    second.begin("trials")
    clock.advance(4)
    second.end()
    parts = {"loading": 5.0, "plain": 5.0, "trials": 4.0}
    assert second.parts == parts
    assert store.record("r", "spent") == {"seconds": 14.0, "parts": parts}


def test_tuning_is_repaid_by_the_time_that_the_classes_save() -> None:
    from dataclasses import replace

    from adaptspec.selector import select
    from adaptspec.testing.stores import example_profile

    def measured(strategy: str, speed: float, ratio: float) -> ClassResult:
        base = replace(example_profile().measurement, objective="speed")
        plain = replace(base, tokens_per_second=10.0, ratio=1.0)
        fast = replace(
            base, tokens_per_second=speed, ratio=ratio, interval_low=ratio * 0.99
        )
        profiles = (
            example_profile(strategy=PLAIN, measurement=plain),
            example_profile(strategy=strategy, measurement=fast),
        )
        choice = select(profiles, profiles[0].environment, "chat")
        return ClassResult("chat", choice, profiles)

    faster, slower = measured("a", 20.0, 2.0), measured("a", 5.0, 0.5)
    # 50 ms saved on each token.
    assert break_even(60.0, [faster]) == pytest.approx(1200)
    assert break_even(60.0, [faster, slower]) == pytest.approx(2400)
    assert break_even(60.0, [slower]) is None


PEAK = """
import mmap, torch
from adaptspec_tuner.measuring.peak_memory import PeakMemory
peak = PeakMemory(torch.device("cpu"))
peak.reset()
before = peak.bytes()
block = mmap.mmap(-1, 64 * 2**20)
block.write(b"x" * (64 * 2**20))
high = peak.bytes()
block.close()
peak.reset()
print(before, high, peak.bytes())
"""


@pytest.mark.slow
def test_the_peak_of_memory_is_counted_from_the_reset() -> None:
    """In a process of its own: others' freed memory would be taken again unseen."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    )
    before, high, after = map(int, ran.stdout.split())
    if not before:
        pytest.skip("this system doesn't reset its count of peak memory")
    assert high - before >= 48 * 2**20
    assert after <= high - 32 * 2**20


@pytest.mark.parametrize(
    ("setting", "reads"),
    [
        (PLAIN_SETTING, False),
        (Setting("prompt_lookup"), False),
        (Setting("medusa"), True),
        (Setting("hybrid"), True),
        (Setting("hf_generate", baseline=True), False),
    ],
)
def test_attached_heads_count_as_memory_of_what_reads_them_alone(
    setting: Setting, reads: bool
) -> None:
    from adaptspec.decoding.engine import Engine
    from adaptspec.heads.protocol import bytes_of
    from adaptspec.host import Host
    from adaptspec.testing.fakes import tiny_model
    from adaptspec.testing.heads import attach_tiny_heads
    from adaptspec_tuner.measuring.profiler import Profiler

    model = tiny_model("llama")
    profiler = Profiler(Engine(model), Host.installed(), 4)
    assert profiler._unused(setting) == 0
    heads = attach_tiny_heads(model, heads=2).heads["medusa"]
    # Two heads: a block of 32 x 32 with its bias and an output of 64 x 32, float32.
    size = 2 * 4 * (32 * 32 + 32 + 64 * 32)
    assert bytes_of(heads) == size
    assert profiler._unused(setting) == (0 if reads else size)


def test_a_search_that_the_model_stores_doesnt_keep_it_from_being_measured() -> None:
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.testing.fakes import hf_greedy, tiny_model, tiny_tokenizer
    from adaptspec_tuner.measuring.profiler import Profiler

    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    prompt = Prompt("p", "chat", text="w3 w4 w5 w3")
    expected = hf_greedy(model, model.encode(prompt.content), 4)
    stored: Any = model.generation_config
    stored.update(num_beams=4, max_time=1e-9, eos_token_id=999)
    profiler = Profiler(Engine(model), Host.installed(), 4)
    assert list(profiler.measure(PLAIN_SETTING, prompt).tokens) == expected


def test_a_setting_that_takes_too_much_memory_is_refused_with_both_figures() -> None:
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.testing.fakes import tiny_model
    from adaptspec_tuner.measuring.profiler import Profiler

    model = tiny_model("llama")
    peak = PeakMemory(model.device)
    peak.reset()
    if not peak.bytes():
        pytest.skip("this system doesn't reset its count of peak memory")
    profiler = Profiler(Engine(model), Host.installed(), 4, max_memory=2**20)
    profiler._ids["0"] = [1, 2, 3]
    with pytest.raises(AdaptSpecError, match=r"takes \d.* GiB.*--max-memory is 0.00"):
        profiler.measure(PLAIN_SETTING, PROMPTS[0])
