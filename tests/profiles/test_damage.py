"""Damaged rows, full disks and files in the way: one line each, the rest is used."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from click.testing import CliRunner

import adaptspec
import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.decoder import PlainDecodingWarning
from adaptspec.errors import ProfileStoreError, StoreWarning
from adaptspec.host import Host
from adaptspec.profile import PLAIN, Trial
from adaptspec.testing.fakes import hf_greedy, random_ids, tiny_model
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from adaptspec_profiles.sql import SqlStore

PROMPT = random_ids(9)
TRIAL = Trial("r1", "chat", "x", 0, {"k": 1}, "complete", 1.0, {"ratio": 1.0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of three profiles, a trial and a record."""
    store = open_store(str(tmp_path / "p.db"))
    store.add_profiles([example_profile(prompt_class=name) for name in "abc"])
    store.add_trial(TRIAL)
    store.put_record("r1", "k", {"a": 1})
    store.close()
    return tmp_path / "p.db"


def change(path: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


DAMAGED = [
    "measurement = '{\"ratio\": 1.0'",
    "measurement = ''",
    "measurement = 'null'",
    "measurement = '[1, 2]'",
    "measurement = json_set(measurement, '$.extra', 1)",
    "measurement = json_remove(measurement, '$.ratio')",
    "measurement = json_set(measurement, '$.ratio', 'fast')",
    "measurement = json_set(measurement, '$.prompts', 1.5)",
    "measurement = x'fffe'",
    "params = '{'",
    "params = '[]'",
    "params = '{\"k\": {}}'",
    "created = 'yesterday'",
    "created = 5",
]


@pytest.mark.slow
@pytest.mark.parametrize("assignment", DAMAGED)
def test_a_damaged_profile_is_named_once_and_the_others_are_used(
    path: Path, assignment: str
) -> None:
    change(path, f"update profiles set {assignment} where id = 2")
    store = open_store(str(path))
    with pytest.warns(StoreWarning, match=r"row 2 of profiles in .*p\.db is dam") as w:
        read = [store.profiles(), store.profiles(prompt_class="a"), store.profiles()]
    assert [sorted(p.prompt_class for p in one) for one in read] == [
        ["a", "c"],
        ["a"],
        ["a", "c"],
    ]
    (said,) = w
    assert len(str(said.message).splitlines()) == 1
    assert "profiles delete" in str(said.message)
    with pytest.raises(ProfileStoreError) as caught:
        store.profile(2)
    assert len(str(caught.value).splitlines()) == 1
    # Measured again it is whole, under the id that it had.
    assert store.add_profiles([example_profile(prompt_class="b")]) == [2]
    assert len(store.profiles()) == 3
    store.close()


def test_text_that_is_none_is_damage_too(path: Path) -> None:
    change(path, "update profiles set strategy = cast(x'fffe' as text) where id = 2")
    store = open_store(str(path))
    with pytest.warns(StoreWarning, match="row 2 of profiles .* UTF-8"):
        assert {p.prompt_class for p in store.profiles()} == {"a", "c"}
    store.close()


def test_an_environment_is_mended_when_it_is_measured_in_again(path: Path) -> None:
    change(path, "update environments set versions = '{'")
    store = open_store(str(path))
    with pytest.warns(StoreWarning, match="rows 1, 2, 3 of profiles"):
        assert store.profiles() == []
    store.add_profiles([example_profile(prompt_class="a")])
    assert len(store.profiles()) == 3
    store.close()


@pytest.mark.parametrize(
    "assignment",
    [
        "detail = '{'",
        "detail = '5'",
        "params = x'ff'",
        "number = 'first'",
        "value = 'x'",
    ],
)
def test_a_damaged_trial_is_left_out_and_can_be_put_again(
    path: Path, assignment: str
) -> None:
    change(path, f"update tuning_trials set {assignment}")
    store = open_store(str(path))
    with pytest.warns(StoreWarning, match="row 1 of tuning_trials"):
        assert store.trials("r1") == []
    store.add_trial(TRIAL)
    assert store.trials("r1") == [TRIAL]
    store.close()


@pytest.mark.parametrize("value", ["{", "[1]", "null", "5"])
def test_a_damaged_record_is_as_none_and_can_be_put_again(
    path: Path, value: str
) -> None:
    change(path, "update tuning_records set value = ?", value)
    store = open_store(str(path))
    with pytest.warns(StoreWarning, match="row r1 k of tuning_records"):
        assert store.record("r1", "k") is None
    store.put_record("r1", "k", {"b": 2})
    assert store.record("r1", "k") == {"b": 2}
    store.close()


def in_the_way(folder: Path) -> str:
    (folder / "file").write_text("no folder")
    return str(folder / "file" / "data" / "p.db")


def no_folder_at_all(folder: Path) -> str:
    return "/proc/adaptspec/p.db"


def a_folder(folder: Path) -> str:
    return str(folder)


def no_database(folder: Path) -> str:
    (folder / "p.db").write_text("no database at all, but long enough to be read" * 9)
    return str(folder / "p.db")


def cut(folder: Path) -> str:
    path = folder / "p.db"
    SqlStore(str(path)).close()
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    return str(path)


def newer(folder: Path) -> str:
    path = folder / "p.db"
    SqlStore(str(path)).close()
    change(path, "update adaptspec_version set version_num = 'm999'")
    return str(path)


def nobody_home(folder: Path) -> str:
    return "~nobody-of-this-name/p.db"


UNUSABLE = [
    in_the_way,
    no_folder_at_all,
    a_folder,
    no_database,
    cut,
    newer,
    nobody_home,
]


@pytest.mark.parametrize(
    "make",
    [*UNUSABLE, lambda f: "oracle://x", lambda f: "postgresql://u@localhost:1/x"],
)
def test_a_database_that_cannot_be_used_is_one_line_with_the_way_out(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    host = Host({"profiles": adaptspec_profiles.plugin})
    db = make(tmp_path)
    for command in (["list"], ["export"], ["delete", "r1"], ["show", "1"]):
        arguments = ["profiles", *command, "--db", db]
        done = CliRunner().invoke(build_cli(host), arguments, obj=host)
        assert done.exit_code == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("Error: ")
        assert "--db" in line


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("make", UNUSABLE)
def test_decoding_without_a_usable_store_is_plain_and_says_so_once(
    tmp_path: Path,
    make: Callable[[Path], str],
    by_variable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})
    db = make(tmp_path)
    monkeypatch.setenv("ADAPTSPEC_DB", db)
    model = tiny_model("llama")
    with pytest.warns(PlainDecodingWarning, match="store of profiles can't be") as said:
        decoder = adaptspec.load(model, db=None if by_variable else db, host=host)
    assert len(said) == 1
    assert issubclass(said[0].category, StoreWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [decoder.generate(PROMPT, max_new_tokens=6) for _ in range(2)]
    for result in results:
        assert result.token_ids == hf_greedy(model, PROMPT, 6)
        assert result.choice.strategy == PLAIN
        assert "can't be used" in result.choice.reason


def test_a_store_that_fails_while_it_is_read_is_given_up(path: Path) -> None:
    change(path, "drop table choices")
    host = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})
    for db in (str(path), open_store(str(path))):
        with pytest.warns(PlainDecodingWarning, match="no such table"):
            decoder = adaptspec.load(tiny_model("llama"), db=db, host=host)
        assert decoder.choose("a").strategy == PLAIN
        if not isinstance(db, str):
            db.close()


