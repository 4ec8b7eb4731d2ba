"""Replay against the real engine: the same steps without the target's forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import adaptspec_plugins
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.heads.attached import MedusaTrained
from adaptspec.host import Host
from adaptspec.model.forward import Forward
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import union
from adaptspec.testing.fakes import FakeClock, noisy_draft, random_ids, tiny_model
from adaptspec.testing.heads import tiny_heads
from adaptspec.token_tree import TokenTree
from adaptspec.workloads import Prompt
from adaptspec_tuner.measuring.profiler import (
    Recording,
    Sample,
    Setting,
    sample_of,
    typical,
)
from adaptspec_tuner.replaying.draft import RememberedDraft
from adaptspec_tuner.replaying.presearch import presearch
from adaptspec_tuner.replaying.reading import read
from adaptspec_tuner.replaying.replayer import Replayer
from adaptspec_tuner.replaying.target import RecordedCache, RecordedTarget
from adaptspec_tuner.replaying.virtual_clock import VirtualClock

NEW = 40
FLAT = ForwardCosts((0, 1000), (1, 100), ((1.0, 1.0), (1.0, 1.0)))
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("autoregressive", {}),
    ("prompt_lookup", {"draft_length": 6, "min_ngram": 1, "branches": 3}),
    ("suffix", {}),
    ("draft_model", {"draft_length": 3}),
    ("draft_model", {"draft_length": 5, "stop": 0.4}),
    ("draft_tree", {}),
]
HOST = Host({"bundled": adaptspec_plugins})


def recorded(model: LanguageModel, seed: int = 0) -> Recording:
    """Plain decoding of a prompt that repeats itself."""
    ids = random_ids(8, seed) * 3
    done = Engine(model).generate(HOST.create("autoregressive", {}), ids, controls())
    return Recording(ids, done.token_ids, NEW)


def controls(most: int = NEW, **changes: Any) -> Controls:
    return Controls(max_new_tokens=most, temperature=0.0, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize(("name", "params"), SETTINGS)
def test_it_takes_the_steps_of_a_real_run(
    architecture: str, name: str, params: dict[str, Any]
) -> None:
    model = tiny_model(architecture)
    draft = noisy_draft(model)
    strategy = HOST.strategy(name)
    if reason := strategy.unavailable(model, draft):
        pytest.skip(reason)
    recording = recorded(model)
    clock = VirtualClock()
    target = RecordedTarget(model, FLAT, clock)
    target.play(recording)
    replay = Engine(target, draft, clock).generate(
        HOST.create(name, params), recording.prompt, controls()
    )
    real = Engine(model, draft).generate(
        HOST.create(name, params), recording.prompt, controls()
    )
    assert replay.token_ids == real.token_ids == list(recording.tokens)
    assert replay.finish == real.finish
    assert [(s.proposed, s.accepted, s.emitted) for s in replay.stats.steps] == [
        (s.proposed, s.accepted, s.emitted) for s in real.stats.steps
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "params"), [s for s in SETTINGS if s[0].startswith("draft")]
)
def test_a_remembered_draft_takes_the_steps_of_a_real_one_and_runs_once(
    architecture: str, name: str, params: dict[str, Any]
) -> None:
    model = tiny_model(architecture)
    draft = noisy_draft(model)
    recording = recorded(model)
    clock = VirtualClock()
    target = RecordedTarget(model, FLAT, clock)
    target.play(recording)
    costs = ForwardCosts((0, 1000), (1, 16), ((0.25, 0.25), (0.25, 0.25)))
    remembered = RememberedDraft(draft, costs, clock)
    real = Engine(model, draft).generate(
        HOST.create(name, params), recording.prompt, controls()
    )
    forwards = []
    for _ in range(2):
        replay = Engine(target, remembered, clock).generate(
            HOST.create(name, params), recording.prompt, controls()
        )
        forwards.append(remembered.forwards)
        assert [(s.proposed, s.accepted, s.emitted) for s in replay.stats.steps] == [
            (s.proposed, s.accepted, s.emitted) for s in real.stats.steps
        ]
        # Each step drafts with one forward of a quarter of a second at least.
        assert replay.stats.seconds_draft >= 0.25 * (len(replay.stats.steps) - 1)
    assert forwards[0] == forwards[1] > 0


def test_strategies_that_read_more_than_tokens_do_not_claim_to_replay() -> None:
    claimed = {name for name, cls in HOST.strategies.items() if cls.replays}
    assert claimed == {
        *("prompt_lookup", "suffix", "draft_model", "draft_tree", "universal_draft"),
        *("medusa", "medusa_typical", "token_recycling", "hybrid"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("tree", ["calibrated", "dynamic", "chain"])
def test_heads_see_the_states_of_a_real_run_and_the_target_reads_once(
    architecture: str, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    recording = recorded(model)
    text = [*recording.prompt, *recording.tokens]
    heads = tiny_heads(model, "fitted", texts=[text])
    model.attach(MedusaTrained(model, heads))
    params: dict[str, Any] = {"tree": tree, "draft_length": 6}
    real = Engine(model).generate(
        HOST.create("medusa", params), recording.prompt, controls()
    )
    reads = count_reads(model, monkeypatch)
    replayer = Replayer(Engine(model), HOST, FLAT, {"p": recording})
    setting = Setting("medusa", params)
    for _ in range(2):
        sample = replayer.measure(setting, Prompt("p", text=""))
    assert sample.tokens == tuple(real.token_ids)
    assert (sample.forwards, sample.proposed, sample.accepted) == (
        len(real.stats.steps),
        sum(step.proposed for step in real.stats.steps),
        sum(step.accepted for step in real.stats.steps),
    )
    assert sample.accepted > 0
    assert len(reads) == 1


def count_reads(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an item with every forward of ``model``."""
    reads: list[int] = []
    forward: Any = model.model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        reads.append(len(reads))
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", counted)
    return reads


