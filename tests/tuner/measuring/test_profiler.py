"""Confirming on real (tiny) models: one answer, sampling, memory, other engines."""

from __future__ import annotations

from typing import Any

import pytest

from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError, UnsupportedControlError
from adaptspec.host import Host
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import hf_greedy, noisy_draft, tiny_model, tiny_tokenizer
from adaptspec.workloads import Prompt
from adaptspec_tuner.confirming.confirm import Confirmed, confirm
from adaptspec_tuner.measuring import cache_memory
from adaptspec_tuner.measuring.cache_memory import bytes_of_row, free_bytes
from adaptspec_tuner.measuring.other_programs import OtherPrograms
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Setting

PROMPTS = [
    Prompt(f"p{i}", "chat", f"w{i} w3 w4 w3 w4", max_new_tokens=12) for i in range(2, 5)
]
SETTINGS = [
    Setting(name) for name in ("prompt_lookup", "token_recycling", "draft_model")
]


@pytest.fixture
def engine() -> Engine:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    return Engine(model, noisy_draft(model))


def confirmed(
    profiler: Profiler, settings: list[Setting] = SETTINGS, **more: Any
) -> dict[str, Confirmed]:
    told: list[str] = []
    arguments: dict[str, Any] = {"repeats": 2, "warn": told.append, **more}
    return confirm(
        profiler,
        settings,
        PROMPTS,
        in_time=lambda seconds, count: True,
        **arguments,
    )


@pytest.mark.slow
def test_all_settings_write_what_the_model_itself_generates(
    engine: Engine, host: Host
) -> None:
    profiler = Profiler(engine, host, 12)
    found = confirmed(profiler)
    assert set(found) == {setting.key for setting in [PLAIN_SETTING, *SETTINGS]}
    for one in found.values():
        m = one.measurement
        assert one.lossless
        assert (m.prompts, m.identical, m.near_ties) == (3, 3, 0)
        assert m.seconds_to_first is not None
        assert m.seconds_to_first > 0
        assert not m.controls
        for prompt in PROMPTS:
            expected = hf_greedy(engine.model, list(profiler.ids(prompt)), 12)
            for sample in one.samples[prompt.id]:
                assert list(sample.tokens) == expected
                assert 0 < sample.seconds_to_first < sample.seconds
    drafted = found[Setting("draft_model").key].measurement
    assert drafted.tokens_per_forward > 1


def sampled(profiler: Profiler, repeat: int) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        run = profiler.begin(PLAIN_SETTING, prompt, None, repeat)
        found.append([token for tokens in run for token in tokens])
    return found


@pytest.mark.slow
def test_under_a_temperature_repeats_have_seeds_and_controls_are_kept(
    engine: Engine, host: Host
) -> None:
    controls = {"temperature": 1.0, "top_p": 0.95}
    profiler = Profiler(engine, host, 12, controls=controls, seed=3)
    assert sampled(profiler, 0) != sampled(profiler, 1)
    other = Profiler(engine, host, 12, controls=controls, seed=3)
    assert sampled(profiler, 0) == sampled(other, 0)
    for one in confirmed(profiler).values():
        assert one.measurement.controls == controls
        assert one.lossless
        if one.setting.strategy != "draft_model":
            # Deterministic proposals draw what plain decoding draws with that seed.
            assert one.measurement.identical == 3


def test_sampled_outputs_that_differ_are_not_compared(
    engine: Engine, host: Host
) -> None:
    profiler = Profiler(engine, host, 12, controls={"temperature": 1.0})
    assert profiler.agreement(PROMPTS[0], [1, 2], [1, 3]) == "not_compared"
    assert profiler.agreement(PROMPTS[0], [1, 2], [1, 2]) == "identical"


def test_a_control_that_cannot_be_honoured_is_refused_at_once(
    engine: Engine, host: Host
) -> None:
    with pytest.raises(UnsupportedControlError, match="num_beams"):
        Profiler(engine, host, 12, controls={"num_beams": 4})


def test_what_a_cached_token_takes_is_that_of_all_layers(engine: Engine) -> None:
    config: Any = engine.model.config
    heads = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    expected = 2 * config.num_hidden_layers * heads * size * 4
    assert bytes_of_row(engine.model) == expected
    assert free_bytes(engine.model.device) > expected


def test_settings_do_not_take_turns_where_their_caches_do_not_fit(
    engine: Engine, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = Profiler(engine, host, 12)
    rows = len(profiler.ids(PROMPTS[0])) + 12
    # Four caches of the target and one of the draft model.
    needed = 5 * rows * bytes_of_row(engine.model)
    everyone = [PLAIN_SETTING, *SETTINGS]
    monkeypatch.setattr(cache_memory, "free_bytes", lambda device: needed + 1)
    assert profiler.fits(everyone, PROMPTS[0])
    monkeypatch.setattr(cache_memory, "free_bytes", lambda device: needed)
    assert not profiler.fits(everyone, PROMPTS[0])
    assert profiler.fits(everyone[:2], PROMPTS[0])
    told: list[str] = []
    found = confirmed(profiler, warn=told.append)
    assert len(found) == 4
    assert told[0].startswith("chat: memory is short")


def test_a_warm_up_teaches_nothing_and_refuses_what_takes_too_much(
    engine: Engine, host: Host
) -> None:
    profiler = Profiler(engine, host, 12)
    setting = Setting("token_recycling")
    before = profiler.measure(setting, PROMPTS[0]).forwards
    profiler.forget()
    taken = profiler.warm_up(setting, PROMPTS)
    assert profiler.measure(setting, PROMPTS[0]).forwards == before
    if not taken:
        pytest.skip("this system doesn't reset its count of peak memory")
    small = Profiler(engine, host, 12, max_memory=2**20)
    with pytest.raises(AdaptSpecError, match="--max-memory"):
        small.warm_up(setting, PROMPTS)


def test_another_engine_runs_whole_between_the_turns(
    engine: Engine, host: Host
) -> None:
    theirs = Setting("hf_generate", baseline=True)
    found = confirmed(Profiler(engine, host, 12), [SETTINGS[0], theirs])
    one = found[theirs.key]
    assert one.measurement.identical == 3
    assert one.measurement.latency_p95 is None
    assert one.measurement.tokens_per_forward == pytest.approx(1.0, abs=0.1)
    for samples in one.samples.values():
        for sample in samples:
            assert 0 < sample.seconds_to_first < sample.seconds
            assert sample.speed > 0


def test_the_share_of_other_programs_is_one_or_unknown() -> None:
    share = OtherPrograms().share()
    assert share is None or 0 <= share <= 1
    assert PLAIN == PLAIN_SETTING.strategy
