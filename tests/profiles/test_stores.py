"""Both stores keep the contract; the SQL one survives kills and old files."""

from __future__ import annotations

import io
import json
import math
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import optuna
import pytest
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sqlalchemy import inspect

from adaptspec.errors import ProfileStoreError
from adaptspec.host import Host
from adaptspec.profile import Environment, ProfileStore, Trial, Use
from adaptspec.testing.stores import (
    ProfileStoreContract,
    example_choice,
    example_profile,
)
from adaptspec_profiles import open_store
from adaptspec_profiles.as_json import profile_from_json, profile_to_json
from adaptspec_profiles.commands import profiles as profiles_command
from adaptspec_profiles.engine import make_engine
from adaptspec_profiles.exchange import FORMAT, FORMAT_1
from adaptspec_profiles.migrations import VERSION_TABLE, migrate
from adaptspec_profiles.renamed import RENAMED
from adaptspec_profiles.schema import Base
from adaptspec_profiles.sql import SqlStore

# Imports file after file of as many profiles, each file a run of its own.
IMPORTER = """
import json, sys
from pathlib import Path
from adaptspec_profiles.commands import profiles
from adaptspec_profiles.exchange import FORMAT
url, folder, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
profile = json.loads(sys.argv[4])
for number in range(10_000):
    records = [
        {**profile, "run": str(number), "prompt_class": str(i)} for i in range(size)
    ]
    file = folder / "next.json"
    file.write_text(json.dumps({"format": FORMAT, "profiles": records}))
    profiles.main(["import", str(file), "--db", url], standalone_mode=False)
    print(number, flush=True)
"""


class TestMemoryStore(ProfileStoreContract):
    @pytest.fixture
    def store(self) -> ProfileStore:
        return open_store("memory:")


class TestSqlStore(ProfileStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ProfileStore:
        return open_store(str(tmp_path / "new folder" / "profiles.db"))


@pytest.mark.slow
def test_profiles_after_a_killed_import_are_those_of_whole_files(
    tmp_path: Path,
) -> None:
    path, size = tmp_path / "p.db", 40
    record = json.dumps(profile_to_json(example_profile()))
    importer = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, str(path), str(tmp_path), str(size), record],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert importer.stdout is not None
    seen = -1
    for line in importer.stdout:
        seen = int(line)
        if seen >= 5:
            break
    importer.send_signal(signal.SIGKILL)
    importer.communicate()
    store = open_store(str(path))
    runs = Counter(p.run for p in store.profiles())
    assert set(runs.values()) == {size}
    assert set(runs) >= {str(number) for number in range(seen + 1)}
    assert len(runs) <= seen + 20
    store.add_profiles([example_profile(run="after")])
    assert len(store.profiles(run="after")) == 1
    store.close()


def test_models_and_migrations_give_one_schema(tmp_path: Path) -> None:
    migrated = make_engine(str(tmp_path / "a.db"))
    assert migrate(migrated) == [
        "m001",
        "m002",
        "m003",
        "m004",
        "m005",
        "m006",
        "m007",
        "m008",
    ]
    assert migrate(migrated) == []
    created = make_engine(str(tmp_path / "b.db"))
    Base.metadata.create_all(created)
    ours, theirs = inspect(migrated), inspect(created)
    tables = set(theirs.get_table_names())
    assert set(ours.get_table_names()) == tables | {VERSION_TABLE}
    for table in tables:
        assert [str(c) for c in ours.get_columns(table)] == [
            str(c) for c in theirs.get_columns(table)
        ]
        assert ours.get_indexes(table) == theirs.get_indexes(table)
        assert ours.get_foreign_keys(table) == theirs.get_foreign_keys(table)
        assert ours.get_unique_constraints(table) == theirs.get_unique_constraints(
            table
        )
    migrated.dispose()
    created.dispose()


def test_an_older_releases_file_gives_no_id_twice_either(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            (Path(__file__).parent / "golden" / "m004.sql").read_text()
        )
    connection.close()
    store = open_store(str(path))
    (old,) = store.profiles()
    store.delete_run(old.run)
    (new,) = store.add_profiles([example_profile()])
    assert new != old.id
    store.close()