def test_the_command_decodes_and_says_so_in_a_line(tmp_path: Path, fork: Any) -> None:
    folder = tmp_path / "model"
    from adaptspec.testing.fakes import tiny_module, tiny_tokenizer

    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    running = fork(
        "from adaptspec import cli\ncli.main(arguments)",
        {"ADAPTSPEC_NATIVE": "0"},
        arguments=[
            *("generate", "w2 w3", "-m", str(folder), "-n", "4", "-s", PLAIN),
            *("--db", no_database(tmp_path)),
        ],
    )
    out, told = running.communicate(timeout=300)
    assert running.returncode == 0, told
    assert out.strip()
    (line,) = [x for x in told.splitlines() if x.startswith("Warning: ")]
    assert "p.db: file is not a database" in line


def test_a_full_disk_is_one_line_that_says_so(path: Path) -> None:
    store = SqlStore(str(path))

    def full(connection: Any, record: Any, proxy: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sqlalchemy.event.listen(store._engine, "checkout", full)
    large = {"text": "x" * 2**20}
    writes: list[Callable[[], object]] = [
        lambda: store.put_record("r2", "k", large),
        lambda: store.add_trial(Trial("r2", "a", "x", 0, {}, "failed", None, large)),
        lambda: store.add_profiles([example_profile(workload_name="x" * 2**20)]),
    ]
    for write in writes:
        with pytest.raises(
            ProfileStoreError, match="disk is full; free some"
        ) as caught:
            write()
        assert len(str(caught.value).splitlines()) == 1
    assert len(store.profiles()) == 3
    store.close()


def test_a_file_that_may_only_be_read_is_one_line_that_says_so(path: Path) -> None:
    store = SqlStore(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert len(store.profiles()) == 3
    with pytest.raises(ProfileStoreError, match="readonly database; make the file"):
        store.put_record("r2", "k", {})
    store.close()


def test_a_database_that_another_process_holds_is_one_line_that_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptspec_profiles.engine.BUSY_SECONDS", 0)
    store = SqlStore(str(path))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ProfileStoreError, match="locked; end the process"):
            store.put_record("r2", "k", {})
    store.close()


@pytest.mark.skipif(os.name != "posix", reason="/dev/full")
def test_an_export_that_does_not_fit_is_one_line(path: Path) -> None:
    host = Host({"profiles": adaptspec_profiles.plugin})
    arguments = ["profiles", "export", "--db", str(path), "-o", "/dev/full"]
    done = CliRunner().invoke(build_cli(host), arguments, obj=host)
    assert done.exit_code == 1
    (line,) = done.stderr.strip().splitlines()
    assert "No space left on device" in line
