"""``adaptspec tune`` stopped, killed, given a draft model, and four at once."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptspec.errors import stopped_by_user
from adaptspec.profile import EVERY_CLASS

pytestmark = pytest.mark.slow

Rows = Callable[[Path, str], list[tuple[Any, ...]]]

POLL_SECONDS = 0.05
TRIALS = "select run, prompt_class, strategy, number, params from tuning_trials"
# Drafts save no time on tiny models, so that the guard would end them at once.
UNGUARDED = """
from adaptspec.decoding.engine import Engine
*others, guard = Engine.__init__.__defaults__
assert guard is True
Engine.__init__.__defaults__ = (*others, False)
"""
PROFILES = "select id, run, prompt_class, strategy from profiles order by id"


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "profiles.db"


@pytest.fixture
def arguments(tiny_pair: tuple[str, str], four_classes: str, db: Path) -> list[str]:
    return [
        *("--model", tiny_pair[0], "--workload", four_classes, "--db", str(db)),
        *("--max-new-tokens", "8", "--dtype", "float32", "--json"),
    ]


def test_ctrl_c_exits_130_and_keeps_what_was_stored(
    start: Any, arguments: list[str], rows: Rows, db: Path
) -> None:
    only = ["--strategies", "prompt_lookup", "--budget", "10m"]
    running = start(*arguments, *only, "--trials", "100000")
    while not (stored := rows(db, TRIALS)):
        assert running.poll() is None, running.communicate()
        time.sleep(POLL_SECONDS)
    running.send_signal(signal.SIGINT)
    out, told = running.communicate(timeout=600)
    assert running.returncode == 130, told
    assert out == ""
    assert told.splitlines()[-1] == (
        "Error: stopped; finished trials are kept, the same command continues"
    )
    assert "Traceback" not in told
    assert "Loading weights" not in told
    assert set(stored) <= set(rows(db, TRIALS))
    assert rows(db, "pragma integrity_check") == [("ok",)]


def test_an_error_made_of_ctrl_c_is_ctrl_c() -> None:
    def write() -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            raise ValueError("this session can't be closed")  # noqa: B904

    with pytest.raises(ValueError, match="session") as caught:
        write()
    assert stopped_by_user(caught.value)
    assert not stopped_by_user(ValueError("another"))


def test_a_run_killed_while_it_confirms_leaves_whole_classes_and_continues(
    start: Any, arguments: list[str], rows: Rows, db: Path
) -> None:
    options = ["--strategies", "prompt_lookup", "--budget", "10m", "--trials", "1"]
    running = start(*arguments, *options)
    while not rows(db, PROFILES):
        assert running.poll() is None, running.communicate()
        time.sleep(POLL_SECONDS)
    running.kill()
    running.communicate()
    before = rows(db, PROFILES)
    by_class = {
        name: {s for _, _, c, s in before if c == name} for _, _, name, _ in before
    }
    by_class.pop(EVERY_CLASS, None)
    assert by_class
    for strategies in by_class.values():
        assert strategies >= {"autoregressive", "prompt_lookup"}
    again = start(*arguments, *options)
    out, told = again.communicate(timeout=600)
    assert again.returncode == 0, told
    assert [c["class"] for c in json.loads(out)["classes"]] == [*"abcd", EVERY_CLASS]
    after = rows(db, PROFILES)
    # The class confirmed again has its ids still.
    assert set(before) <= set(after)
    assert len({row[1:] for row in after}) == len(after)


def test_a_draft_model_is_tuned_and_changes_no_output(
    start: Any, arguments: list[str], tiny_pair: tuple[str, str], rows: Rows, db: Path
) -> None:
    drafting = ["draft_model", "draft_tree"]
    running = start(
        *arguments,
        *("--draft-model", tiny_pair[1], "--strategies", ",".join(drafting)),
        *("--budget", "10m", "--trials", "2"),
        first=UNGUARDED,
    )
    out, told = running.communicate(timeout=600)
    assert running.returncode == 0, told
    result = json.loads(out)
    assert result["unavailable"] == {}
    assert result["environment"]["draft"] not in (None, result["environment"]["model"])
    assert [found["class"] for found in result["classes"]] == [*"abcd", EVERY_CLASS]
    for found in result["classes"][:-1]:
        assert found["trials"] == dict.fromkeys(drafting, 2)
        drafted = [r for r in found["results"] if r["strategy"] in drafting]
        assert drafted
        for r in found["results"]:
            assert r["lossless"]
            assert r["identical"] + r["near_ties"] == r["prompts"] == 2
        # A draft that often agrees saves forwards, whatever the clock says.
        assert max(r["tokens_per_forward"] for r in drafted) > 1
    stored = rows(db, "select distinct draft from environments")
    assert stored == [(result["environment"]["draft"],)]


def test_four_runs_share_one_fresh_database(
    start: Any, arguments: list[str], rows: Rows, db: Path
) -> None:
    # Two of them are the same run: they must not lose or double each other's trials.
    seeds = ["0", "0", "1", "2"]
    options = ["--budget", "10m", "--trials", "2", "--strategies", "prompt_lookup"]
    running = [start(*arguments, *options, "--seed", seed) for seed in seeds]
    found = []
    for process in running:
        out, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
        found.append(json.loads(out))
    assert found[0]["run"] == found[1]["run"]
    runs = {result["run"] for result in found}
    assert len(runs) == 3
    trials = rows(db, TRIALS)
    counted = Counter((run, name) for run, name, *_ in trials)
    assert counted == {(run, name): 2 for run in runs for name in "abcd"}
    profiles = Counter((run, name) for _, run, name, _ in rows(db, PROFILES))
    named = {(run, name) for run in runs for name in [*"abcd", EVERY_CLASS]}
    assert set(profiles) == named
    assert min(profiles.values()) >= 2  # plain decoding, and a setting at least