def test_a_step_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    steps = tmp_path / "steps" / "versions"
    steps.mkdir(parents=True)
    (steps / "x1.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        "revision, down_revision = 'x1', None\n"
        "def upgrade():\n"
        "    op.create_table('first', sa.Column('id', sa.Integer()))\n"
        "    raise RuntimeError('power cut')\n"
    )
    engine = make_engine(str(tmp_path / "p.db"))
    with pytest.raises(RuntimeError, match="power cut"):
        migrate(engine, script=ScriptDirectory(str(steps.parent)))
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_newer_database_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    open_store(str(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = 'm999'")
    connection.close()
    with pytest.raises(ProfileStoreError, match=r"m999.*upgrade adaptspec"):
        open_store(str(path))


def older(place: Environment, **changes: Any) -> Environment:
    """The environment as releases kept it that didn't know all of its key."""
    return replace(place, configuration=None, kernel=None, attention=None, **changes)


@pytest.mark.slow
def test_the_first_releases_database_still_opens(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "m001.sql"
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(golden.read_text())
    connection.close()
    store = open_store(str(path))
    (profile,) = store.profiles()
    expected = example_profile()
    # What it didn't measure is unknown.
    known = asdict(expected.measurement)
    for name in ("interval_low", "interval_high", "latency_p95", "peak_memory"):
        known[name] = None
    known["objective"] = "speed"
    assert asdict(profile.measurement) == known
    place = older(expected.environment, heads=None, heads_name=None)
    assert replace(profile, id=None) == replace(
        expected, measurement=profile.measurement, environment=place
    )
    assert [t.value for t in store.trials("r1")] == [12.5]
    # Measured again at the same place, it is the same place.
    store.add_profiles([replace(profile, run="r2")])
    store.close()
    with sqlite3.connect(path) as connection:
        (places,) = connection.execute("SELECT count(*) FROM environments").fetchone()
    connection.close()
    assert places == 1


def test_a_database_with_trained_heads_still_opens(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "m002.sql"
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(golden.read_text())
    connection.close()
    store = open_store(str(path))
    (profile,) = store.profiles()
    expected = example_profile()
    place = older(expected.environment)
    assert replace(profile, id=None) == replace(expected, environment=place)
    store.close()


@pytest.mark.parametrize("strategy", RENAMED)
def test_parameters_stored_under_old_names_get_the_new_ones(
    tmp_path: Path, strategy: str
) -> None:
    new = Host.installed().strategy(strategy).Params().model_dump()
    old_names = {name: old for old, name in RENAMED[strategy].items()}
    assert set(old_names) <= set(new)
    old = {old_names.get(name, name): value for name, value in new.items()}
    settings = [json.dumps([strategy, params], sort_keys=True) for params in (old, new)]
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            (Path(__file__).parent / "golden" / "m002.sql").read_text()
        )
        connection.execute(
            "update profiles set strategy = ?, params = ?", (strategy, json.dumps(old))
        )
        connection.execute(
            "insert into tuning_trials"
            " values (1, 'r1', 'a', ?, 0, ?, 'failed', 1, '{}')",
            (strategy, json.dumps(old)),
        )
        records = {
            "predicted/chat": {settings[0]: 1.5},
            "confirm/chat": {"positions": {settings[0]: [[1, 2]]}, "prompts": {}},
            f"replayed/chat/{strategy}": {"trials": [{"number": 0, "params": old}]},
            "other": {"params": old},
        }
        connection.executemany(
            "insert into tuning_records values ('r1', ?, ?)",
            [(key, json.dumps(value)) for key, value in records.items()],
        )
        connection.execute("insert into tuning_records values ('r1', 'confirm', '{')")
    connection.close()
    store = open_store(str(path))
    assert [p.params for p in store.profiles()] == [new]
    assert [t.params for t in store.trials("r1")] == [new]
    assert {key: store.record("r1", key) for key in records} == {
        "predicted/chat": {settings[1]: 1.5},
        "confirm/chat": {"positions": {settings[1]: [[1, 2]]}, "prompts": {}},
        f"replayed/chat/{strategy}": {"trials": [{"number": 0, "params": new}]},
        "other": {"params": old},
    }
    store.close()


def test_the_gate_is_dropped_wherever_settings_are_stored(tmp_path: Path) -> None:
    new = Host.installed().strategy("suffix").Params().model_dump()
    old = {**new, "gate": True}
    settings = [json.dumps(["suffix", params], sort_keys=True) for params in (old, new)]
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            (Path(__file__).parent / "golden" / "m003.sql").read_text()
        )
        connection.execute(
            "update profiles set strategy = 'suffix', params = ?", [json.dumps(old)]
        )
        connection.execute(
            "insert into tuning_trials"
            " values (1, 'r1', 'a', 'suffix', 0, ?, 'failed', 1, '{}')",
            [json.dumps(old)],
        )
        records = {
            "predicted/chat": {settings[0]: 1.5},
            "replayed/chat/suffix": {"trials": [{"number": 0, "params": old}]},
        }
        connection.executemany(
            "insert into tuning_records values ('r1', ?, ?)",
            [(key, json.dumps(value)) for key, value in records.items()],
        )
    connection.close()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    choices = optuna.distributions.CategoricalDistribution((False, True))
    for name, attributes in (
        ("r1/a/suffix", {"setting": old, "result": {"params": old, "value": 1}}),
        ("another's", {}),
    ):
        study = optuna.create_study(storage=storage, study_name=name)
        study.enqueue_trial({"gate": True}, user_attrs=attributes)
        study.ask({"gate": choices})
    storage.engine.dispose()
    store = open_store(str(path))
    assert [p.params for p in store.profiles()] == [new]
    assert [t.params for t in store.trials("r1")] == [new]
    assert store.record("r1", "predicted/chat") == {settings[1]: 1.5}
    assert store.record("r1", "replayed/chat/suffix") == {
        "trials": [{"number": 0, "params": new}]
    }
    store.close()
    ours, theirs = (
        optuna.load_study(storage=storage, study_name=name).get_trials()[0]
        for name in ("r1/a/suffix", "another's")
    )
    assert ours.params == {}
    assert ours.user_attrs == {"setting": new, "result": {"params": new, "value": 1}}
    assert ours.system_attrs["fixed_params"] == {}
    assert theirs.params == theirs.system_attrs["fixed_params"] == {"gate": True}
    storage.engine.dispose()


@pytest.mark.parametrize("form", [FORMAT, FORMAT_1])
def test_an_exported_gate_is_left_out(tmp_path: Path, form: str) -> None:
    path, db = tmp_path / "x.json", str(tmp_path / "p.db")
    record = {**GOOD, "strategy": "suffix", "params": {"tree": True, "gate": False}}
    path.write_text(json.dumps({"format": form, "profiles": [record]}))
    run_command("import", str(path), "--db", db)
    store = open_store(db)
    assert [p.params for p in store.profiles()] == [{"tree": True}]
    store.close()


def test_an_export_of_the_first_format_is_imported_with_the_new_names(
    tmp_path: Path,
) -> None:
    path, db = tmp_path / "x.json", str(tmp_path / "p.db")
    record = {**GOOD, "strategy": "draft_model", "params": {"k": 3, "stop": 0.5}}
    path.write_text(json.dumps({"format": FORMAT_1, "profiles": [record]}))
    run_command("import", str(path), "--db", db)
    store = open_store(db)
    assert [p.params for p in store.profiles()] == [{"draft_length": 3, "stop": 0.5}]
    store.close()


def test_optuna_shares_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(storage=storage, study_name="s")
    store = open_store(str(path))
    store.add_profiles([example_profile()])
    assert optuna.get_all_study_names(storage) == ["s"]
    assert len(store.profiles()) == 1
    store.close()
    storage.engine.dispose()


@pytest.mark.slow
def test_a_waiting_trial_goes_to_one_of_two_that_ask_at_once(tmp_path: Path) -> None:
    running = optuna.trial.TrialState.RUNNING
    stores = [SqlStore(f"sqlite:///{tmp_path / 'p.db'}") for _ in range(2)]
    first, second = (store.studies() for store in stores)
    study = optuna.create_study(storage=first, study_name="s")
    study.enqueue_trial({"x": 1})
    (waiting,) = study.get_trials(deepcopy=False)
    taken: list[bool] = []

    def ask(storage: optuna.storages.RDBStorage) -> None:
        taken.append(storage.set_trial_state_values(waiting._trial_id, running))

    other = threading.Thread(target=ask, args=[second])
    check = first.check_trial_is_updatable

    def meanwhile(*args: Any) -> None:
        # The first has read the state, and has not written it.
        other.start()
        other.join(timeout=0.5)
        check(*args)

    with patch.object(first, "check_trial_is_updatable", meanwhile):
        ask(first)
    other.join()
    assert sorted(taken) == [False, True]
    for store in stores:
        store.close()


@pytest.mark.parametrize("name", ["a?b.db", "a#b%20c.db", "plain name.db"])
def test_a_path_opens_the_file_of_exactly_that_name(tmp_path: Path, name: str) -> None:
    open_store(str(tmp_path / name)).close()
    assert [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h:1/x?password=s3cr3t",
        "postgresql://u:s3cr3t@h:1/x",
        "postgresql://u:s3cr3t@h:port/x",
        "nosuchdialect://h/x?user=u&passwd=s3cr3t",
    ],
)
def test_no_password_is_ever_printed(url: str) -> None:
    with pytest.raises(ProfileStoreError, match="--db takes") as caught:
        open_store(url)
    assert "s3cr3t" not in str(caught.value)


def test_a_trial_that_breaks_a_rule_is_not_dropped_silently(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "p.db"))
    broken = Trial("r1", "chat", "x", 0, {}, cast(Any, None), None)
    with pytest.raises(ProfileStoreError, match="state"):
        store.add_trial(broken)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[/a]", "[bold]"])
