"""Runs: listed, shown, compared, pinned, pruned, and moved with all a choice needs."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.errors import ProfileStoreError
from adaptspec.model.hardware_costs import COSTS_RECORD as COSTS
from adaptspec.model.hardware_costs import costs_owner
from adaptspec.profile import EVERY_CLASS, ClassChoice
from adaptspec.selector import select
from adaptspec.testing.stores import example_choice, example_profile
from adaptspec_profiles import open_store
from adaptspec_profiles.as_json import profile_to_json
from adaptspec_profiles.commands import profiles as command
from adaptspec_profiles.exchange import FORMAT

HERE = example_choice().environment


def run(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.exception
    return done.stdout


def of_day(day: int, name: str = "chat", **changes: Any) -> ClassChoice:
    created = example_choice().created + timedelta(days=day)
    known = {"run": f"run{day}", "prompt_class": name, "created": created}
    return example_choice(**{**known, **changes})


@pytest.fixture
def db(tmp_path: Path) -> str:
    """An older run of two classes, a newer one of one, and a smoke run."""
    path = str(tmp_path / "p.db")
    store = open_store(path)
    store.put_choices(
        [
            *(of_day(0, name) for name in ("chat", "code", EVERY_CLASS)),
            of_day(1),
            of_day(2, prompts=1, picks=[]),
        ]
    )
    store.add_profiles([example_profile(run="run2")])
    store.close()
    return path


def test_runs_are_listed_with_what_they_are_used_for(db: str) -> None:
    found = {
        r["run"]: r for r in json.loads(run("list", "--runs", "--json", "--db", db))
    }
    used = {
        name: sorted(c["prompt_class"] for c in of["choices"] if c["used"])
        for name, of in found.items()
    }
    assert used == {"run0": [EVERY_CLASS, "code"], "run1": ["chat"], "run2": []}
    table = run("list", "--runs", "--db", db)
    assert "all classes, code" in " ".join(table.split())


def test_a_run_of_few_classes_is_not_said_to_serve_all(tmp_path: Path) -> None:
    path = str(tmp_path / "p.db")
    store = open_store(path)
    names = ("chat", "code", "json", EVERY_CLASS)
    broad = [of_day(0, name) for name in names]
    narrow = [of_day(1, name) for name in ("chat", EVERY_CLASS)]
    store.put_choices([*broad, *narrow])
    assert select(store.choices(), HERE).run == "run0"
    store.close()
    runs = {
        r["run"]: r for r in json.loads(run("list", "--runs", "--json", "--db", path))
    }
    used = [c["prompt_class"] for c in runs["run1"]["choices"] if c["used"]]
    assert used == ["chat"]


def test_a_run_is_shown_with_its_reasons(db: str) -> None:
    shown = run("show", "run0", "--db", db)
    assert "all classes: prompt_lookup, measured 1.50x" in shown
    assert "chat (not used): prompt_lookup" in shown
    assert "plain decoding" in run("show", "run2", "--db", db)
    asked = ["show", "nowhere", "--db", db]
    with pytest.raises(ProfileStoreError, match="no run 'nowhere'"):
        command.main(asked, standalone_mode=False)


def test_runs_are_compared_class_by_class(db: str) -> None:
    told = run("compare", "run0", "run1", "--db", db)
    chat = [line.split() for line in told.splitlines() if line.split()[0] == "chat"]
    assert [(line[1], line[-1]) for line in chat] == [("run0", "4"), ("run1", "used")]


def test_a_pinned_run_is_used_before_better_evidence(db: str) -> None:
    run("pin", "run0", "--db", db)
    run("pin", "run2", "--db", db)  # one run of a model at a time
    store = open_store(db)
    assert {c.run for c in store.choices() if c.pinned} == {"run2"}
    assert select(store.choices(), HERE, "chat").run == "run2"
    run("unpin", "run2", "--db", db)
    assert select(store.choices(), HERE, "chat").run == "run1"
    store.close()


def test_a_pin_takes_no_other_engines_pin_away(db: str) -> None:
    store = open_store(db)
    other = replace(HERE, engine="llama.cpp")
    store.put_choices([of_day(3, environment=other)])
    run("pin", "run0", "--db", db)
    run("pin", "run3", "--db", db)
    assert {c.run for c in store.choices() if c.pinned} == {"run0", "run3"}
    store.close()


def test_only_parameters_that_differ_from_defaults_are_listed(db: str) -> None:
    class Params:
        @classmethod
        def specs(cls) -> list[Any]:
            return [SimpleNamespace(name="k", default=4)]

    host = SimpleNamespace(
        strategies={"a": SimpleNamespace(Params=Params)}, baselines={}
    )
    store = open_store(db)
    params = {"k": 4, "m": 7}
    store.add_profiles([example_profile(run="r9", strategy="a", params=params)])
    store.close()
    done = CliRunner().invoke(command, ["list", "--run", "r9", "--db", db], obj=host)
    assert "m=7" in done.stdout
    assert "k=4" not in done.stdout
    assert "k=4" in run("list", "--run", "r9", "--db", db)


def test_another_engines_defaults_are_those_that_its_run_kept(db: str) -> None:
    store = open_store(db)
    place = replace(HERE, engine="llama.cpp")
    params = {"k": 4, "m": 7}
    store.add_profiles([example_profile(run="r9", params=params, environment=place)])
    store.put_record("r9", "defaults", {"prompt_lookup": {"k": 4, "m": 8}})
    store.close()
    listed = run("list", "--run", "r9", "--db", db)
    assert "m=7" in listed
    assert "k=4" not in listed


def test_what_nothing_is_used_of_is_pruned(db: str) -> None:
    assert run("prune", "--dry-run", "--db", db).split() == ["run2"]
    store = open_store(db)
    before = [select(store.choices(), HERE, name) for name in (None, "chat", "code")]
    assert run("prune", "--db", db).split() == ["run2"]
    assert {c.run for c in store.choices()} == {"run0", "run1"}
    assert store.profiles() == []
    after = [select(store.choices(), HERE, name) for name in (None, "chat", "code")]
    assert before == after
    store.close()


def moved(first: str, second: str, tmp_path: Path) -> None:
    file = str(tmp_path / "x.json")
    run("export", "-o", file, "--db", first)
    run("import", file, "--db", second)


def test_an_export_carries_all_that_a_choice_needs(db: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.db")
    store = open_store(db)
    profile = example_profile(run="run0")
    store.add_profiles([profile])
    store.put_record("run0", "classifier", {"format": 1})
    owner = costs_owner(profile.environment)
    store.put_record(owner, COSTS, {"measured": "2026-01-01"})
    store.pin("run0", True)
    moved(db, other, tmp_path)
    found = open_store(other)
    # What a person pinned there isn't pinned here.
    assert found.choices() == [replace(c, pinned=False) for c in store.choices()]
    assert found.record("run0", "classifier") == {"format": 1}
    assert found.record(owner, COSTS) == {"measured": "2026-01-01"}
    store.close()
    found.close()


def test_newer_evidence_is_not_overwritten_by_an_import(tmp_path: Path) -> None:
    old, new = str(tmp_path / "old.db"), str(tmp_path / "new.db")
    owner = costs_owner(HERE)
    for path, day in ((old, 0), (new, 1)):
        store = open_store(path)
        created = example_profile().created + timedelta(days=day)
        params = {"k": day}
        store.add_profiles([example_profile(created=created, params=params)])
        choice = of_day(day, reason=f"of day {day}")
        store.put_choices([replace(choice, run="r1")])
        store.put_record(owner, COSTS, {"measured": f"2026-01-0{day + 1}"})
        store.put_record("r1", "classifier", {"created": f"2026-01-0{day + 1}"})
        store.close()
    moved(old, new, tmp_path)
    store = open_store(new)
    assert [p.params for p in store.profiles()] == [{"k": 1}]
    assert [c.reason for c in store.choices()] == ["of day 1"]
    assert store.record(owner, COSTS) == {"measured": "2026-01-02"}
    assert store.record("r1", "classifier") == {"created": "2026-01-02"}
    store.close()
    moved(new, old, tmp_path)
    store = open_store(old)
    assert [p.params for p in store.profiles()] == [{"k": 1}]
    assert [c.reason for c in store.choices()] == ["of day 1"]
    assert store.record(owner, COSTS) == {"measured": "2026-01-02"}
    store.close()


def test_an_older_file_without_choices_makes_them(tmp_path: Path) -> None:
    file, db = tmp_path / "x.json", str(tmp_path / "p.db")
    record = profile_to_json(example_profile())
    file.write_text(json.dumps({"format": FORMAT, "profiles": [record]}))
    run("import", str(file), "--db", db)
    store = open_store(db)
    (choice,) = store.choices()
    assert [p.strategy for p in choice.picks] == ["prompt_lookup"]
    store.close()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"choices": [{"run": "r"}]}, "choice 1: "),
        ({"choices": [None]}, "choice 1: an object is expected"),
        ({"choices": {}}, "without a list 'choices'"),
        (
            {"records": [{"run": "r", "key": "plain", "value": {}}]},
            "record 1: ",
        ),
    ],
)
def test_a_bad_choice_or_record_is_named_and_nothing_is_imported(
    tmp_path: Path, part: dict[str, Any], said: str
) -> None:
    file, db = tmp_path / "x.json", tmp_path / "p.db"
    file.write_text(json.dumps({"format": FORMAT, "profiles": [], **part}))
    done = CliRunner().invoke(command, ["import", str(file), "--db", str(db)])
    assert isinstance(done.exception, ProfileStoreError)
    assert said in str(done.exception)
    assert not db.exists()
