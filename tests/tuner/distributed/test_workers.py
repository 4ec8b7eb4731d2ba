"""Several `tune` processes share one search: equal ones, and nothing tried twice."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from adaptspec.errors import AdaptSpecError
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.distributed.grpc_store import open_remote
from adaptspec_tuner.distributed.workers import close_search, open_search, work
from adaptspec_tuner.options import TuneOptions


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    prompts = [f"w{i} w3 w4 w5 w3 w4" for i in range(2, 8)]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def stored(url: str) -> list[tuple[str, int]]:
    """Settings and numbers of the trials, whatever the database; before it none."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.connect() as connection:
            rows = connection.execute(
                sqlalchemy.text("select params, number from tuning_trials")
            ).all()
        return [(json.dumps(params), number) for params, number in rows]
    except sqlalchemy.exc.DatabaseError:
        return []
    finally:
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgres", "grpc"])
def meeting(
    request: pytest.FixtureRequest, serve: Any, tmp_path: Path
) -> tuple[str, str, str]:
    """Where leader and workers meet: the leader's --db, the workers', and a URL."""
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        return url, url, url
    db = tmp_path / "p.db"
    if request.param == "sqlite":
        return str(db), str(db), f"sqlite:///{db}"
    pytest.importorskip("grpc", reason="needs adaptspec[grpc]")
    server = serve(db)
    line = server.stdout.readline()
    assert " at grpc://localhost:" in line, server.communicate()
    return str(db), line.split()[-1], f"sqlite:///{db}"


def test_workers_share_the_search_and_one_that_dies_is_made_good(
    start: Any,
    tiny_pair: tuple[str, str],
    workload: Path,
    meeting: tuple[str, str, str],
) -> None:
    db, theirs, url = meeting
    arguments = [
        *("--model", tiny_pair[0], "--workload", str(workload)),
        *("--max-new-tokens", "16", "--json", "--dtype", "float32"),
        *("--strategies", "prompt_lookup", "--trials", "60", "--budget", "5m"),
    ]
    workers = [start(*arguments, "--worker", "--db", theirs) for _ in range(2)]
    leader = start(*arguments, "--db", db)
    deadline = time.monotonic() + 240
    while len(stored(url)) < 5 and time.monotonic() < deadline:
        assert leader.poll() is None, (stored(url), leader.communicate())
        time.sleep(0.05)
    workers[0].kill()
    out, told = leader.communicate(timeout=300)
    assert leader.returncode == 0, told
    worked, told = workers[1].communicate(timeout=60)
    assert workers[1].returncode == 0, told
    result = json.loads(out)
    assert json.loads(worked)["run"] == result["run"]
    assert json.loads(worked)["worked"] >= 1
    trials = Counter(params for params, _ in stored(url))
    assert set(trials.values()) == {1}
    assert len({number for _, number in stored(url)}) == len(trials)
    assert 5 <= len(trials) <= 60
    (found,) = result["classes"]
    assert all(r["identical"] == r["prompts"] for r in found["results"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("grpc://localhost", "a proxy's address is like"),
        ("grpc://localhost:x", "a proxy's address is like"),
        ("grpc://localhost:1/x", "a proxy's address is like"),
        ("grpc://localhost:1", "nobody answers.*profiles serve"),
    ],
)
def test_a_bad_proxy_is_one_line_with_the_way_out(
    url: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="needs adaptspec[grpc]")
    monkeypatch.setattr("adaptspec_tuner.distributed.grpc_store.CONNECT_SECONDS", 0.5)
    with pytest.raises(AdaptSpecError, match=rule) as caught:
        open_remote(url)
    assert len(str(caught.value).splitlines()) == 1


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
                TuneOptions(),
                deadline=5.0,
                clock=clock,
                warn=pytest.fail,
                doing=lambda text: None,
                wait=clock.advance,
            )
        close_search(store, "another")  # its leader is done
        clock.now = 0.0
    store.close()
