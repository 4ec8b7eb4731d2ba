"""Threads are chosen by plain decoding, and all settings are measured with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from adaptspec.cli.progress import Progress
from adaptspec.engines.inference_engine import Answer, EngineOptions
from adaptspec.errors import EngineError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN, Environment
from adaptspec.testing.scripted_engine import (
    Machine,
    ScriptedEngine,
    copies_and_drafts,
    workload_of,
)
from adaptspec.workloads import Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.engines.threads import Threads, choose_threads, settle_threads
from adaptspec_tuner.engines.tune import tune_engine
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.tuning_run import Interrupted

PROMPTS = workload_of(["chat"], 2).prompts
TRUTH = copies_and_drafts({"chat": (0.8, 0.6)})


class Threaded(ScriptedEngine):
    """Its speed depends on its threads.

    Attributes:
        speeds: Threads -> seconds of a single token, and until the first token.
        broken: Threads with which it ends.
        longest: Characters of the longest prompt that it takes.
        used: What it was told, in order.
    """

    name = "threaded"
    speeds: Mapping[int, tuple[float, float]] = {}
    broken: Sequence[int] = ()
    longest = 100

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.threads = self.batch_threads = options.threads or min(self.speeds)
        self.used: list[tuple[int, int]] = []
        self.asked: list[tuple[str, int, int]] = []

    @property
    def environment(self) -> Environment:
        return replace(super().environment, threads=self.threads)

    @property
    def thread_counts(self) -> Sequence[int]:
        return () if self.options.threads else list(self.speeds)

    def use_threads(self, threads: int, batch_threads: int) -> None:
        self.threads, self.batch_threads = threads, batch_threads
        self.used.append((threads, batch_threads))

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        if self.threads in self.broken:
            raise EngineError(f"threaded: {self.threads} threads: out of memory")
        if any(len(str(prompt.content)) > self.longest for prompt in prompts):
            raise EngineError("threaded: 400: the prompt is longer than the context")
        self.asked.append((method, self.threads, self.batch_threads))
        single = self.threads if len(prompts) == 1 else self.batch_threads
        self.machine.token = self.speeds[single][0]
        first = self.speeds[self.batch_threads][1]
        self.machine.prefill = {"chat": first}
        return super().answer(method, params, prompts, max_new_tokens)


def threaded(
    speeds: Mapping[int, tuple[float, float]], broken: Sequence[int] = ()
) -> type[Threaded]:
    """A class of its own; the first of ``speeds`` is the engine's own number."""
    values = {"machine": Machine(TRUTH), "opened": [], "speeds": speeds}
    return type("Engine", (Threaded,), {**values, "broken": broken})


def opened(cls: type[Threaded], **options: int) -> Threaded:
    return cls(EngineOptions(engine="threaded", model="m", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({2: (0.1, 1.0), 4: (0.12, 0.6), 1: (0.15, 2.0)}, (2, 4)),
        ({2: (0.1, 1.0), 4: (0.08, 1.2)}, (4, 2)),
        # Less than a twentieth is what a machine's luck is.
        ({2: (0.1, 1.0), 4: (0.097, 0.97)}, (2, 2)),
        ({4: (0.2, 1.0), 2: (0.1, 0.5)}, (2, 2)),
    ],
)
def test_single_tokens_and_batches_have_their_own(
    speeds: Mapping[int, tuple[float, float]], chosen: tuple[int, int]
) -> None:
    engine = opened(threaded(speeds))
    assert choose_threads(engine, PROMPTS) == Threads(*chosen)
    assert engine.used[-1] == chosen
    assert {method for method, *_ in engine.asked} == {PLAIN}


def test_with_several_requests_all_forwards_are_batches() -> None:
    engine = opened(threaded({2: (0.1, 1.0), 4: (0.05, 0.9)}), concurrency=3)
    assert choose_threads(engine, PROMPTS, 3) == Threads(4, 4)
    assert {len(ids) for *_, ids in engine.log} == {3}


def test_a_number_that_fails_is_left_out_and_the_engines_own_must_work() -> None:
    speeds = {2: (0.1, 1.0), 4: (0.05, 0.5)}
    engine = opened(threaded(speeds, broken=[4]))
    assert choose_threads(engine, PROMPTS) == Threads(2, 2)
    with pytest.raises(EngineError, match="out of memory"):
        choose_threads(opened(threaded(speeds, broken=[2])), PROMPTS)


def test_nothing_is_tried_where_the_user_told_a_number() -> None:
    engine = opened(threaded({2: (0.1, 1.0), 4: (0.05, 0.5)}), threads=2)
    assert choose_threads(engine, PROMPTS) is None
    assert not engine.asked
    assert not engine.used