def test_class_names_are_listed_as_they_are(tmp_path: Path, name: str) -> None:
    db = str(tmp_path / "p.db")
    store = open_store(db)
    store.add_profiles([example_profile(prompt_class=name)])
    store.close()
    listed = CliRunner().invoke(profiles_command, ["list", "--db", db])
    assert listed.exception is None
    assert name in listed.stdout


def test_what_cant_be_opened_is_one_error_with_the_way_out(tmp_path: Path) -> None:
    bad = tmp_path / "not-a-database.db"
    bad.write_text("hello, this is no database at all, but long enough to be read")
    for url in (str(bad), "nosuchdialect://x", "postgresql://u:secret@localhost:1/x"):
        with pytest.raises(ProfileStoreError, match="--db takes") as caught:
            SqlStore(url)
        assert "secret" not in str(caught.value)


WITHOUT_ZERO = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@given(
    params=st.dictionaries(
        st.text(WITHOUT_ZERO, min_size=1, max_size=8),
        st.one_of(
            st.booleans(),
            st.integers(-(10**9), 10**9),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(WITHOUT_ZERO, max_size=5),
        ),
        max_size=4,
    ),
    name=st.text(WITHOUT_ZERO, max_size=10),
)
def test_export_and_import_give_back_an_equal_profile(
    params: dict[str, bool | int | float | str], name: str
) -> None:
    profile = example_profile(params=params, workload_name=name)
    record = json.loads(json.dumps(profile_to_json(profile)))
    assert profile_from_json(record) == profile


