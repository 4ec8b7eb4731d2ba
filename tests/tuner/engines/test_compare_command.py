"""``adaptspec compare`` on scripted engines."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptspec.engines.inference_engine import EngineOptions, InferenceEngine
from adaptspec.errors import EngineError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.testing.fakes import FakeClock
from adaptspec.testing.scripted_engine import (
    Machine,
    ScriptedEngine,
    engine_on,
    workload_of,
)
from adaptspec_profiles import open_store
from adaptspec_tuner.engines.compare import compare as compare_engines
from engine_commands import TRUTH, compare, tune
from measured_engines import DAY, keep_run


@pytest.mark.slow
def test_engines_are_compared_plainly_and_with_what_was_tuned(workload: Path) -> None:
    slow = engine_on(Machine(TRUTH, token=0.1), "slow")
    fast = engine_on(Machine(TRUTH, token=0.05), "fast")
    assert tune(slow, workload).exit_code == 0
    told = compare([slow, fast], workload, "--json", "--method", "copy")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    rows = {(row["engine"], row["way"]): row for row in found["rows"]}
    assert set(rows) == {
        *(("fast", way) for way in ("autoregressive", "copy")),
        *(("slow", way) for way in ("autoregressive", "tuned", "copy")),
    }
    plain = rows["slow", "autoregressive"]["cells"]
    assert plain["code"]["tokens_per_second"] == pytest.approx(10.0)
    assert rows["fast", "autoregressive"]["cells"]["code"]["tokens_per_second"] == (
        pytest.approx(20.0)
    )
    assert rows["slow", "tuned"]["cells"]["code"]["setting"] == "draft"
    assert rows["slow", "tuned"]["cells"]["summary"]["setting"] == "copy"
    # The first row is what the others are compared with: 0.5 s, then 63 tokens.
    ratio = (0.5 + 63 * 0.1) / (0.5 + 63 * 0.05)
    first = found["rows"][0]
    assert first["ratio"] == 1.0
    other = rows["slow" if first["engine"] == "fast" else "fast", "autoregressive"]
    assert other["ratio"] in (pytest.approx(ratio), pytest.approx(1 / ratio))
    shown = compare([slow, fast], workload)
    assert "slow: tuned" in shown.stdout
    assert "fast: plain decoding" in shown.stdout
    assert all(engine.closed for engine in [*slow.opened, *fast.opened])


@pytest.mark.slow
def test_what_was_tuned_is_opened_as_it_was_tuned(workload: Path) -> None:
    class Named(engine_on(Machine(TRUTH))):  # type: ignore[misc]
        @property
        def environment(self) -> Any:
            return replace(super().environment, model=self.options.model)

    cls: type[ScriptedEngine] = Named
    heads = workload.parent / "heads"
    told = ("--draft-model", "d", "--heads", heads, "--context", "512", "--threads", 3)
    argument = "--engine-argument=--flash"
    assert tune(cls, workload, "--model", "m", *told, argument).exit_code == 0
    found = compare([cls], workload, "--threads", "2")
    assert found.exit_code == 0, found.output
    options = cls.opened[-1].options
    assert (options.draft_model, list(options.heads)) == ("d", [str(heads)])
    assert (options.context, list(options.arguments)) == (512, ["--flash"])
    assert options.threads == 2  # what is said counts
    # Another model may need something else.
    assert compare([cls], workload, "--model", "scripted=n").exit_code == 0
    assert cls.opened[-1].options.context is None


def test_why_a_class_is_decoded_plainly_is_told(workload: Path) -> None:
    cls = engine_on(Machine(TRUTH))
    told = json.loads(compare([cls], workload, "--json").stdout)
    (note,) = told["notes"]
    assert note.startswith("scripted: summary, code: plain decoding: ")


def test_prompts_come_in_turns_over_engines(workload: Path) -> None:
    order: list[tuple[str, str]] = []

    def noting(name: str) -> type[InferenceEngine]:
        cls = engine_on(Machine(TRUTH), name)

        class Noting(cls):  # type: ignore[misc, valid-type]
            def answer(self, method: str, params: Any, prompts: Any, n: int) -> Any:
                if not prompts[0].max_new_tokens:
                    order.extend((name, p.id) for p in prompts)
                return super().answer(method, params, prompts, n)

        return Noting

    assert compare([noting("a"), noting("b")], workload).exit_code == 0
    assert order == [
        (engine, prompt)
        for prompt in ("summary/0", "summary/1", "code/0", "code/1")
        for engine in ("a", "b")
    ]


def test_each_engine_may_have_a_model_of_its_own(workload: Path) -> None:
    one, two = engine_on(Machine(TRUTH), "one"), engine_on(Machine(TRUTH), "two")
    found = compare([one, two], workload, "--model", "two=x.gguf", "--draft-model", "d")
    assert found.exit_code == 0, found.output
    assert one.opened[0].options.model == "m"
    assert two.opened[0].options.model == "x.gguf"
    assert two.opened[0].options.draft_model == "d"
    twice = compare([one, two], workload, "--model", "n")
    assert "write --model ENGINE=VALUE" in twice.output
    vague = compare([one, two], workload, "--engine-command", "prog")
    assert "write --engine-command ENGINE=prog" in vague.output


def test_each_engine_is_compared_with_options_of_its_own(workload: Path) -> None:
    one, two = engine_on(Machine(TRUTH), "one"), engine_on(Machine(TRUTH), "two")
    found = compare(
        *([one, two], workload, "--heads", "h", "--heads", "two=a", "--heads", "two=b"),
        *("--engine-argument=two=--flash=on", "--engine-argument", "two=x"),
        *("--context", "two=512"),
    )
    assert found.exit_code == 0, found.output
    first, second = one.opened[0].options, two.opened[0].options
    assert (list(first.heads), list(second.heads)) == (["h"], ["a", "b"])
    assert (first.arguments, list(second.arguments)) == ((), ["--flash=on", "x"])
    assert (first.context, second.context) == (None, 512)
    # What is said of an engine that is left out is no value of the others.
    alone = compare(
        *([one, two], workload, "--engine", "two", "--model", "one=x"),
        *("--heads", "one=h", "--engine-argument", "one=x", "--context", "one=9"),
        *("--draft-model", "one=d", "--engine-command", "one=prog"),
    )
    assert alone.exit_code == 0, alone.output
    assert len(one.opened) == 1
    told = two.opened[-1].options
    assert (told.model, told.draft_model, told.heads) == ("m", None, ())
    for flag, value in (("--context", "512"), ("--engine-argument", "--flash=on")):
        vague = compare([one, two], workload, f"{flag}={value}")
        assert f"write {flag} ENGINE={value}" in vague.output
    for value in ("0", "many", "-3"):
        wrong = compare([one, two], workload, "--context", f"two={value}")
        assert f"whole number from 1, got '{value}'" in wrong.output


def test_engines_are_compared_at_several_requests_at_a_time(workload: Path) -> None:
    cls = engine_on(Machine(TRUTH))
    found = compare([cls], workload, "--concurrency", 4, "--limit", 8)
    assert found.exit_code == 0, found.output
    (engine,) = cls.opened
    assert engine.options.concurrency == 4
    assert {len(prompts) for _, _, prompts in engine.log} == {4}


def test_an_engine_that_keeps_the_cores_busy_is_waited_for() -> None:
    clock = FakeClock()
    told: list[tuple[str, float]] = []

    def noting(name: str, seconds: float) -> type[InferenceEngine]:
        class Noting(engine_on(Machine(TRUTH, clock=clock), name)):  # type: ignore[misc]
            resting = seconds
            busy = 0.0

            def answer(self, *asked: Any) -> Any:
                told.append((name, clock() - max(of.busy for of in known)))
                found = super().answer(*asked)
                type(self).busy = clock() + seconds
                return found

        return Noting

    known: list[Any] = [noting("busy", 5.0), noting("calm", 0.0)]
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: known))
    compare_engines(
        [EngineOptions(engine=cls.name, model="m") for cls in known],
        workload_of(["code"]),
        None,
        Host({"scripted": plugin}),
        sleep=clock.advance,
    )
    after = [wait for name, wait in told if name == "calm"]
    assert len(after) > 8
    assert min(after) >= 0.0


def test_an_engine_that_is_not_at_hand_is_left_out_with_the_reason(
    workload: Path,
) -> None:
    good, dies = engine_on(Machine(TRUTH), "good"), engine_on(Machine(TRUTH), "dies")
    dies.machine.fails = lambda method, params, count: "killed" if count > 3 else None
    absent = engine_on(Machine(TRUTH), "absent")
    found = compare([good, dies, absent], workload, "--model", "absent=missing")
    assert found.exit_code == 0, found.output
    assert "left out: absent: no model 'missing'" in found.stdout
    assert "good: plain decoding" in found.stdout
    # Half of a class tells nothing; what was finished before is kept.
    assert "dies: left out in code: dies ended: killed" in found.stdout
    assert "left out: dies" not in found.stdout
    (row,) = [line for line in found.stdout.splitlines() if "dies: plain" in line]
    _, *cells = row.rsplit(maxsplit=4)
    assert cells == ["15.4", "-", "-", "-"]
    assert dies.opened[0].closed
    nobody = compare([absent], workload, "--model", "absent=missing")
    assert nobody.exit_code == 1
    assert "no engine answered; absent: no model 'missing'" in nobody.output


def refusing(name: str, *refused: str) -> type[InferenceEngine]:
    """An engine that refuses prompts, unless it is warmed up with them."""

    class Refusing(engine_on(Machine(TRUTH), name)):  # type: ignore[misc]
        def answer(self, method: str, params: Any, prompts: Any, most: int) -> Any:
            if most != 4 and any(prompt.id in refused for prompt in prompts):
                raise EngineError(f"{name}: 400: longer than the context")
            return super().answer(method, params, prompts, most)

    return Refusing


def test_a_prompt_that_an_engine_refuses_is_left_out_on_all(workload: Path) -> None:
    engines = [refusing("a"), refusing("b", "code/1")]
    told = compare(engines, workload, "--json", "--method", "copy")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["left_out"] == {}
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        counts = {name: cell["prompts"] for name, cell in row["cells"].items()}
        assert counts == {"summary": 2, "code": 1}
    assert (
        "prompt 'code/1' is left out on all engines: b: b: 400: longer than the context"
    ) in found["notes"]
    # One that refuses everything leaves nothing out but itself.
    every = ["summary/0", "summary/1", "code/0", "code/1"]
    shown = compare([refusing("a"), refusing("c", *every)], workload)
    assert shown.exit_code == 0, shown.output
    assert "left out: c: c: 400: longer than the context" in shown.stdout
    assert "on all engines" not in shown.stdout
    nothing = compare([refusing("a", *every[:2]), refusing("c", *every[2:])], workload)
    assert nothing.exit_code == 1
    assert "no prompt was answered by all engines; name fewer" in nothing.output


def test_a_method_that_engines_lack_is_told_and_refused_where_all_do(
    workload: Path,
) -> None:
    one, two = engine_on(Machine(TRUTH), "one"), engine_on(Machine(TRUTH), "two")
    two.machine.methods = two.machine.methods[:1]
    told = compare([one, two], workload, "--method", "draft")
    assert told.exit_code == 0, told.output
    assert "two: not measured: draft: the engine doesn't have it" in told.stdout
    assert "one: not measured" not in told.stdout
    unknown = compare([one, two], workload, "--method", "copie")
    assert unknown.exit_code == 1
    assert "one that an engine at hand has, got 'copie'; one: the" in unknown.output
    assert "they have: autoregressive, copy, draft" in unknown.output
    missing = compare([one, two], workload, "--method", "eagle")
    assert missing.exit_code == 1
    assert "two: no heads were given (--heads)" in missing.output
    # One that is not at hand may be the one that has it.
    absent = ("--method", "eagle", "--model", "two=missing")
    shown = compare([one, two], workload, *absent)
    assert shown.exit_code == 1
    assert "one: no heads were given" in shown.output
    assert "two: left out: no model 'missing'" in shown.output
    assert all(engine.closed for engine in [*one.opened, *two.opened])


def test_a_key_in_the_environment_or_for_a_url_is_none_of_an_engine_started_here(
    workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    cls, served = engine_on(Machine(TRUTH)), engine_on(Machine(TRUTH), "openai")
    tune(cls, workload, "--budget", "1 trials")
    assert cls.opened[-1].options.api_key is None
    compare([cls, served], workload, "--engine", "scripted")
    assert cls.opened[-1].options.api_key is None
    url = ("--engine", "http://localhost:1/v1", "--api-key", "typed")
    compare([cls, served], workload, "--engine", "scripted", *url)
    assert cls.opened[-1].options.api_key is None
    assert served.opened[-1].options.api_key == "typed"
    # Where it is typed for such an engine alone, that refuses it.
    compare([cls, served], workload, "--engine", "scripted", "--api-key", "typed")
    assert cls.opened[-1].options.api_key == "typed"


def test_a_model_said_of_no_engine_is_a_servers_where_nothing_is_started(
    workload: Path,
) -> None:
    cls, served = engine_on(Machine(TRUTH)), engine_on(Machine(TRUTH), "openai")
    url = "http://localhost:1/v1"
    asked = ("--engine", url, "--draft-model", "d", "--heads", "h")
    assert compare([cls, served], workload, *asked).exit_code == 0
    options = served.opened[-1].options
    # A server refuses the last two: they mustn't be dropped without a word.
    assert (options.model, options.draft_model) == ("m", "d")
    assert list(options.heads) == ["h"]
    both = compare([cls, served], workload, *asked, "--engine", "scripted")
    assert both.exit_code == 0
    assert served.opened[-1].options == EngineOptions(engine=url)
    assert cls.opened[-1].options.model == "m"
    own = ("--engine", "scripted", "--model", f"{url}=n")
    assert compare([cls, served], workload, "--engine", url, *own).exit_code == 0
    assert served.opened[-1].options.model == "n"


def test_an_engine_is_opened_as_in_the_run_whose_choice_is_used(
    workload: Path,
) -> None:
    cls = engine_on(Machine(TRUTH))
    here = cls(EngineOptions(engine="scripted", model="m")).environment
    with closing(open_store(str(workload.parent / "p.db"))) as store:
        for day, prompts, draft in ((1, 10, "d1"), (2, 2, "d2")):
            keep_run(
                store,
                {name: (1.0, {("copy", 8): 1.8}) for name in ("summary", "code")},
                run=f"r{day}",
                environment=here,
                prompts={"summary": prompts, "code": prompts},
                created=DAY + timedelta(days=day),
                length="length",
                model="m",
                draft_model=draft,
            )
    told = compare([cls], workload, "--json")
    assert told.exit_code == 0, told.output
    assert [row["way"] for row in json.loads(told.stdout)["rows"]][1:] == ["tuned"]
    # The newest is of fewer prompts, so the other one's choice is used.
    assert [engine.options.draft_model for engine in cls.opened] == ["d2", "d1"]
    assert all(engine.closed for engine in cls.opened)
    assert not cls.opened[0].log
    compare([cls], workload, "--draft-model", "d3")
    assert [engine.options.draft_model for engine in cls.opened[2:]] == ["d3"]


def test_what_engines_ran_with_and_what_is_to_be_known_of_choices_is_told(
    workload: Path,
) -> None:
    cls = engine_on(Machine(TRUTH))
    here = cls(EngineOptions(engine="scripted", model="m")).environment
    with closing(open_store(str(workload.parent / "p.db"))) as store:
        keep_run(
            store,
            {name: (1.0, {("copy", 8): 1.8}) for name in ("summary", "code")},
            environment=replace(here, threads=4),
            length="length",
            model="m",
        )
    found = json.loads(compare([cls], workload, "--json").stdout)
    note = "scripted: summary, code: measured with threads 4 (here 2)"
    assert found["notes"] == [note]
    told = found["engines"]["scripted"]
    assert (told["model_name"], told["dtype"]) == ("m", "bf16")
    assert (told["threads"], told["concurrency"]) == (2, 1)
    shown = compare([cls], workload).stdout.splitlines()
    line = "scripted: version 7.1, model m, dtype bf16, threads 2, requests at a time 1"
    assert line in shown
    assert note in shown
