"""What fails on the way of a tune costs itself, not what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.cli.progress import Progress
from adaptspec.errors import AdaptSpecError, ProfileStoreError
from adaptspec.host import Host
from adaptspec.profile import PLAIN, Profile, ProfileStore, Trial
from adaptspec.testing.fakes import FakeClock
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.distributed.workers import open_search, work
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Profiler,
    Sample,
    Setting,
)
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.records import plain_key
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tuning_run import Stopped, TuneInputs
from tuner_fakes import PLACE, FakeMeasurer, Knob, MeasuredWhole

CLASSES = ("chat", "code")
WORKLOAD = Workload(
    "w", tuple(Prompt(f"{c}{i}", c, text="x") for c in CLASSES for i in range(8))
)
TUNING, HELD_OUT = split(WORKLOAD)


class Trace(FakeMeasurer):
    """Knobs are twice as fast; some prompts take more memory than there is."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.too_large: set[str] = set()
        self.unclear = False
        self.asked: list[str] = []

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        self.asked.append(prompt.id)
        if prompt.id in self.too_large:
            raise RuntimeError("can't allocate memory\nfor a tensor")
        self.clock.advance(1.0)
        plain = setting.strategy == PLAIN
        tokens = (1, 2, 4) if self.unclear and not plain else (1, 2, 3)
        speed = 10.0 if plain else 20.0
        return Sample(tokens, speed, 2 / speed, forwards=2)

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        if tuple(plain) != tuple(other):
            raise RuntimeError("can't allocate memory")
        return "identical"


