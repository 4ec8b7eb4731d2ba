"""``adaptspec tune`` as a process, on a tiny random model."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.commands import parse_budget


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "prompts.jsonl"
    prompts = [f"w{i} w3 w4 w5 w3 w4" for i in range(2, 8)]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def test_a_killed_run_continues_and_no_finished_trial_is_lost_or_repeated(
    start: Any, tiny_pair: tuple[str, str], workload: Path, tmp_path: Path
) -> None:
    db = tmp_path / "profiles.db"
    arguments = [
        *("--model", tiny_pair[0], "--workload", str(workload), "--db", str(db)),
        *("--max-new-tokens", "16", "--json", "--dtype", "float32"),
        *("--strategies", "prompt_lookup,draft_model"),
    ]
    # It can't end by itself before it has been killed.
    victim = start(*arguments, "--budget", "10m", "--trials", "100000")
    while len(trials_in(db)) < 2:
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.05)
    victim.kill()
    victim.communicate()
    finished = trials_in(db)  # it may have finished more meanwhile
    most = str(len(finished) + 3)
    again = start(*arguments, "--budget", "4s", "--trials", most)
    out, told = again.communicate(timeout=600)
    assert again.returncode == 0, told
    after = trials_in(db)
    assert after[: len(finished)] == finished
    assert len({params for _, params in after}) == len(after)
    assert len({number for number, _ in after}) == len(after)
    result = json.loads(out)
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
        (["--budget", "soon"], "90s, 1h30m or 600"),
        (["--workload", "/nowhere.jsonl"], "can't read the workload /nowhere.jsonl"),
        (["--strategies", "guess"], "no strategy 'guess'; known:"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_1(
    host: Host,
    arguments: list[str],
    said: str,
    tiny_pair: tuple[str, str],
    tmp_path: Path,
) -> None:
    given = ["tune", "--model", tiny_pair[0], "--db", str(tmp_path / "p.db")]
    done = CliRunner().invoke(build_cli(host), [*given, *arguments], obj=host)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_budget_may_be_a_number_of_trials() -> None:
    found = [parse_budget(t) for t in ("60 trials", "1trial", "7 Trials")]
    assert found == [(math.inf, 60), (math.inf, 1), (math.inf, 7)]


def test_a_budget_may_be_a_time() -> None:
    assert parse_budget("1h30m") == (5400.0, None)


@pytest.mark.parametrize("text", ["0s", "0 trials", "1.5 trials", "-1m", "soon", ""])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(AdaptSpecError, match="--budget must be") as refused:
        parse_budget(text)
    said = str(refused.value)
    assert said.endswith(f"got {text!r}")
    assert len(said.splitlines()) == 1