def test_strategies_of_different_needs_share_one_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    recording = recorded(model)
    text = [*recording.prompt, *recording.tokens]
    model.attach(MedusaTrained(model, tiny_heads(model, "fitted", texts=[text])))
    names = ["medusa", "token_recycling", "hybrid"]
    observes = union([HOST.create(name, {}).observes(model) for name in names])
    alone = [
        Replayer(Engine(model), HOST, FLAT, {"p": recording}, tops=8).measure(
            Setting(name), Prompt("p", text="")
        )
        for name in names
    ]
    reads = count_reads(model, monkeypatch)
    shared = Replayer(Engine(model), HOST, FLAT, {"p": recording}, None, 8, observes)
    together = [shared.measure(Setting(name), Prompt("p", text="")) for name in names]
    assert [(s.tokens, s.accepted) for s in together] == [
        (s.tokens, s.accepted) for s in alone
    ]
    assert all(s.accepted for s in together)
    assert len(reads) == 1


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_logits_are_the_targets_after_committed_tokens_and_of_no_others(
    architecture: str,
) -> None:
    model = tiny_model(architecture)
    recording = recorded(model)
    text = [*recording.prompt, *recording.tokens]
    target = RecordedTarget(model, FLAT, VirtualClock())
    target.play(recording, read(model, recording, prompt_positions=3, tops=5))
    cache = target.new_cache()
    prefilled = target.prefill(recording.prompt, cache, last=2)
    count = len(recording.prompt)
    expected = {node: node + 1 for node in (count - 2, count - 1)}
    check_distributions(model, prefilled, text, expected)
    right, wrong = text[count + 1], (text[count + 1] + 1) % model.vocab_size
    tree = TokenTree([text[count], right, wrong, 0], [-1, 0, 0, 2])
    forward = target.forward_tree(tree, cache)
    check_distributions(model, forward, text, {0: count + 1, 1: count + 2})
    assert [forward.best[forward.rows[node]] for node in (0, 1)] == [
        right,
        text[count + 2],
    ]