def test_prompts_that_are_too_long_leave_the_shorter_ones_to_try_threads_on() -> None:
    cls = threaded({2: (0.1, 0.5), 4: (0.05, 0.4)})
    known = workload_of(["chat"], 16)
    long = [replace(p, text=f"{p.text} {'more ' * 40}") for p in known.prompts[4:]]
    workload = replace(known, prompts=(*known.prompts[:4], *long))
    options = TuneOptions(300.0, engine="threaded")
    engine, progress = opened(cls), Progress(None, cls.machine.clock)
    found = settle_threads(engine, workload, MemoryStore(), options, progress)
    assert found == {"threads": 4, "batch_threads": 4}
    cls.longest = 1  # no prompt is short enough
    with pytest.raises(EngineError, match="longer than the context"):
        settle_threads(opened(cls), workload, MemoryStore(), options, progress)


def test_no_shorter_prompt_is_tried_where_the_length_is_not_the_reason() -> None:
    cls = threaded({2: (0.1, 0.5), 4: (0.05, 0.4)}, broken=[2])
    engine, progress = opened(cls), Progress(None, cls.machine.clock)
    options = TuneOptions(300.0, engine="threaded")
    with pytest.raises(EngineError, match="out of memory"):
        settle_threads(
            engine, workload_of(["chat"], 16), MemoryStore(), options, progress
        )
    assert engine.used == [(2, 2)]


def test_a_tune_measures_with_what_it_chose_and_a_continued_one_keeps_it() -> None:
    cls = threaded({2: (0.1, 0.5), 4: (0.05, 0.4)})
    store = MemoryStore()

    def tune() -> tuple[Threaded, object]:
        plugin = SimpleNamespace(register_engines=hookimpl(lambda: [cls]))
        result = tune_engine(
            *("m.gguf", None, workload_of(["chat"], 8)),
            TuneOptions(300.0, engine="threaded"),
            db=store,
            host=Host({"fakes": plugin}),
            clock=cls.machine.clock,
        )
        assert result.usage is not None
        assert (result.usage.threads, result.usage.batch_threads) == (4, 4)
        assert result.environment.threads == 4
        assert any("threads, chosen by plain" in note for note in result.notes)
        engine = cls.opened[-1]
        assert isinstance(engine, Threaded)
        return engine, result.run

    engine, run = tune()
    drafted = [asked for asked in engine.asked if asked[0] != PLAIN]
    assert drafted
    assert {asked[1:] for asked in drafted} == {(4, 4)}
    # Now the other number would look better; what was measured holds for the first.
    cls.speeds = {2: (0.04, 0.3), 4: (0.05, 0.4)}
    engine, again = tune()
    assert engine.used == [(4, 4)]
    assert again == run


class Killed(BaseException):
    """Nothing of the tune runs after it, as after ``kill -9``."""


@pytest.mark.parametrize("how", [KeyboardInterrupt, Killed])
def test_how_it_was_measured_is_kept_before_a_class_is_confirmed(
    how: type[BaseException],
) -> None:
    cls = threaded({2: (0.1, 0.4), 4: (0.05, 0.5)})
    store = MemoryStore()

    def end(method: str, params: Mapping[str, Scalar], count: int) -> str | None:
        if store.choices():
            raise how
        return None

    cls.machine.fails = end
    cls.machine.truth = copies_and_drafts({"chat": (0.8, 0.6), "code": (0.2, 0.9)})
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: [cls]))
    with pytest.raises(Interrupted if how is KeyboardInterrupt else how) as ended:
        tune_engine(
            *("m.gguf", None, workload_of(["chat", "code"], 8)),
            TuneOptions(600.0, engine="threaded", context=500),
            db=store,
            host=Host({"fakes": plugin}),
            clock=cls.machine.clock,
        )
    usage = store.record(store.choices()[0].run, "usage")
    assert usage is not None
    assert (usage["threads"], usage["batch_threads"], usage["context"]) == (4, 2, 500)
    if isinstance(ended.value, Interrupted):
        shown = ended.value.result.usage
        assert shown is not None
        assert (shown.threads, shown.batch_threads) == (4, 2)


def test_threads_that_are_told_do_not_continue_what_was_settled_otherwise() -> None:
    store = MemoryStore()

    def run(
        speeds: Mapping[int, tuple[float, float]], **options: int
    ) -> tuple[str, int]:
        cls = threaded(speeds)
        plugin = SimpleNamespace(register_engines=hookimpl(lambda: [cls]))
        result = tune_engine(
            *("m.gguf", None, workload_of(["chat"], 8)),
            TuneOptions(100.0, engine="threaded", **options),  # type: ignore[arg-type]
            db=store,
            host=Host({"fakes": plugin}),
            clock=cls.machine.clock,
        )
        assert result.usage is not None
        return result.run, result.environment.threads

    other = {8: (0.1, 1.0), 4: (0.12, 0.6)}  # 8 for single tokens, 4 for batches
    settled, threads = run(other)
    assert threads == 8
    told, threads = run(other, threads=8)
    assert threads == 8
    assert told != settled
    # The same numbers are the same run, whoever chose them.
    assert run(other, threads=8, batch_threads=4)[0] == settled
    assert run(other, threads=8, batch_threads=8)[0] == told
