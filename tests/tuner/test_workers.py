"""Several `tune` processes share one search: equal ones, and nothing tried twice."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adaptspec.errors import AdaptSpecError
from adaptspec.testing.fakes import FakeClock
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.workers import close_search, open_search, work
from adaptspec_tuner.workloads import Prompt, Workload


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    prompts = [f"w{i} w3 w4 w5 w3 w4" for i in range(2, 8)]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def stored(db: Path) -> list[tuple[str, int]]:
    if not db.exists():
        return []
    with closing(sqlite3.connect(db)) as connection:
        try:
            return connection.execute(
                "select params, number from tuning_trials"
            ).fetchall()
        except sqlite3.OperationalError:
            return []


def test_workers_share_the_search_and_one_that_dies_is_made_good(
    start: Any, tiny_pair: tuple[str, str], workload: Path, tmp_path: Path
) -> None:
    db = tmp_path / "p.db"
    arguments = [
        *("--model", tiny_pair[0], "--workload", str(workload), "--db", str(db)),
        *("--max-new-tokens", "16", "--json", "--dtype", "float32"),
        *("--strategies", "prompt_lookup", "--trials", "60", "--budget", "5m"),
    ]
    workers = [start(*arguments, "--worker") for _ in range(2)]
    leader = start(*arguments)
    deadline = time.monotonic() + 240
    while len(stored(db)) < 5 and time.monotonic() < deadline:
        assert leader.poll() is None, leader.communicate()
        time.sleep(0.05)
    workers[0].kill()
    out, told = leader.communicate(timeout=300)
    assert leader.returncode == 0, told
    worked, told = workers[1].communicate(timeout=60)
    assert workers[1].returncode == 0, told
    result = json.loads(out)
    assert json.loads(worked)["run"] == result["run"]
    assert json.loads(worked)["worked"] >= 1
    trials = Counter(params for params, _ in stored(db))
    assert set(trials.values()) == {1}
    assert len({number for _, number in stored(db)}) == len(trials) <= 60
    (found,) = result["classes"]
    assert all(r["identical"] == r["prompts"] for r in found["results"])


def test_a_worker_joins_no_other_run_and_says_what_must_be_equal(
    tmp_path: Path,
) -> None:
    store, clock = SqlStore(f"sqlite:///{tmp_path / 'p.db'}"), FakeClock()
    prompts = [Prompt("p", "chat", text="x")]
    open_search(store, "another", {"chat": prompts})
    measurer: Any = None
    for run in ("mine", "another"):
        with pytest.raises(AdaptSpecError, match=f"no search of run {run}.*same model"):
            work(
                measurer,
                [],
                Workload("w", tuple(prompts)),
                store,
                run,
                storage=store.studies(),
                deadline=5.0,
                clock=clock,
                warn=pytest.fail,
                doing=lambda text: None,
                most=1,
                wait=clock.advance,
            )
        close_search(store, "another")  # its leader is done
        clock.now = 0.0
    store.close()