def check_distributions(
    model: LanguageModel, forward: Forward, text: list[int], lengths: dict[int, int]
) -> None:
    """By node the length of the text that its logits continue; there are no others."""
    assert set(forward.rows) == set(lengths)
    for node, length in lengths.items():
        with torch.no_grad():
            logits = model.source(torch.tensor([text[:length]])).logits[0, -1]
        highest, found = logits.topk(5), forward.logits[forward.rows[node]]
        assert found.topk(5).indices.tolist() == highest.indices.tolist()
        torch.testing.assert_close(
            found.topk(5).values, highest.values, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", ["token_recycling", "hybrid"])
def test_drafters_that_read_logits_decode_the_recorded_answer(name: str) -> None:
    model = tiny_model("llama")
    recording = recorded(model)
    replayer = Replayer(
        Engine(model, noisy_draft(model)), HOST, FLAT, {"p": recording}, tops=8
    )
    sample = replayer.measure(Setting(name), Prompt("p", text=""))
    assert sample.tokens == tuple(recording.tokens)
    assert sample.accepted > 0


def test_time_is_the_cost_models_by_tokens_and_context() -> None:
    model = tiny_model("llama")
    recording = recorded(model)
    costs = ForwardCosts((0, 128), (1, 11), ((10.0, 20.0), (20.0, 30.0)))
    replayer = Replayer(Engine(model), HOST, costs, {"p": recording})
    prompt = Prompt("p", text="")
    plain = replayer.measure(Setting("autoregressive"), prompt)
    assert plain.seconds_target == pytest.approx(10.0 * (NEW - 1), rel=0.25)
    wide = replayer.measure(
        Setting("prompt_lookup", {"draft_length": 10, "branches": 1}), prompt
    )
    most = 20.0 * wide.forwards
    assert 10.0 * wide.forwards < wide.seconds_target <= most * 1.02
    assert wide.tokens == plain.tokens
    # Behind 128 cached tokens every forward takes ten seconds more.
    far = Recording([3] * 129, recording.tokens, NEW)
    deep = Replayer(Engine(model), HOST, costs, {"p": far})
    assert deep.measure(Setting("autoregressive"), prompt).seconds_target == (
        pytest.approx(20.0 * (NEW - 1), rel=0.15)
    )


def test_the_target_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    recording = recorded(model)
    replayer = Replayer(Engine(model), HOST, FLAT, {"p": recording})

    def run(*arguments: object, **named: object) -> None:
        raise AssertionError("a forward of the target")

    monkeypatch.setattr(model.model, "forward", run)
    sample = replayer.measure(Setting("suffix"), Prompt("p", text=""))
    assert list(sample.tokens) == list(recording.tokens)


def test_controls_that_move_the_argmax_are_in_the_record_already() -> None:
    """A model whose generation configuration penalises repetition."""
    model = tiny_model("llama")
    ids = random_ids(8) * 3
    chosen = controls(repetition_penalty=1.5)
    plain = Engine(model).generate(HOST.create("autoregressive", {}), ids, chosen)
    assert plain.token_ids != list(recorded(model).tokens)
    clock = VirtualClock()
    target = RecordedTarget(model, FLAT, clock)
    target.play(Recording(ids, plain.token_ids, NEW))
    replay = Engine(target, None, clock).generate(
        HOST.create("prompt_lookup", {}), ids, chosen
    )
    assert replay.token_ids == plain.token_ids


def test_an_answer_that_ended_early_ends_there_again() -> None:
    model = tiny_model("llama")
    recording = recorded(model)
    eos = recording.tokens[20]
    at = list(recording.tokens).index(eos)
    clock = VirtualClock()
    target = RecordedTarget(model, FLAT, clock)
    target.play(Recording(recording.prompt, recording.tokens[: at + 1], NEW))
    done = Engine(target, None, clock).generate(
        HOST.create("suffix", {}), recording.prompt, controls(eos_token_ids=(eos,))
    )
    assert done.finish == "eos"
    assert done.token_ids == list(recording.tokens[: at + 1])


@pytest.mark.slow
def test_a_presearch_finds_the_draft_length_that_the_hardware_pays_for() -> None:
    """A text that goes on for ever; rows are free, or from the fifth on dear."""
    model = tiny_model("llama")
    ids = random_ids(6) * 4
    recording = Recording(ids, [ids[i % 6] for i in range(NEW)], NEW)
    prompts = {"c": [Prompt("p", "c", text="")]}
    found = {}
    for kind, last in (("free", 1.0), ("dear", 400.0)):
        line = (1.0, 1.0, last)
        tried = presearch(
            Replayer(
                Engine(model),
                HOST,
                ForwardCosts((0, 1000), (1, 4, 101), (line, line)),
                {"p": recording},
            ),
            [HOST.strategy("prompt_lookup")],
            prompts,
            in_time=lambda: True,
            clock=lambda: 0.0,
            warn=lambda text: None,
            trials=80,
        )
        assert tried.trials > 10
        found[kind] = tried.ranked("c", "prompt_lookup")[0]
    assert int(found["free"].params["draft_length"]) > 8
    assert found["free"].detail["ratio"] > 8
    assert found["dear"].params["draft_length"] in (2, 3)
    assert 2.5 < found["dear"].detail["ratio"] <= 4


def test_its_logits_take_no_memory() -> None:
    model = tiny_model("llama")
    target = RecordedTarget(model, FLAT, VirtualClock())
    target.play(Recording([1], [2, 3], 2))
    logits = target.prefill([1], target.new_cache()).logits
    assert isinstance(logits, torch.Tensor)
    assert logits.untyped_storage().nbytes() <= 8


TIMED = ForwardCosts((0, 1000), (1, 11), ((1.0, 1.5), (1.0, 1.5)))


def repeating(**timed: Any) -> Recording:
    """A text that goes on for ever."""
    ids = random_ids(6) * 4
    return Recording(ids, [ids[i % 6] for i in range(NEW)], NEW, **timed)


def test_steps_take_what_plain_decodings_did_where_the_record_was_taken() -> None:
    """Forwards at twice the costs, and half a second of each step beside them."""
    model, prompt, steps = tiny_model("llama"), Prompt("p", text=""), NEW - 1
    recording = repeating(
        forwards=steps, seconds_target=2.0 * steps, seconds_rest=0.5 * steps
    )
    replayer = Replayer(Engine(model), HOST, TIMED, {"p": recording})
    plain = replayer.measure(Setting("autoregressive"), prompt)
    assert plain.speed == pytest.approx(1 / 2.5, rel=0.02)
    lookup = {"draft_length": 10, "branches": 1, "min_ngram": 1}
    wide = replayer.measure(Setting("prompt_lookup", lookup), prompt)
    # Eleven tokens a forward, but for the last, which has room for fewer.
    full = 2.0 * 1.5 + 0.5
    assert wide.forwards == 4
    assert 3 * full < wide.seconds_target < 4 * full * 1.01
    # The costs alone would promise a step 3 / 2 instead of 3.5 / 2.5 of plain's.
    bare = Replayer(Engine(model), HOST, TIMED, {"p": repeating()})
    promised = bare.measure(Setting("prompt_lookup", lookup), prompt).gain(
        bare.measure(Setting("autoregressive"), prompt)
    )
    assert wide.gain(plain) == pytest.approx(promised * 1.5 / 1.4, rel=0.02)


def test_a_prompt_that_the_machine_was_busy_with_does_not_move_the_others() -> None:
    steps = NEW - 1
    recordings = {
        name: repeating(forwards=steps, seconds_target=factor * steps, seconds_rest=0.0)
        for name, factor in (("a", 1.0), ("b", 1.0), ("c", 9.0))
    }
    replayer = Replayer(Engine(tiny_model("llama")), HOST, TIMED, recordings)
    sample = replayer.measure(Setting("autoregressive"), Prompt("c", text=""))
    assert sample.speed == pytest.approx(1.0, rel=0.02)


def test_a_draft_models_forwards_take_as_much_longer_as_the_targets() -> None:
    model, steps = tiny_model("llama"), NEW - 1
    draft, recording = noisy_draft(model), recorded(model)
    found = []
    for factor in (1.0, 3.0):
        timed = replace(
            recording, forwards=steps, seconds_target=factor * steps, seconds_rest=0.0
        )
        replayer = Replayer(
            Engine(model, draft), HOST, TIMED, {"p": timed}, draft_costs=FLAT
        )
        prompt = Prompt("p", text="")
        found.append(
            replayer.measure(Setting("draft_model", {"draft_length": 3}), prompt)
        )
    assert found[1].seconds_draft == pytest.approx(3 * found[0].seconds_draft, rel=0.05)


def test_keeping_a_branch_that_is_not_the_first_takes_the_time_of_moving_rows() -> None:
    clock = VirtualClock()
    cache = RecordedCache(clock, 5.0)
    cache.length = 10
    started = clock()
    cache.keep(4, [0, 1, 2])
    assert cache.length == 7
    assert clock() - started < 1
    cache.keep(4, [0, 2])
    assert cache.length == 6
    assert clock() - started == pytest.approx(5.0, abs=1)


def test_repeats_of_a_prompt_tell_by_the_time_that_is_typical() -> None:
    runs = [
        Sample((1, 2), 1.0, 1.0, forwards=1, seconds_target=seconds, seconds_rest=0.1)
        for seconds in (1.0, 7.0, 2.0)
    ]
    assert typical(runs).seconds_target == 2.0
    assert typical(runs).tokens == (1, 2)


@pytest.mark.parametrize("name", ["prompt_lookup", "suffix"])
def test_on_a_fake_clock_what_is_predicted_is_what_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards take 1.7 times the costs, and every look at the clock a fifth of a
    second, which falls on all parts of a step."""
    model, clock, prompt = tiny_model("llama"), FakeClock(), Prompt("p", text="")
    assert model.capability.level == "tree"  # probed before the clock runs
    real = LanguageModel.forward_tree

    def slow(self: LanguageModel, tree: Any, cache: Any, **named: Any) -> Any:
        clock.advance(1.7 * TIMED.curve(cache.length)(len(tree)))
        return real(self, tree, cache, **named)

    monkeypatch.setattr(LanguageModel, "forward_tree", slow)
    engine = Engine(model, clock=clock)
    bare = recorded(model)
    clock.tick = 0.2
    plain, drafted = (
        sample_of(engine.generate(HOST.create(one, {}), bare.prompt, controls()))
        for one in ("autoregressive", name)
    )
    assert plain.tokens == drafted.tokens
    timed = replace(
        bare,
        forwards=plain.forwards,
        seconds_target=plain.seconds_target,
        seconds_rest=plain.seconds_draft + plain.seconds_rest,
    )

    def predicted(recording: Recording) -> float:
        replayer = Replayer(Engine(model), HOST, TIMED, {"p": recording})
        told = replayer.measure(Setting(name, {}), prompt)
        assert told.forwards == drafted.forwards
        return told.gain(replayer.measure(Setting("autoregressive"), prompt))

    measured = drafted.gain(plain)
    assert predicted(timed) == pytest.approx(measured, rel=0.03)
    # Forwards alone promise less here: a wide one is dearer beside nothing else.
    assert predicted(bare) < 0.99 * measured