def test_the_commands_list_show_export_and_import(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a.db"), str(tmp_path / "b.db")
    store = open_store(first)
    store.add_profiles([example_profile(), example_profile(prompt_class="code")])
    store.close()
    run = CliRunner()
    listed = run.invoke(profiles_command, ["list", "--json", "--db", first])
    documents = json.loads(listed.stdout)
    assert {d["prompt_class"] for d in documents} == {"chat", "code"}
    shown = run.invoke(
        profiles_command, ["show", str(documents[0]["id"]), "--db", first]
    )
    assert "prompt_lookup" in shown.stdout
    exported = tmp_path / "x.json"
    run.invoke(profiles_command, ["export", "-o", str(exported), "--db", first])
    for _ in range(2):
        done = run.invoke(profiles_command, ["import", str(exported), "--db", second])
        assert done.exit_code == 0
    again = json.loads(
        run.invoke(profiles_command, ["list", "--json", "--db", second]).stdout
    )
    assert len(again) == 2
    table = run.invoke(profiles_command, ["list", "--db", second])
    assert "prompt_lookup" in table.stdout
    run.invoke(profiles_command, ["delete", "r1", "--db", second])
    empty = run.invoke(profiles_command, ["list", "--json", "--db", second])
    assert json.loads(empty.stdout) == []


def test_on_a_narrow_terminal_a_run_and_figures_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = str(tmp_path / "p.db")
    store = open_store(db)
    name = "0123456789abcdef"
    long = {f"parameter_number_{i}": i for i in range(9)}
    other = example_profile(run=name, strategy="b", params=long)
    store.add_profiles([example_profile(run=name, params=long), other])
    store.put_choices([example_choice(run=name)])
    store.close()
    narrow = Console(width=80, markup=False, file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr("adaptspec_profiles.commands.stdout_console", lambda: narrow)
    heading = run_command("list", "--db", db)
    assert [line for line in heading.splitlines() if name in line]
    run_command("list", "--runs", "--db", db)
    run_command("compare", name, "--db", db)
    printed = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count(name) == 2
    assert "…" not in printed
    for figure in ("1.50", "chat"):
        assert figure in printed
    for key in long:
        assert f"{key}={long[key]}" in "".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80


def test_importing_twice_adds_nothing_and_keeps_the_ids(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a.db"), str(tmp_path / "b.db")
    for db, runs in ((first, "uvw"), (second, "x")):
        store = open_store(db)
        for run in runs:
            store.add_profiles([example_profile(run=run)])
        store.close()
    exported = tmp_path / "x.json"
    run_command("export", "-o", str(exported), "--db", first)
    seen = []
    for _ in range(2):
        assert "3 profiles" in run_command("import", str(exported), "--db", second)
        listed = json.loads(run_command("list", "--json", "--db", second))
        seen.append({d["run"]: d["id"] for d in listed})
    assert seen[0] == seen[1]
    assert set(seen[0]) == set("uvwx")
    assert len(set(seen[0].values())) == 4


def run_command(*arguments: str) -> str:
    done = CliRunner().invoke(profiles_command, arguments)
    assert done.exit_code == 0, done.exception
    return done.output


GOOD = profile_to_json(example_profile())
EXPORTED = {"format": FORMAT, "profiles": [GOOD]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": ', "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("1" * 6000, "is not JSON"),
        ([GOOD], "must have been written by"),
        ({**EXPORTED, "profiles": None}, "a list 'profiles'"),
        ({"format": EXPORTED["format"]}, "a list 'profiles'"),
        ({**EXPORTED, "notes": 1}, "nothing else, got 'format', 'profiles', 'notes'"),
        ({**EXPORTED, "profiles": [GOOD, None]}, "profile 2: an object is expected"),
    ],
    ids=range(8),
)
def test_a_file_that_no_export_wrote_is_refused_in_one_line(
    tmp_path: Path, content: Any, said: str
) -> None:
    path, db = tmp_path / "x.json", str(tmp_path / "p.db")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    done = CliRunner().invoke(profiles_command, ["import", str(path), "--db", db])
    assert isinstance(done.exception, ProfileStoreError)
    assert said in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1
    assert not Path(db).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speed": 3}, "speed: no such field; known: environment,"),
        (
            {"environment": {**GOOD["environment"], "gpu": 1}},
            "environment.gpu: no such",
        ),
        ({"environment": None}, "environment: input should be an object, got None"),
        ({"measurement": {**GOOD["measurement"], "ratio": "2"}}, "measurement.ratio"),
        ({"measurement": {**GOOD["measurement"], "ratio": float("nan")}}, "finite"),
        ({"params": {"k": float("inf")}}, "params.k: must be a finite number"),
        ({"params": {"k": [1]}}, "params.k: must be a number, text, true or false"),
        ({"created": "9999-12-31T23:59:59-12:00"}, "created: must lie in the years"),
        ({"created": "0001-01-01T00:00:00+12:00"}, "created: must lie in the years"),
        ({"created": "2026-01-01T00:00:00"}, "created: must be a time with its zone"),
        ({"created": 5}, "created: input should be a valid datetime"),
        ({"lossless": "yes"}, "lossless: input should be a valid boolean"),
        ({"run": "\ud800"}, "run: must be text that UTF-8 can hold"),
        ({"run": "a\0"}, "run: must be text without a zero character"),
    ],
    ids=range(14),
)
def test_what_is_wrong_in_a_record_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileStoreError) as caught:
        profile_from_json({**GOOD, **changes})
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["99999999999999999999", "0"])
def test_an_id_that_cant_be_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    asked = ["show", name, "--db", str(tmp_path / "p.db")]
    done = CliRunner().invoke(profiles_command, asked)
    assert isinstance(done.exception, ProfileStoreError)
    assert str(done.exception).startswith(f"no profile {name}; ")


