"""The store on a real PostgreSQL server: the contract, its schema, its errors."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
from sqlalchemy import inspect

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import ProfileStore, Trial
from adaptspec.testing.stores import ProfileStoreContract, example_profile
from adaptspec_profiles import open_store
from adaptspec_profiles.engine import make_engine
from adaptspec_profiles.migrations import VERSION_TABLE, migrate
from adaptspec_profiles.schema import Base


class TestPostgresStore(ProfileStoreContract):
    @pytest.fixture
    def store(self, postgres_url: str) -> Any:
        store = open_store(postgres_url)
        yield store
        store.close()


@pytest.fixture
def store(postgres_url: str) -> Any:
    store = open_store(postgres_url)
    yield store
    store.close()


def test_models_and_migrations_give_one_schema(new_postgres_database: Any) -> None:
    migrated, created = [make_engine(new_postgres_database()) for _ in range(2)]
    migrate(migrated)
    Base.metadata.create_all(created)
    ours, theirs = inspect(migrated), inspect(created)
    tables = set(theirs.get_table_names())
    assert set(ours.get_table_names()) == tables | {VERSION_TABLE}
    for table in tables:
        assert [str(c) for c in ours.get_columns(table)] == [
            str(c) for c in theirs.get_columns(table)
        ]
        assert ours.get_unique_constraints(table) == theirs.get_unique_constraints(
            table
        )
    migrated.dispose()
    created.dispose()


def test_names_are_kept_however_long(store: ProfileStore) -> None:
    name = "x" * 600
    store.put_record(name[:500], f"plain/{name}/1", {"speed": 1.0})
    store.add_trial(Trial("r1", name, name, 0, {}, "complete", 1.0))
    assert store.record(name[:500], f"plain/{name}/1") == {"speed": 1.0}
    assert [t.prompt_class for t in store.trials("r1")] == [name]


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_usual_scheme_opens_it(postgres_url: str, scheme: str) -> None:
    url = postgres_url.replace("postgresql", scheme, 1)
    store = open_store(url)
    store.add_profiles([example_profile()])
    assert len(store.profiles()) == 1
    store.close()


def test_a_wrong_login_is_an_error_of_one_line_without_the_password(
    postgres_url: str,
) -> None:
    url = postgres_url.replace("postgres@", "nobody-here:s3cr3t@")
    with pytest.raises(ProfileStoreError, match="--db takes") as caught:
        open_store(url)
    assert "s3cr3t" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_driver_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "psycopg":
            raise ModuleNotFoundError(f"No module named {name!r}", name="psycopg")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for module in [m for m in sys.modules if m.split(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ProfileStoreError) as caught:
        open_store("postgresql://u:s3cr3t@localhost:1/x")
    text = str(caught.value)
    assert "pip install 'adaptspec[postgres]'" in text
    assert len(text.splitlines()) == 1
    assert "s3cr3t" not in text


def test_optunas_studies_live_in_the_same_database_and_go_with_their_run(
    store: Any, postgres_url: str
) -> None:
    import optuna

    study = optuna.create_study(storage=store.studies(), study_name="r1/chat/x")
    study.optimize(lambda trial: trial.suggest_float("k", 0, 1), n_trials=2)
    kept = optuna.create_study(storage=store.studies(), study_name="r2/chat/x")
    engine = make_engine(postgres_url)
    tables = set(inspect(engine).get_table_names())
    engine.dispose()
    assert {"studies", "trials", "tuning_trials"} <= tables
    store.delete_run("r1")
    names = optuna.get_all_study_names(store.studies())
    assert names == [kept.study_name]
