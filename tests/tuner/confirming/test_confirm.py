"""Confirmation: intervals, what is compared with what, when it stops, what is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from adaptspec.errors import AdaptSpecError
from adaptspec.profile import LATENCY, PLAIN
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.confirming.confirm import as_record, confirm
from adaptspec_tuner.measuring.peak_memory import PeakMemory
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Sample, Setting
from adaptspec_tuner.reporting.result import ClassResult, break_even
from adaptspec_tuner.time_spent import Spending
from tuner_fakes import FakeMeasurer

PROMPTS = [Prompt(str(i), "chat", text="x") for i in range(4)]
FAST = Setting("fast")
positive = st.floats(0.1, 10)
tables = st.lists(st.lists(positive, min_size=1, max_size=3), min_size=2, max_size=6)


class Scripted(FakeMeasurer):
    """Speeds by setting and prompt; each generation takes a second."""

    def __init__(self, speed: Callable[[Setting, Prompt], float]) -> None:
        self.clock = FakeClock()
        self.speed = speed
        self.order: list[tuple[str, str]] = []

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        self.clock.advance(1.0)
        self.order.append((setting.strategy, prompt.id))
        return Sample(
            (1, 2, 3),
            self.speed(setting, prompt),
            1.0,
            forwards=2,
            latency_p95=50.0 if setting.strategy == PLAIN else 40.0,
            positions=((3, 4), (1, 2)) if prompt.id == "0" else ((1, 1),),
            peak_memory=100 + int(prompt.id),
        )

    def forget(self) -> None:
        self.order.append(("forget", ""))


def doubled(setting: Setting, prompt: Prompt) -> float:
    plain = 10.0 * (1 + int(prompt.id))
    return plain if setting.strategy == PLAIN else plain * (2.0 + int(prompt.id))


def test_ratios_are_paired_by_prompt() -> None:
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
    # Which are decided on for all classes together.
    assert (fast.interval_low, fast.interval_high) == (None, None)
    assert found[FAST.key].ratios["0"] == pytest.approx([2.0, 2.0])
    assert (fast.latency_p95, fast.peak_memory) == (40.0, 103)
    assert found[PLAIN_SETTING.key].measurement.ratio == pytest.approx(1.0)


def test_for_latency_the_ratio_is_that_of_the_latencies() -> None:
    found = confirm(
        Scripted(doubled),
        [FAST],
        PROMPTS,
        repeats=1,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
        objective=LATENCY,
    )
    assert found[FAST.key].measurement.ratio == pytest.approx(1.25)
    assert found[FAST.key].measurement.objective == LATENCY


def test_settings_take_turns_in_changing_order_and_start_each_repeat_afresh() -> None:
    scripted = Scripted(doubled)
    confirm(
        scripted,
        [FAST],
        PROMPTS[:2],
        repeats=2,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
    )
    once = [(PLAIN, "0"), ("fast", "0"), ("fast", "1"), (PLAIN, "1")]
    assert scripted.order == [("forget", ""), *once, ("forget", ""), *once]


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


def test_the_record_has_speeds_by_prompt_and_acceptance_by_position() -> None:
    found = confirm(
        Scripted(doubled),
        [FAST],
        PROMPTS[:2],
        repeats=2,
        in_time=lambda seconds, prompts: True,
        warn=pytest.fail,
    )
    record = as_record(found)
    assert record["prompts"]["1"] == {
        PLAIN_SETTING.key: [20.0, 20.0],
        FAST.key: [60.0, 60.0],
    }
    assert record["positions"][FAST.key] == [[8, 10], [2, 4]]


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
    from adaptspec_profiles.older import choices_of

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
        choice = select(choices_of(profiles), profiles[0].environment, "chat")
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