@pytest.mark.parametrize(
    "url", ["postgresql://h:port/x", "sqlite://h:1/x", "://", "sqlite+no:///x"]
)
def test_a_bad_url_is_an_error_of_one_line(url: str) -> None:
    with pytest.raises(ProfileStoreError, match="--db takes") as caught:
        open_store(url)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_is_not_text_is_an_error_of_one_line(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "p.db"))
    for ask in (store.trials, store.delete_run):
        with pytest.raises(ProfileStoreError, match="surrogates not allowed"):
            ask("\udcff")  # as the shell gives an argument that is not UTF-8
    store.close()


def test_sqlites_own_uris_make_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_store(str(tmp_path / "p.db")).close()
    store = open_store(f"sqlite:///file:{tmp_path}/p.db?mode=rw&uri=true")
    assert store.profiles() == []
    assert store.folder is None
    store.close()
    assert [f.name for f in tmp_path.iterdir()] == ["p.db"]


def test_a_bad_record_is_named_and_nothing_is_imported(tmp_path: Path) -> None:
    path, db = tmp_path / "x.json", str(tmp_path / "p.db")
    good = profile_to_json(example_profile())
    bad = {**good, "measurement": {**good["measurement"], "ratio": "fast"}}
    path.write_text(json.dumps({"format": FORMAT, "profiles": [good, bad]}))
    done = CliRunner().invoke(profiles_command, ["import", str(path), "--db", db])
    assert isinstance(done.exception, ProfileStoreError)
    assert "profile 2: measurement.ratio" in str(done.exception)
    store = open_store(db)
    assert store.profiles() == []
    store.close()


