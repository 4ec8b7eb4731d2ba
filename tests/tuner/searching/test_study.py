"""Studies in the store's database: seen by Optuna's tools, shared, safe from kills."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.params import Params, Scalar
from adaptspec.profile import Trial
from adaptspec.workloads import Prompt
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Sample, Setting
from adaptspec_tuner.searching.search import Search
from adaptspec_tuner.searching.space import suggest
from adaptspec_tuner.searching.study import (
    SILENT_SECONDS,
    WORKER,
    Study,
    alive,
    this_process,
)
from tuner_fakes import FakeMeasurer, Knob, KnobParams

PROMPTS = [Prompt(str(i), "chat", text="x") for i in range(2)]


class Measured(FakeMeasurer):
    """Fastest at seven."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        time.sleep(self.pause)
        if setting == PLAIN_SETTING:
            return Sample((1, 2), 10.0, 1.0)
        return Sample((1, 2), 20.0 - abs(7 - int(setting.params["k"])), 1.0)


def search(store: SqlStore, most: int = 100, pause: float = 0.0) -> Search:
    found = Search(
        Measured(pause),
        store,
        "r1",
        in_time=lambda: True,
        warn=pytest.fail,
        doing=lambda text: None,
        objective="speed",
        most=most,
        storage=store.studies(),
        labels={"model": "m"},
    )
    found.add("chat", Knob, PROMPTS)
    return found


def study(store: SqlStore, **options: Any) -> Study:
    return Study(
        KnobParams,
        store.trials("r1"),
        storage=store.studies(),
        name="r1/chat/knob",
        **options,
    )


@pytest.fixture
def db(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'p.db'}"


@pytest.fixture
def store(db: str) -> Iterator[SqlStore]:
    opened = SqlStore(db)
    yield opened
    opened.close()


def in_optuna(db: str) -> optuna.Study:
    return optuna.load_study(study_name="r1/chat/knob", storage=db)


def finished(db: str) -> dict[int, float | None]:
    return {
        t.number: t.value
        for t in in_optuna(db).get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    }


@pytest.mark.slow
def test_optunas_own_tools_find_the_trials_by_the_same_address(
    db: str, store: SqlStore
) -> None:
    search(store, most=5).race()
    trials = {t.number: t.detail["ratio"] for t in store.trials("r1")}
    seen = in_optuna(db)
    assert trials
    assert {t.number: t.value for t in seen.trials if t.number in trials} == trials
    assert seen.user_attrs == {"model": "m", "class": "chat", "strategy": "knob"}
    assert seen.best_trial.user_attrs["setting"] == {"k": seen.best_trial.params["k"]}


@pytest.mark.slow
def test_a_search_that_is_continued_repeats_nothing_and_ends_at_the_best(
    store: SqlStore,
) -> None:
    search(store, most=3).race()
    first = store.trials("r1")
    search(store).race()
    trials = store.trials("r1")
    assert trials[: len(first)] == first
    settings = [t.params["k"] for t in trials]
    assert len(settings) == len(set(settings))
    assert max(trials, key=lambda t: t.detail["ratio"]).params["k"] == 7


def begun(store: SqlStore, worker: str) -> tuple[int, dict[str, Scalar]]:
    """A trial begun by ``worker``, and left."""
    asked, setting = study(store).ask()
    asked.set_user_attr(WORKER, worker)
    return asked.number, setting


def another() -> str:
    """A process that lives: the one that started this."""
    host = this_process().rsplit("/", 2)[0]
    parent = psutil.Process(os.getppid())
    return f"{host}/{parent.pid}/{parent.create_time():.2f}"


DEAD = this_process().rsplit("/", 2)[0] + "/4194304/1.00"


@pytest.mark.slow
def test_what_a_dead_process_began_is_tried_again_and_counted_once(
    db: str, store: SqlStore
) -> None:
    number, setting = begun(store, DEAD)
    again, same = study(store).ask()
    assert same == setting
    assert again.number != number
    search(store).race()
    done = [t for t in store.trials("r1") if dict(t.params) == setting]
    assert len(done) == 1
    assert number not in finished(db)


@pytest.mark.slow
def test_what_was_stored_and_not_told_is_told_and_not_run_again(
    db: str, store: SqlStore
) -> None:
    number, setting = begun(store, DEAD)
    detail = {"ratio": 1.7, "prompts": ["0"], "ratios": [1.7], "running": [1.7]}
    store.add_trial(
        Trial("r1", "chat", "knob", number, setting, "complete", 17.0, detail)
    )
    study(store)
    assert finished(db) == {number: 1.7}
    search(store).race()
    assert [dict(t.params) for t in store.trials("r1")].count(setting) == 1


