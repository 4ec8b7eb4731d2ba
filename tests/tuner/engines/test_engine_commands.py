"""``adaptspec tune --engine``, ``report`` and ``compare`` on a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adaptspec_profiles.plugin
import adaptspec_tuner.plugin
from adaptspec.cli import build_cli
from adaptspec.engines.inference_engine import EngineOptions, InferenceEngine
from adaptspec.errors import EngineError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.testing.fakes import FakeClock
from adaptspec.testing.scripted_engine import (
    Machine,
    ScriptedEngine,
    copies_and_drafts,
    engine_on,
    workload_of,
)
from adaptspec_profiles import open_store
from adaptspec_tuner.engines.compare import compare as compare_engines

TRUTH = copies_and_drafts({"summary": (0.8, 0.6), "code": (0.2, 0.9)})


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Eight prompts of each class."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"{name}/{n}", "class": name, "prompt": f"{name} {n}"}
        for name in ("summary", "code")
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(engines: Sequence[type], *arguments: object) -> Result:
    """The command line with these engines alone."""
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: list(engines)))
    host = Host(
        {
            "scripted": plugin,
            "profiles": adaptspec_profiles.plugin,
            "tuner": adaptspec_tuner.plugin,
        }
    )
    return CliRunner().invoke(
        build_cli(host),
        [str(argument) for argument in arguments],
        env={"COLUMNS": "120"},
    )


def tune(cls: type[ScriptedEngine], workload: Path, *more: object) -> Result:
    """A tune of a few trials."""
    return run(
        [cls],
        *("tune", "--engine", cls.name, "--model", "m.gguf", "--workload", workload),
        *("--budget", "10 trials", "--db", workload.parent / "p.db", *more),
    )


@pytest.mark.slow
def test_a_tune_prints_its_choices_and_how_to_start_the_engine(workload: Path) -> None:
    cls = engine_on(Machine(TRUTH, noise=0.01))
    found = tune(cls, workload, "--draft-model", "d.gguf")
    assert found.exit_code == 0, found.output
    assert "code: draft, 1." in found.stdout
    assert "summary: copy, 2." in found.stdout
    assert "scripted 7.1, m.gguf" in found.stdout
    db = workload.parent / "p.db"
    assert (
        f"adaptspec export --for scripted --model m.gguf --draft-model d.gguf --db {db}"
        in found.stdout
    )
    assert "--concurrency 1" in found.stdout  # export refuses to guess among several
    assert "adaptspec generate" not in found.stdout
    assert cls.opened[0].options.draft_model == "d.gguf"
    # So does a report of it, on the terminal and as a page.
    shown = run([cls], "report", "--db", db)
    assert "export --for scripted" in shown.stdout
    page = workload.parent / "report.html"
    assert run([cls], "report", "--db", db, "-o", page).exit_code == 0
    assert "export --for scripted" in page.read_text()
    assert "adaptspec.load" not in page.read_text()
    listed = run([cls], "profiles", "list", "--db", db)
    assert "scripted 7.1" in listed.stdout
    runs = run([cls], "profiles", "list", "--runs", "--db", db)
    assert "scripted 7.1" in runs.stdout


@pytest.mark.slow
def test_a_run_keeps_what_an_export_reads_from_another_folder(
    workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workload.parent
    monkeypatch.chdir(folder)
    (folder / "m.gguf").write_text("weights")
    cls = engine_on(Machine(TRUTH))
    found = tune(cls, workload, "--limit", "4", "--draft-model", "org/draft")
    assert found.exit_code == 0, found.output
    with closing(open_store(str(folder / "p.db"))) as store:
        (run,) = {profile.run for profile in store.profiles()}
        usage, mix = store.record(run, "usage"), store.record(run, "mix")
    assert usage is not None
    assert usage["model"] == str(folder / "m.gguf")
    assert usage["draft_model"] == "org/draft"
    assert mix == {"summary": 8, "code": 8}  # and not the four that were measured


@pytest.mark.slow
def test_what_is_told_of_the_engine_reaches_it(workload: Path) -> None:
    cls = engine_on(Machine(TRUTH))
    found = tune(
        *(cls, workload, "--engine-command", "prog", "--engine-python", "py"),
        *("--engine-argument=--a", "--engine-argument", "b", "--context", "512"),
        *("--threads", "3", "--dtype", "q4", "--device", "gpu", "--api-key", "secret"),
    )
    assert found.exit_code == 0, found.output
    told = cls.opened[0].options
    assert (told.command, told.python, list(told.arguments)) == (
        "prog",
        "py",
        ["--a", "b"],
    )
    assert (told.context, told.threads, told.dtype, told.device) == (
        512,
        3,
        "q4",
        "gpu",
    )
    assert told.api_key == "secret"
    assert b"secret" not in (workload.parent / "p.db").read_bytes()


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


@pytest.mark.slow
def test_several_numbers_of_requests_are_several_tunes_and_one_table(
    workload: Path,
) -> None:
    cls = engine_on(Machine(TRUTH, noise=0.01))
    found = tune(cls, workload, "--concurrency", "1,4")
    assert found.exit_code == 0, found.output
    assert [engine.options.concurrency for engine in cls.opened] == [1, 4]
    assert all(engine.closed for engine in cls.opened)
    assert "4 requests at a time" in found.stdout
    last = found.stdout.rpartition("at each number of requests")[2]
    assert "1 request" in last
    assert "4 requests" in last
    assert "--concurrency 4" in found.stdout
    told = tune(cls, workload, "--concurrency", "1,4", "--json")
    runs = json.loads(told.stdout)
    assert [r["environment"]["concurrency"] for r in runs] == [1, 4]
    assert len({r["run"] for r in runs}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("when", ["opened", "checked"])
def test_a_number_of_requests_that_fails_hides_no_others(
    workload: Path, when: str
) -> None:
    class Small(engine_on(Machine(TRUTH, noise=0.01))):  # type: ignore[misc]
        @classmethod
        def open(cls, options: Any) -> Any:
            if when == "opened" and options.concurrency == 4:
                raise EngineError("no memory for 4")
            return super().open(options)

        def answer(self, method: str, params: Any, prompts: Any, most: int) -> Any:
            if len(prompts) == 4:
                raise EngineError("no memory for 4")
            return super().answer(method, params, prompts, most)

    found = tune(Small, workload, "--concurrency", "4,1")
    assert found.exit_code == 1
    assert "code: draft" in found.stdout
    assert "--concurrency 1" in found.stdout
    assert "4 requests at a time: no memory for 4" in found.stderr
    assert found.stderr.endswith("Error: no memory for 4\n")
    told = tune(Small, workload, "--concurrency", "4,1", "--json")
    assert told.exit_code == 1
    (only,) = json.loads(told.stdout)
    assert only["environment"]["concurrency"] == 1


@pytest.mark.slow
def test_a_number_of_requests_without_a_confirmed_class_is_told(workload: Path) -> None:
    def answers_to_4(method: str, params: Any, count: int) -> str | None:
        return (
            "broke" if count > 8 and cls.opened[-1].options.concurrency == 4 else None
        )

    cls = engine_on(Machine(TRUTH, noise=0.01, fails=answers_to_4))
    found = tune(cls, workload, "--concurrency", "1,4")
    assert found.exit_code == 0, found.output
    assert "code: draft" in found.stdout
    assert "4 requests at a time: no class could be confirmed" in found.stderr
    told = tune(cls, workload, "--concurrency", "1,4", "--json", "--fresh")
    assert [bool(run["classes"]) for run in json.loads(told.stdout)] == [True, False]


@pytest.mark.parametrize("text", ["0", "a", "", "1,-2"])
def test_a_number_of_requests_is_whole_and_positive(workload: Path, text: str) -> None:
    found = tune(engine_on(Machine(TRUTH)), workload, "--concurrency", text)
    assert found.exit_code == 1
    assert "whole numbers from 1" in found.output
    assert found.output.count("\n") == 1


def test_a_server_is_measured_and_nothing_is_to_be_started(workload: Path) -> None:
    cls = engine_on(Machine(TRUTH, methods=()), "openai")
    found = run(
        [cls],
        *("tune", "--engine", "http://localhost:1/v1", "--workload", workload),
        *("--budget", "9 trials", "--db", workload.parent / "p.db"),
    )
    assert found.exit_code == 0, found.output
    assert cls.opened[0].options.engine == "http://localhost:1/v1"
    assert "Measured as it is: there was nothing to choose from." in found.stdout
    assert "export" not in found.stdout
    assert "openai 7.1" in found.stdout


def test_an_engine_that_fails_is_told_in_a_line(workload: Path) -> None:
    dead = engine_on(Machine(TRUTH, fails=lambda *_: "no memory; it printed last: x"))
    found = tune(dead, workload)
    assert found.exit_code == 1
    assert found.stderr.endswith(
        "Error: scripted ended: no memory; it printed last: x\n"
    )
    unknown = run([dead], "tune", "--engine", "lama", "--workload", workload)
    assert unknown.exit_code == 1
    assert "no engine 'lama'; known: scripted, or a server's URL" in unknown.output
    refused = run([dead], "tune", "--engine-command", "x", "--workload", workload)
    assert "engine_command is for other engines" in refused.output


def compare(engines: Sequence[type], workload: Path, *more: object) -> Result:
    """A comparison."""
    return run(
        engines,
        *("compare", "--model", "m", "--workload", workload, *more),
        *("--db", workload.parent / "p.db"),
    )


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
    cls = engine_on(Machine(TRUTH))
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
    assert "left out: dies: dies ended: killed" in found.stdout
    assert "dies: plain decoding" not in found.stdout  # half of it tells nothing
    assert "good: plain decoding" in found.stdout
    assert dies.opened[0].closed
    nobody = compare([absent], workload, "--model", "absent=missing")
    assert nobody.exit_code == 1
    assert "no engine answered; absent: no model 'missing'" in nobody.output
