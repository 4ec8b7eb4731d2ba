"""``adaptspec tune --engine`` and its ``report`` on a scripted engine."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptspec.errors import EngineError
from adaptspec.profile import Environment
from adaptspec.testing.scripted_engine import Machine, engine_on
from adaptspec_profiles import open_store
from engine_commands import TRUTH, run, tune


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
    # What differs from the defaults is told by the engine's own.
    told = json.loads(run([cls], "report", "--db", db, "--json").stdout)
    usual = {"copy": {"length": 8, "ngram": 2}, "draft": {"length": 5}}
    rows = [row for of in told["classes"] for row in of["results"]]
    assert any(row["params"].get("ngram") == 2 for row in rows)
    for row in rows:
        known = usual.get(row["strategy"], {}).items()
        assert row["changed"] == dict(row["params"].items() - known)
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
def test_a_number_of_requests_without_a_confirmed_class_is_told(
    workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(cls, "notes", ["of the engine"])  # it isn't why
    alone = tune(cls, workload, "--concurrency", "4", "--fresh")
    (error,) = [e for e in alone.stderr.splitlines() if e.startswith("Error: ")]
    assert error.endswith("plain decoding fails or ends at once; nothing to compare")


@pytest.mark.parametrize("text", ["0", "a", "", "1,-2"])
def test_a_number_of_requests_is_whole_and_positive(workload: Path, text: str) -> None:
    found = tune(engine_on(Machine(TRUTH)), workload, "--concurrency", text)
    assert found.exit_code == 1
    assert "whole numbers from 1" in found.output
    assert found.output.count("\n") == 1


def test_a_server_is_measured_and_nothing_is_to_be_started(workload: Path) -> None:
    class Served(engine_on(Machine(TRUTH, methods=()), "openai")):  # type: ignore[misc]
        @property
        def environment(self) -> Environment:
            place: Environment = super().environment
            return replace(place, threads=0)

    cls = Served
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
    # What it doesn't tell isn't shown.
    assert "a machine, held-out prompts" in found.stdout
    assert "forward" not in found.stdout


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