def test_whose_trial_was_given_up_before_it_spoke_begins_another(
    db: str, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = study(store)

    def stalled(params: type[Params], asked: optuna.trial.Trial) -> dict[str, Scalar]:
        if asked.number == 0:
            failed = optuna.trial.TrialState.FAIL
            in_optuna(db).tell(asked.number, state=failed)
        return suggest(params, asked)

    monkeypatch.setattr("adaptspec_tuner.searching.study.suggest", stalled)
    asked, _ = mine.ask()
    assert asked.number == 1
    in_optuna(db).tell(asked.number, state=optuna.trial.TrialState.FAIL)
    assert not mine.report(asked, 0, 1.0)


def test_what_a_living_process_tries_is_left_to_it(store: SqlStore) -> None:
    mine = study(store)
    _, setting = begun(store, another())
    asked, _ = mine.ask()
    assert mine.begun_elsewhere(asked) == {0: setting}


def test_trials_that_others_run_count_towards_the_most(store: SqlStore) -> None:
    found = search(store, most=1)
    begun(store, another())
    found.race()
    assert store.trials("r1") == []


def test_trials_that_only_the_store_has_come_under_their_numbers(
    db: str, store: SqlStore
) -> None:
    for number, k in ((0, 4), (3, 9)):
        detail = {"ratio": float(k), "running": [float(k)]}
        store.add_trial(
            Trial("r1", "chat", "knob", number, {"k": k}, "complete", 1.0, detail)
        )
    asked, _ = study(store).ask()
    assert finished(db) == {0: 4.0, 3: 9.0}
    assert asked.number == 4


def test_a_forgotten_run_takes_its_studies_along(db: str, store: SqlStore) -> None:
    search(store, most=2).race()
    store.delete_run("r1")
    assert optuna.get_all_study_names(db) == []


@pytest.mark.parametrize(
    ("worker", "silent", "lives"),
    [
        (this_process(), 1e9, True),
        (DEAD, 0.0, False),
        (this_process().rsplit("/", 1)[0] + "/1.00", 0.0, False),
        ("elsewhere/1/1.00", SILENT_SECONDS / 2, True),
        ("elsewhere/1/1.00", SILENT_SECONDS * 2, False),
    ],
    ids=["itself", "dead", "its id, reused", "elsewhere", "elsewhere, silent"],
)
def test_a_process_here_is_looked_up_and_one_elsewhere_judged_by_its_silence(
    worker: str, silent: float, lives: bool
) -> None:
    assert alive(worker, silent) is lives


def worker(db: str, pause: float) -> None:
    """What the tests' processes run."""
    store = SqlStore(db)
    search(store, pause=pause).race()
    store.close()


def test_processes_share_a_study_without_trying_a_setting_twice(
    db: str, store: SqlStore, fork_call: Any
) -> None:
    store.studies()
    running = [fork_call(worker, db, 0.02) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    trials = store.trials("r1")
    settings = sorted(int(t.params["k"]) for t in trials)
    assert settings == sorted(set(settings))
    # As one process alone finds.
    assert 7 in settings
    workers = {
        t.user_attrs.get(WORKER)
        for t in in_optuna(db).get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    }
    assert len(workers) == 2


def test_a_killed_process_loses_nothing_finished_and_repeats_nothing(
    db: str, store: SqlStore, fork_call: Any
) -> None:
    store.studies()
    for _ in range(2):
        before = store.trials("r1")
        victim = fork_call(worker, db, 0.05)
        deadline = time.monotonic() + 60
        while len(store.trials("r1")) == len(before) and time.monotonic() < deadline:
            time.sleep(0.02)
        victim.kill()
        victim.wait()
        assert store.trials("r1")[: len(before)] == before
    # Killed before it said who it was, a process is waited for a little.
    study(store, clock=lambda: time.time() + 60)
    before = store.trials("r1")
    search(store).race()
    trials = store.trials("r1")
    assert len(trials) > len(before)
    assert all(trial in trials for trial in before)
    settings = [t.params["k"] for t in trials]
    assert len(settings) == len(set(settings))
    running = in_optuna(db).get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert running == []
