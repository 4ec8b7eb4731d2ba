"""``adaptspec tune`` as a process, on a tiny random model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from adaptspec.errors import AdaptSpecError
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.commands import parse_budget

# The first-party plugins by name: the tests don't depend on what else is installed.
PROGRAM = """
import sys
import adaptspec_plugins
from adaptspec import cli, host
from adaptspec_profiles import plugin as profiles
from adaptspec_tuner import plugin as tuner
mine = host.Host({"bundled": adaptspec_plugins, "profiles": profiles, "tuner": tuner})
host.Host.installed = classmethod(lambda cls: mine)
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "prompts.jsonl"
    prompts = [f"w{i} w3 w4 w5 w3 w4" for i in range(2, 8)]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "tune", *arguments]


def environment() -> dict[str, str]:
    paths = [str(Path(p or ".").resolve()) for p in sys.path]
    # Nothing here needs the kernel that would be built first.
    native = {"ADAPTSPEC_NATIVE": "0"}
    return {**os.environ, **native, "PYTHONPATH": os.pathsep.join(paths)}


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_killed_run_continues_and_no_finished_trial_is_lost_or_repeated(
    model: Path, workload: Path, tmp_path: Path
) -> None:
    db = tmp_path / "profiles.db"
    arguments = [
        *("--model", str(model), "--workload", str(workload), "--db", str(db)),
        *("--max-new-tokens", "16", "--json", "--dtype", "float32"),
    ]
    # It can't end by itself before it has been killed.
    told = tmp_path / "stderr"
    with told.open("w") as stderr:
        victim = subprocess.Popen(
            command(*arguments, "--budget", "10m", "--trials", "100000"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        while len(trials_in(db)) < 2:
            assert victim.poll() is None, told.read_text()
    finally:
        victim.kill()
        victim.wait()
    finished = trials_in(db)  # it may have finished more meanwhile
    done = run([*arguments, "--budget", "4s", "--trials", str(len(finished) + 3)])
    assert done.returncode == 0, done.stderr
    after = trials_in(db)
    assert after[: len(finished)] == finished
    assert len({params for _, params in after}) == len(after)
    assert [number for number, _ in after] == list(range(len(after)))
    result = json.loads(done.stdout)
    (found,) = result["classes"]
    assert found["trials"]["prompt_lookup"] == len(after)
    assert {r["strategy"] for r in found["results"]} >= {"autoregressive"}
    assert all(r["identical"] == r["prompts"] for r in found["results"])
    assert "draft model" in result["unavailable"]["draft_model"]


def trials_in(db: Path) -> list[tuple[int, str]]:
    if not db.exists():
        return []
    import sqlite3

    # Read beside the writer; before its first migration there are no tables.
    with contextlib.closing(sqlite3.connect(db)) as connection:
        try:
            runs = connection.execute(
                "select distinct run from tuning_trials"
            ).fetchall()
        except sqlite3.OperationalError:
            return []
    if not runs:
        return []
    store = SqlStore(f"sqlite:///{db}")
    try:
        (run_id,) = runs[0]
        return [
            (t.number, json.dumps(dict(t.params), sort_keys=True))
            for t in store.trials(run_id)
        ]
    finally:
        store.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "90s, 10m or 1h"),
        (["--workload", "/nowhere.jsonl"], "can't read the workload /nowhere.jsonl"),
        (["--strategies", "guess"], "no strategy 'guess'; known:"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_1(
    arguments: list[str], said: str, model: Path, workload: Path, tmp_path: Path
) -> None:
    given = ["--model", str(model), "--db", str(tmp_path / "p.db")]
    done = run([*given, *arguments])
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_budget_is_read_in_seconds_minutes_and_hours() -> None:
    assert [parse_budget(t) for t in ("90s", "10m", "1.5h", "2")] == [
        90.0,
        600.0,
        5400.0,
        120.0,
    ]
    with pytest.raises(AdaptSpecError):
        parse_budget("0s")
