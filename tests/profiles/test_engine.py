"""Transactions, write-ahead logging and migrations."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from adaptspec.testing.stores import example_profile
from adaptspec_profiles import migrations, open_store
from adaptspec_profiles.engine import make_engine, on_network_file_system
from adaptspec_profiles.migrations import migrate

GOLDEN = Path(__file__).parent / "golden" / "m001.sql"
NEWEST = GOLDEN.with_name("m008.sql")
STEPS = ["m001", "m002", "m003", "m004", "m005", "m006", "m007", "m008"]
SECOND_STEP = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = 'x2', 'm008'
def upgrade():
    op.add_column('profiles', sa.Column('note', sa.String(), server_default='none'))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.db"


@pytest.fixture
def one_more(tmp_path: Path) -> ScriptDirectory:
    """This release's steps, and one that a later release might add."""
    versions = tmp_path / "steps" / "versions"
    versions.mkdir(parents=True)
    for ours in (Path(migrations.__file__).parent / "versions").glob("m*.py"):
        shutil.copy(ours, versions)
    (versions / "x2.py").write_text(SECOND_STEP)
    return ScriptDirectory(str(versions.parent))


@contextlib.contextmanager
def raw(path: Path, timeout: float = 5.0) -> Iterator[sqlite3.Connection]:
    """A connection that shares no code with ours."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=timeout)
    with contextlib.closing(connection):
        yield connection


def mode(path: Path) -> str:
    with raw(path) as connection:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])


def test_a_reader_neither_waits_for_a_writer_nor_sees_its_half(path: Path) -> None:
    store = open_store(str(path))
    store.add_profiles([example_profile()])
    with raw(path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE profiles SET run = 'half'")
        assert [p.run for p in store.profiles()] == ["r1"]
        assert store.trials("r1") == []
        assert store.record("r1", "plain") is None
        second = open_store(str(path))  # and opening it only reads
        (found,) = second.profiles()
        assert second.profile(found.id or 0) == found
        second.close()
        writer.execute("COMMIT")
    assert [p.run for p in store.profiles()] == ["half"]
    store.close()


def test_a_writer_doesnt_wait_for_a_reader(path: Path) -> None:
    store = open_store(str(path))
    with raw(path) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM profiles").fetchone() == (0,)
        store.add_profiles([example_profile()])
        assert reader.execute("SELECT count(*) FROM profiles").fetchone() == (0,)
    assert len(store.profiles()) == 1
    store.close()


def test_files_log_ahead_and_leave_one_file_when_closed(path: Path) -> None:
    store = open_store(str(path))
    assert mode(path) == "wal"
    store.close()
    assert [f.name for f in path.parent.iterdir()] == ["p.db"]


def test_an_older_file_is_switched_with_its_profiles(path: Path) -> None:
    with raw(path) as connection:
        connection.executescript(GOLDEN.read_text())
    assert mode(path) == "delete"
    store = open_store(str(path))
    (kept,) = store.profiles()
    # What that release didn't measure isn't compared.
    known = replace(
        example_profile().environment,
        heads=None,
        heads_name=None,
        configuration=None,
        kernel=None,
        attention=None,
    )
    expected = example_profile(environment=known, measurement=kept.measurement)
    assert replace(kept, id=None) == expected
    assert kept.measurement.tokens_per_second == 20.0
    # That release stored no choice and measured no interval.
    (choice,) = store.choices()
    assert (choice.run, choice.prompt_class, list(choice.picks)) == ("r1", "chat", [])
    store.close()
    assert mode(path) == "wal"


def test_a_choice_is_made_of_what_an_older_release_measured(path: Path) -> None:
    with raw(path) as connection:
        connection.executescript(GOLDEN.with_name("m003.sql").read_text())
        # A row that can't be read makes no choice and stops nothing.
        connection.execute(
            "INSERT INTO profiles SELECT 9, environment_id, 'r9', workload, "
            "workload_name, prompt_class, strategy, '{', lossless, baseline, created, "
            "tokens_per_second, ratio, measurement FROM profiles"
        )
    store = open_store(str(path))
    (choice,) = store.choices()
    (pick,) = choice.picks
    assert (choice.run, choice.prompt_class, choice.prompts) == ("r1", "chat", 4)
    assert (pick.strategy, pick.ratio, pick.low) == ("prompt_lookup", 1.5, 1.25)
    assert choice.environment.kernel is None
    store.close()


@pytest.mark.slow
def test_a_file_that_stays_in_use_is_read_in_its_old_mode(path: Path) -> None:
    with raw(path) as connection:
        connection.executescript(NEWEST.read_text())
    with raw(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM profiles").fetchall()
        store = open_store(str(path))
        assert len(store.profiles()) == 1
        store.close()
    assert mode(path) == "delete"


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX files")
def test_a_folder_that_may_not_be_written_can_be_read(path: Path) -> None:
    with raw(path) as connection:
        connection.executescript(NEWEST.read_text())
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        store = open_store(str(path))
        assert len(store.profiles()) == 1
        store.close()
    finally:
        path.parent.chmod(0o755)
    assert mode(path) == "delete" or os.getuid() == 0  # root may write anything


def disks(*mounts: tuple[str, str]) -> Any:
    found = [types.SimpleNamespace(mountpoint=m, fstype=kind) for m, kind in mounts]
    return lambda all: found


@pytest.mark.parametrize(
    ("mounts", "shared"),
    [
        ([("/", "ext4")], False),
        ([("/", "nfs4")], True),
        ([("/", "ext4"), ("HERE", "nfs")], True),
        ([("HERE", "cifs"), ("/", "ext4")], True),
        ([("/", "lustre"), ("HERE", "xfs")], False),
        ([("HERE", "nfs4"), ("HERE", "tmpfs")], False),
        ([("/", "ext4"), ("HERE-beside", "nfs4")], False),
        ([], False),
    ],
)
def test_a_file_that_hosts_may_share_keeps_sqlites_own_log(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mounts: list[tuple[str, str]],
    shared: bool,
) -> None:
    here = str(path.parent.resolve())
    placed = [(mount.replace("HERE", here), kind) for mount, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", disks(*placed))
    assert on_network_file_system(path) == shared
    open_store(str(path)).close()
    assert mode(path) == ("delete" if shared else "wal")


def test_migrations_stopped_one_step_short_go_on_with_the_data_kept(
    path: Path, one_more: ScriptDirectory
) -> None:
    engine = make_engine(str(path))
    assert migrate(engine, target="m008", script=one_more) == STEPS
    assert migrate(engine, target="m008", script=one_more) == []
    engine.dispose()
    store = open_store(str(path))  # a release that doesn't know the last step
    store.add_profiles([example_profile()])
    store.close()
    engine = make_engine(str(path))
    columns = {c["name"] for c in inspect(engine).get_columns("profiles")}
    assert "note" not in columns
    assert migrate(engine, script=one_more) == ["x2"]
    assert migrate(engine, script=one_more) == []
    assert migrate(engine, target="m008", script=one_more) == []  # never back
    engine.dispose()
    with raw(path) as connection:
        rows = connection.execute("SELECT run, note FROM profiles").fetchall()
    assert rows == [("r1", "none")]


@pytest.mark.slow
def test_a_step_that_another_process_did_meanwhile_is_not_repeated(
    path: Path, one_more: ScriptDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(str(path))
    read = migrations._current
    calls: list[str | None] = []

    def late(of: Any) -> str | None:
        found = read(of)
        if not calls:  # between our reading and our writing
            calls.append(found)
            migrate(of, target="m008", script=one_more)
        return found

    monkeypatch.setattr(migrations, "_current", late)
    assert migrate(engine, script=one_more) == ["x2"]
    engine.dispose()


def test_a_step_that_always_fails_is_told_and_not_tried_for_ever(
    path: Path, one_more: ScriptDirectory
) -> None:
    engine = make_engine(str(path))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE profiles (id INTEGER)")
    with pytest.raises(Exception, match="already exists"):
        migrate(engine, script=one_more)
    assert inspect(engine).get_table_names() == ["profiles"]
    engine.dispose()
