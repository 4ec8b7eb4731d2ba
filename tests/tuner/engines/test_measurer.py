"""Settings of a scripted engine, measured with few starts and in spite of failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from adaptspec.engines.inference_engine import Answer, EngineOptions
from adaptspec.errors import EngineError, InvalidPromptError
from adaptspec.params import Scalar
from adaptspec.testing.scripted_engine import (
    Machine,
    ScriptedEngine,
    engine_on,
    workload_of,
)
from adaptspec.workloads import Message, Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.engines.measurer import EngineMeasurer, even_parts
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, MeasuresAhead, Setting
from adaptspec_tuner.records import RunRecords

WORKLOAD = workload_of(["a"], 4)
PROMPTS = WORKLOAD.prompts
SETTINGS = [Setting("copy", {"length": length}) for length in (2, 4, 8)]


def dear(**more: Any) -> Machine:
    """A machine whose starts take a minute."""
    options: dict[str, Any] = {"start": 60.0, "room": 2, **more}
    return Machine(lambda prompt, method, params: 2.0, **options)


def measurer_on(
    machine: Machine,
    wrong: Callable[[str, Mapping[str, Scalar], Prompt], Exception | None] = (
        lambda method, params, prompt: None
    ),
    concurrency: int = 1,
) -> tuple[EngineMeasurer, ScriptedEngine]:
    """A measurer of an engine that raises what ``wrong`` says of a prompt."""

    class Refusing(engine_on(machine)):  # type: ignore[misc]
        def answer(
            self,
            method: str,
            params: Mapping[str, Scalar],
            prompts: list[Prompt],
            most: int,
        ) -> list[Answer]:
            for prompt in prompts:
                warming = prompt.max_new_tokens == 4
                if not warming and (error := wrong(method, params, prompt)):
                    raise error
            return super().answer(method, params, prompts, most)  # type: ignore[no-any-return]

    engine = Refusing(EngineOptions(engine="scripted", model="m"))
    found = EngineMeasurer(*(engine, [WORKLOAD], 64, concurrency), clock=machine.clock)
    assert isinstance(found, MeasuresAhead)
    return found, engine


@pytest.mark.parametrize("room", [1, 2, 4])
def test_a_prompt_that_the_engine_refuses_fails_no_setting(room: int) -> None:
    asked: list[str] = []

    def wrong(method: str, params: Mapping[str, Scalar], p: Prompt) -> Exception | None:
        if p.id == "a/0":
            asked.append(method)
            return EngineError("400: too long")
        return None

    measurer, _ = measurer_on(dear(room=room), wrong)
    ahead = measurer.measure_ahead([(setting, PROMPTS) for setting in SETTINGS])
    assert ahead == SETTINGS
    assert set(asked) == {"autoregressive"}
    for setting in [PLAIN_SETTING, *SETTINGS]:
        with pytest.raises(EngineError, match="too long"):
            measurer.measure(setting, PROMPTS[0])
        for prompt in PROMPTS[1:]:
            assert measurer.measure(setting, prompt).speed > 0
    assert set(asked) == {"autoregressive"}


@pytest.mark.parametrize("room", [1, 4])
@pytest.mark.parametrize(
    "error", [EngineError("died"), InvalidPromptError("no"), IndexError("of a model")]
)
def test_a_setting_that_fails_half_way_keeps_what_it_answered(
    room: int, error: Exception
) -> None:
    def wrong(method: str, params: Mapping[str, Scalar], p: Prompt) -> Exception | None:
        bad = params.get("length") == 2 and p.id == "a/2"
        return error if bad else None

    measurer, _ = measurer_on(dear(room=room), wrong)
    measurer.measure_ahead([(setting, PROMPTS) for setting in SETTINGS])
    for prompt in PROMPTS[:2]:
        assert measurer.measure(SETTINGS[0], prompt).speed > 0
    for prompt in PROMPTS[2:]:
        with pytest.raises(type(error)):
            measurer.measure(SETTINGS[0], prompt)
    assert all(measurer.measure(SETTINGS[1], prompt).speed > 0 for prompt in PROMPTS)


def test_ctrl_c_of_an_engine_ends_the_measuring() -> None:
    def wrong(method: str, params: Mapping[str, Scalar], p: Prompt) -> Exception | None:
        error = RuntimeError("cleaning up")
        error.__cause__ = KeyboardInterrupt()
        return error

    measurer, _ = measurer_on(dear(), wrong)
    with pytest.raises(RuntimeError, match="cleaning up"):
        measurer.measure_ahead([(SETTINGS[0], PROMPTS)])


def test_what_fails_at_the_first_answer_is_told_in_a_line() -> None:
    machine = dear()
    cls = engine_on(machine)

    class Broken(cls):  # type: ignore[misc, valid-type]
        def answer(self, *given: Any) -> list[Answer]:
            raise IndexError("out of range\nand more")

    measurer = EngineMeasurer(Broken(EngineOptions()), [WORKLOAD], 64)
    with pytest.raises(
        EngineError, match=r"^scripted can't decode plainly: IndexE.*e$"
    ):
        measurer.check()


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        (False, {}),
        (True, {"raw": True}),
        (False, {"text": None, "messages": (Message("user", "x"),), "tools": ({},)}),
    ],
)
def test_a_warm_up_asks_no_prompt_that_is_measured(
    raw: bool, form: dict[str, Any]
) -> None:
    """An engine that drafts from earlier requests would start again before that one."""
    asked: list[Prompt] = []

    class Listening(engine_on(dear())):  # type: ignore[misc]
        def answer(self, *given: Any) -> list[Answer]:
            asked.extend(given[2])
            return super().answer(*given)  # type: ignore[no-any-return]

    prompts = tuple(replace(prompt, **form) for prompt in PROMPTS)
    engine = Listening(EngineOptions(engine="scripted", model="m"))
    measurer = EngineMeasurer(engine, [replace(WORKLOAD, prompts=prompts)], 64)
    for prompt in prompts:
        measurer.measure(SETTINGS[0], prompt)
    warming, *others = asked
    assert others == list(prompts)
    assert warming.content not in [prompt.content for prompt in prompts]
    assert isinstance(warming.content, str)
    assert (warming.raw, warming.tools, warming.max_new_tokens) == (raw, (), 4)


def test_plain_decoding_is_started_once_for_several_settings_with_room_for_one() -> (
    None
):
    measurer, engine = measurer_on(dear(room=1))
    measurer.measure_ahead([(setting, PROMPTS) for setting in SETTINGS])
    assert engine.starts == 1 + len(SETTINGS)


@pytest.mark.parametrize("room", [1, 2, 4])
def test_settings_that_there_is_no_time_for_are_not_started(room: int) -> None:
    machine = dear(room=room)
    measurer, engine = measurer_on(machine)
    end = 70.0  # passed by the first setting
    ahead = measurer.measure_ahead(
        [(setting, PROMPTS) for setting in SETTINGS], lambda: machine.clock.now < end
    )
    assert ahead == SETTINGS[:1]
    assert {str(params) for method, params, _ in engine.log if method == "copy"} == {
        "{'length': 2}"
    }


def test_how_long_a_start_takes_is_measured() -> None:
    machine = dear(start=5.0)
    measurer, engine = measurer_on(machine)
    assert not measurer.keeps
    machine.start = 90.0
    measurer.check()
    assert 90 < measurer.starting < 92
    assert measurer.keeps
    assert engine.starting == 5.0


def test_answers_are_kept_as_they_come_and_read_again() -> None:
    records = RunRecords(MemoryStore(), "run")
    deaths = 0

    def dies(method: str, params: Mapping[str, Scalar], p: Prompt) -> Exception | None:
        nonlocal deaths
        if deaths == 0 and params.get("length") == 4 and p.id == "a/2":
            deaths += 1
            raise KeyboardInterrupt
        return None

    asked = [(setting, PROMPTS) for setting in SETTINGS]
    first, _ = measurer_on(dear(room=1), dies)
    with pytest.raises(KeyboardInterrupt):
        first.measure_ahead(asked, records=records)
    again, engine = measurer_on(dear(room=1))
    again.measure_ahead(asked, records=records)
    told = {(params.get("length"), *ids) for _, params, ids in engine.log}
    assert {(4, "a/2"), (4, "a/3"), (8, "a/0")} <= told
    assert not {(2, "a/1"), (4, "a/1")} & told
    last, idle = measurer_on(dear(room=1))
    last.measure_ahead(asked, records=records)
    assert not idle.log
    for setting in [PLAIN_SETTING, *SETTINGS]:
        for prompt in PROMPTS:
            assert last.measure(setting, prompt) == again.measure(setting, prompt)


def test_what_a_near_tie_may_have_ended_is_warmed_up_again() -> None:
    machine = dear(room=1, ties=True, start=2.0)
    measurer, _ = measurer_on(machine)
    measurer.measure(SETTINGS[0], PROMPTS[0])
    before = measurer.starts
    assert measurer.agreement(PROMPTS[0], [1, 2], [1, 3]) == "near_tie"
    measurer.measure(SETTINGS[0], PROMPTS[1])
    assert measurer.starts == before + 1


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(8, 4, [4, 4]), (6, 4, [3, 3]), (5, 4, [2, 3]), (3, 4, [3]), (4, 1, [1] * 4)],
)
def test_parts_are_even_and_hold_everything_once(
    count: int, most: int, sizes: list[int]
) -> None:
    prompts = workload_of(["a"], count).prompts
    parts = even_parts(prompts, most)
    assert [len(part) for part in parts] == sizes
    assert [p for part in parts for p in part] == list(prompts)


@pytest.mark.parametrize("room", [1, 4])
def test_a_prompt_that_is_refused_fails_none_that_are_asked_together_with_it(
    room: int,
) -> None:
    def wrong(method: str, params: Mapping[str, Scalar], p: Prompt) -> Exception | None:
        return EngineError("400: too long") if p.id == "a/2" else None

    measurer, engine = measurer_on(dear(room=room), wrong, concurrency=4)
    ahead = measurer.measure_ahead([(setting, PROMPTS) for setting in SETTINGS])
    assert ahead == SETTINGS
    for setting in [PLAIN_SETTING, *SETTINGS]:
        for prompt in PROMPTS:
            if prompt.id == "a/2":
                with pytest.raises(EngineError, match="too long"):
                    measurer.measure(setting, prompt)
            else:
                assert measurer.measure(setting, prompt).speed > 0
    # The others are still asked as many at a time as was agreed.
    asked = [ids for method, _, ids in engine.log if method == "copy"]
    assert {"a/0", "a/1", "a/3"} in [set(ids) for ids in asked]
    assert {len(ids) for ids in asked} == {4}


def test_prompts_that_fail_only_together_are_asked_alone_once() -> None:
    class Small(engine_on(dear())):  # type: ignore[misc]
        def answer(
            self,
            method: str,
            params: Mapping[str, Scalar],
            prompts: list[Prompt],
            most: int,
        ) -> list[Answer]:
            if len({p.id for p in prompts}) > 1:
                raise EngineError("no memory")
            return super().answer(method, params, prompts, most)  # type: ignore[no-any-return]

    engine = Small(EngineOptions(engine="scripted", model="m"))
    measurer = EngineMeasurer(engine, [WORKLOAD], 64, 4)
    for prompt in PROMPTS:
        with pytest.raises(EngineError, match="no memory"):
            measurer.measure(PLAIN_SETTING, prompt)
    alone = [ids for _, _, ids in engine.log if len(ids) == 1]
    assert sorted(alone) == [[prompt.id] for prompt in PROMPTS]