def run(trace: Trace, store: ProfileStore, **options: Any) -> TuneResult:
    return tune_with(
        TuneInputs(
            trace,
            [Knob],
            WORKLOAD,
            store,
            PLACE,
            TuneOptions(budget=1000.0, trials=3),
            clock=trace.clock,
            progress=Progress(None, trace.clock),
            **options,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", [TUNING, HELD_OUT])
def test_a_prompt_that_fails_is_named_and_the_others_count(part: Workload) -> None:
    trace = Trace()
    bad = part.by_class()["chat"][1].id
    trace.too_large = {bad}
    store = MemoryStore()
    for _ in range(2):  # a run that is continued gets past it, too
        result = run(trace, store)
        assert [found.name for found in result.named] == ["chat", "code"]
        assert [found.choice.strategy for found in result.named] == ["knob", "knob"]
        (said,) = [note for note in result.notes if bad in note]
        assert said == (
            f"prompt {bad!r} is left out: RuntimeError: can't allocate memory"
        )
    held_out = {f.name: f.profiles[0].measurement.prompts for f in result.named}
    assert held_out["code"] == 4
    assert held_out["chat"] == (4 if part is TUNING else 3)


def test_a_class_whose_prompts_all_fail_leaves_the_others() -> None:
    trace = Trace()
    trace.too_large = {p.id for p in HELD_OUT.by_class()["chat"]}
    result = run(trace, MemoryStore())
    assert [found.name for found in result.named] == ["code"]
    assert any(note.startswith("chat: plain decoding fails") for note in result.notes)


def test_where_every_prompt_fails_it_is_an_error_with_the_reason() -> None:
    trace = Trace()
    trace.too_large = {p.id for p in WORKLOAD.prompts}
    with pytest.raises(AdaptSpecError, match="can't allocate memory") as caught:
        run(trace, MemoryStore())
    assert len(str(caught.value).splitlines()) == 1


def test_an_output_that_cannot_be_compared_is_never_chosen() -> None:
    trace = Trace()
    trace.unclear = True
    result = run(trace, MemoryStore())
    assert {found.choice.strategy for found in result.named} == {PLAIN}


def test_a_replay_that_fails_is_left_out() -> None:
    def replayer(plain: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    result = run(Trace(), MemoryStore(), replayer=replayer)
    assert {found.choice.strategy for found in result.named} == {"knob"}
    assert any("replay: left out: RuntimeError" in note for note in result.notes)


class Full(MemoryStore):
    """Takes no more once ``full`` is set, or from a moment on."""

    full = False
    until = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def _check(self) -> None:
        self.writes += 1
        if self.full or self.writes > self.until:
            raise ProfileStoreError("can't use the profile database p.db: disk is full")

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        self._check()
        super().put_record(run, key, value)

    def add_trial(self, trial: Trial) -> None:
        self._check()
        super().add_trial(trial)

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        self._check()
        return super().add_profiles(profiles)


def test_what_cannot_be_stored_is_still_in_the_result() -> None:
    class FullInTheEnd(Full):
        def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
            found = super().add_profiles(profiles)
            self.full = self.first  # after the first class
            return found

        first = True

    store = FullInTheEnd()
    with pytest.raises(Stopped, match=r"not all of it is stored: .*disk is full") as (
        caught
    ):
        run(Trace(), store)
    classes = caught.value.result.named
    assert [found.choice.strategy for found in classes] == ["knob", "knob"]
    assert {p.prompt_class for p in store.profiles()} == {"chat"}
    store.full = store.first = False
    assert len(run(Trace(), store).named) == 2  # the same command goes on


@pytest.mark.slow
def test_whenever_the_disk_is_full_it_is_one_line_and_nothing_stored_is_repeated() -> (
    None
):
    whole = Full()
    run(Trace(), whole)
    assert whole.writes > 20
    for until in range(0, whole.writes, 5):
        store = Full()
        store.until = until
        with pytest.raises(AdaptSpecError, match="disk is full") as caught:
            run(Trace(), store)
        assert len(str(caught.value).splitlines()) == 1
        store.until = math.inf
        kept = list(store._trials)
        assert len(run(Trace(), store).named) == 2
        assert len(store._trials) == len(whole._trials)
        assert list(store._trials)[: len(kept)] == kept
        trials = store._trials.values()
        settings = {(t.prompt_class, t.strategy, t.params["k"]) for t in trials}
        assert len(settings) == len(store._trials)


def test_a_study_that_cannot_be_written_is_one_line_with_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    store = SqlStore(str(tmp_path / "p.db"))

    def fail(*arguments: Any, **named: Any) -> Any:
        raise optuna.exceptions.StorageInternalError("during the commit\nof a trial")

    monkeypatch.setattr(optuna.storages.RDBStorage, "_create_new_trial", fail)
    with pytest.raises(AdaptSpecError, match=r"p\.db: .*--db") as caught:
        run(Trace(), store)
    store.close()
    assert len(str(caught.value).splitlines()) == 1


def test_a_worker_with_a_budget_of_trials_does_not_wait_for_ever(
    tmp_path: Path,
) -> None:
    store, clock = SqlStore(str(tmp_path / "p.db")), FakeClock()
    with pytest.raises(AdaptSpecError, match="no search of run mine was open"):
        work(
            Trace(),
            [],
            WORKLOAD,
            store,
            "mine",
            TuneOptions(budget_trials=3),
            deadline=math.inf,
            patience=480.0,
            clock=clock,
            warn=pytest.fail,
            doing=lambda text: None,
            wait=clock.advance,
        )
    assert clock.now == pytest.approx(480.0, abs=1.0)
    store.close()


@pytest.mark.slow
def test_a_worker_runs_no_more_trials_than_its_budget(tmp_path: Path) -> None:
    store, trace = SqlStore(str(tmp_path / "p.db")), Trace()
    prompts = TUNING.by_class()
    for prompt in TUNING.prompts:
        sample = trace.measure(PLAIN_SETTING, prompt)
        key = plain_key(prompt.prompt_class, prompt.id)
        store.put_record("mine", key, sample.as_json())
    open_search(store, "mine", prompts)  # and its leader is killed
    count = work(
        trace,
        [Knob],
        WORKLOAD,
        store,
        "mine",
        TuneOptions(budget_trials=3),
        deadline=math.inf,
        clock=trace.clock,
        warn=pytest.fail,
        doing=lambda text: None,
    )
    assert count == 3
    store.close()


def tuned(host: Host, tiny_pair: tuple[str, str], db: str, *more: str) -> Any:
    arguments = [
        *("tune", "--model", tiny_pair[0], "--db", db, "--budget", "3s"),
        *("--strategies", "prompt_lookup", "--max-new-tokens", "6", *more),
    ]
    return CliRunner().invoke(build_cli(host), arguments, obj=host)


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_what_it_could_not_store(
    host: Host,
    tiny_pair: tuple[str, str],
    four_classes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    def full(*arguments: Any) -> Any:
        raise ProfileStoreError("can't use the profile database p.db: disk is full")

    monkeypatch.setattr(SqlStore, "add_profiles", full)
    more = ["--workload", four_classes] + ["--json"] * as_json
    done = tuned(host, tiny_pair, str(tmp_path / "p.db"), *more)
    assert done.exit_code == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    assert "not all of it is stored" in line
    assert "disk is full" in line
    shown = json.loads(done.stdout)["classes"] if as_json else done.stdout
    assert shown
    if not as_json:
        assert "plain decoding" in done.stdout


def test_a_model_that_ends_at_once_is_an_error_and_not_an_empty_table(
    host: Host,
    tiny_pair: tuple[str, str],
    four_classes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = Sample((1,), 0.0, 0.1)
    monkeypatch.setattr(Profiler, "measure", lambda *a: at_once)
    monkeypatch.setattr(Profiler, "begin", lambda *a: MeasuredWhole(lambda: at_once))
    done = tuned(host, tiny_pair, str(tmp_path / "p.db"), "--workload", four_classes)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "Error: no class could be confirmed, so nothing is chosen"
    )


@pytest.mark.parametrize("kind", ["folder", "file", "read-only"])
def test_a_database_that_cannot_be_written_is_told_before_the_model_is_loaded(
    host: Host, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("in the way, and no database at all" * 9)
    SqlStore(str(tmp_path / "good.db")).close()
    db = {
        "folder": str(tmp_path / "file" / "p.db"),
        "file": str(tmp_path / "file"),
        "read-only": f"sqlite:///file:{tmp_path / 'good.db'}?mode=ro&uri=true",
    }[kind]
    done = tuned(host, (str(tmp_path / "no model"), ""), db)
    assert done.exit_code == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: can't ")
    assert "--db" in line