def test_uses_of_earlier_releases_files_are_empty_and_of_this_ones_read(
    tmp_path: Path,
) -> None:
    for name, expected in (("m003", []), ("m006", [3]), ("m007", [3]), ("m008", [3])):
        golden = Path(__file__).parent / "golden" / f"{name}.sql"
        path = tmp_path / f"{name}.db"
        connection = sqlite3.connect(path)
        connection.executescript(golden.read_text())
        connection.close()
        store = open_store(str(path))
        assert [use.requests for use in store.uses()] == expected
        (kept,) = store.profiles()
        assert kept.id is not None
        store.add_uses([Use(kept.id, "chat", 4, 9, 3, 2, 1, 0.5, 2.0, -1.0, 1.0)])
        assert [use.requests for use in store.uses()] == [sum(expected) + 4]
        store.close()


def test_the_ratios_of_what_an_earlier_release_recorded_are_not_known(
    tmp_path: Path,
) -> None:
    golden = Path(__file__).parent / "golden"
    ratios = []
    for name in ("m006", "m007"):
        connection = sqlite3.connect(tmp_path / f"{name}.db")
        connection.executescript((golden / f"{name}.sql").read_text())
        connection.close()
        store = open_store(str(tmp_path / f"{name}.db"))
        ratios += [use.ratio for use in store.uses()]
        store.close()
    assert ratios == [None, pytest.approx(math.exp(0.4))]


def test_show_sets_what_is_seen_in_use_beside_what_was_tuned(tmp_path: Path) -> None:
    path = str(tmp_path / "p.db")
    store = open_store(path)
    (number,) = store.add_profiles([example_profile()])
    sums = (412, 9000, 4500, 11_250, 3, 0.5, 600.0)
    store.add_uses([Use(number, "chat", *sums, 50 * math.log(1.2), 3.0, 50.0)])
    store.close()
    asked = ["show", str(number), "--db", path]
    shown = CliRunner().invoke(profiles_command, asked)
    assert (
        "chat: 412 requests, 1.20x plain decoding lately (tuned 1.50x), "
        "2.00 tokens per forward (tuned 2.50), 15.0 tokens/s (tuned 20.0)"
    ) in shown.output
    told = json.loads(CliRunner().invoke(profiles_command, [*asked, "--json"]).output)
    (use,) = told["in_use"]
    assert (use["requests"], use["tokens_per_second"]) == (412, 15.0)
    assert use["ratio"] == pytest.approx(1.2)
