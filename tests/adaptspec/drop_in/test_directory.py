"""Exported directories: what they hold, what they refer to, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.drop_in.directory import SETTINGS, DirectoryError, read_settings
from adaptspec.environment import environment_of
from adaptspec.heads.checkpoints import write_heads
from adaptspec.host import Host
from adaptspec.model.hardware_costs import COSTS_RECORD, costs_owner
from adaptspec.model.loading import load_model
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.testing.heads import tiny_heads
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from decided import keep

HOST = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})

Export = Callable[..., Result]


def written(folder: Path, kind: str = "llama") -> Path:
    tiny_module(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("draft"), "qwen2")


@pytest.fixture
def db(model: Path, tmp_path: Path) -> str:
    """Profiles of the model in two types, and of another one."""
    place = environment_of(load_model(model, accelerate=False), None)
    other = replace(place, model="of another type", dtype="bfloat16")
    foreign = replace(place, model="foreign", model_name="foreign")
    path = str(tmp_path / "p.db")
    store = open_store(path)
    for run, environment in ("mine", place), ("half", other), ("foreign", foreign):
        keep(store, [example_profile(run=run, environment=environment)])
    store.put_record("mine", "classifier", {"created": "2026-01-01", "told": 1})
    store.put_record("foreign", "classifier", {"created": "2026-01-01"})
    store.put_record(costs_owner(place), COSTS_RECORD, {"measured": "2026-01-01"})
    store.pin("half", True)
    store.close()
    return path


@pytest.fixture
def export(model: Path, db: str) -> Export:
    def run(folder: Path, *arguments: object, **changed: str) -> Result:
        given = {"-m": str(model), "--db": db, **changed}
        pairs = [text for pair in given.items() for text in pair]
        line = ["export", str(folder), *pairs, *map(str, arguments)]
        return CliRunner().invoke(build_cli(HOST), line, obj=HOST)

    return run


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_files_are_links_to_the_models(
    export: Export, model: Path, tmp_path: Path
) -> None:
    done = export(tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert weights(tmp_path / "out").readlink() == weights(model)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in model.iterdir()} | {"adaptspec", "custom_generate"}


def test_what_is_referred_to_is_named_by_whole_paths(
    export: Export,
    draft: Path,
    db: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(draft.parent)
    done = export(tmp_path / "out", "--draft-model", draft.name)
    assert done.exit_code == 0, done.output
    settings = read_settings(tmp_path / "out")
    assert settings.draft_model == str(draft)
    assert settings.db == db
    assert settings.heads == []
    assert settings.dtype == "float32"


def test_a_copy_needs_nothing_outside_and_can_be_moved(
    export: Export, draft: Path, tmp_path: Path
) -> None:
    done = export(tmp_path / "out", "--copy", "--draft-model", draft)
    assert done.exit_code == 0, done.output
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert not [path for path in moved.rglob("*") if path.is_symlink()]
    settings = read_settings(moved)
    for name in settings.draft_model, settings.db:
        assert name
        assert Path(name).is_relative_to(moved)
        assert Path(name).exists()
    assert str(tmp_path) not in (moved / SETTINGS).read_text()
    assert load_model(str(settings.draft_model)).digest == load_model(draft).digest


@pytest.mark.slow
@pytest.mark.parametrize("copy", [[], ["--copy"]])
def test_heads_are_found_again(
    export: Export, model: Path, tmp_path: Path, copy: list[str]
) -> None:
    target = load_model(model, accelerate=False)
    write_heads(
        tmp_path / "trained",
        tiny_heads(target),
        base_model="tiny",
        vocab_size=target.vocab_size,
        paths=None,
        ranks=None,
        record={},
    )
    done = export(tmp_path / "out", "--heads", tmp_path / "trained", *copy)
    assert done.exit_code == 0, done.output
    (found,) = read_settings(tmp_path / "out").heads
    assert Path(found).is_relative_to(tmp_path / "out") == bool(copy)
    expected = HOST.open_heads(tmp_path / "trained", target).digest
    assert HOST.open_heads(found, target).digest == expected


@pytest.mark.slow
def test_a_copy_takes_the_models_profiles_and_no_others(
    export: Export, tmp_path: Path
) -> None:
    done = export(tmp_path / "out", "--copy")
    assert "2 profiles" in done.stdout
    found = open_store(read_settings(tmp_path / "out").db)
    assert {profile.run for profile in found.profiles()} == {"mine", "half"}
    pinned = {choice.run: choice.pinned for choice in found.choices()}
    assert pinned == {"mine": False, "half": True}
    assert found.record("mine", "classifier") == {"created": "2026-01-01", "told": 1}
    assert found.record("foreign", "classifier") is None
    place = found.profiles(run="mine")[0].environment
    assert found.record(costs_owner(place), COSTS_RECORD)
    found.close()


def test_it_says_where_nothing_was_measured(export: Export, tmp_path: Path) -> None:
    done = export(tmp_path / "out", **{"--db": str(tmp_path / "new.db")})
    assert done.exit_code == 0, done.output
    said = f"--db {tmp_path / 'new.db'}` measures"
    assert "decoding is plain until `adaptspec tune --model " in done.stderr
    assert said in done.stderr


def test_a_directory_with_files_needs_force(export: Export, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = export(tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "--force" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_force_replaces_an_export_and_leaves_other_files(
    export: Export, model: Path, draft: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert export(folder, "--draft-model", draft).exit_code == 0
    (folder / "notes.txt").write_text("mine")
    earlier = json.loads((folder / SETTINGS).read_text())
    (folder / "gone.json").write_text("{}")
    (folder / SETTINGS).write_text(
        json.dumps({**earlier, "files": [*earlier["files"], "gone.json", "../p.db"]})
    )
    done = export(folder, "--copy", "--force")
    assert done.exit_code == 0, done.output
    assert read_settings(folder).draft_model is None
    assert not weights(folder).is_symlink()
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "gone.json").exists()
    assert (tmp_path / "p.db").exists()  # nothing outside is removed
    assert weights(model).exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_model_is_never_written_over(
    export: Export, model: Path, tmp_path: Path, force: list[str]
) -> None:
    before = {path.name for path in model.iterdir()}
    assert export(tmp_path / "linked").exit_code == 0
    for folder in model, model.parent:
        done = export(folder, *force)
        assert done.exit_code == 1
        assert "which the directory is made from" in done.stderr
    assert {path.name for path in model.iterdir()} == before


@pytest.mark.slow
def test_links_into_the_place_are_seen(export: Export, tmp_path: Path) -> None:
    """A copy, and a folder of links to it, over which the copy must not be written."""
    assert export(tmp_path / "copy", "--copy").exit_code == 0
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "copy").glob("*.*"):
        (linked / path.name).symlink_to(path)
    done = export(tmp_path / "copy", "--force", **{"-m": str(linked)})
    assert done.exit_code == 1
    assert "which the directory is made from" in done.stderr
    assert weights(tmp_path / "copy").exists()


def test_the_database_is_never_removed(export: Export, db: str, tmp_path: Path) -> None:
    done = export(Path(db).parent, "--force")
    assert done.exit_code == 1
    assert Path(db).exists()


def test_an_export_or_a_models_own_generation_is_no_model(
    export: Export, model: Path, tmp_path: Path
) -> None:
    assert export(tmp_path / "out").exit_code == 0
    done = export(tmp_path / "again", **{"-m": str(tmp_path / "out")})
    assert "written by `adaptspec export` itself" in done.stderr
    own = written(tmp_path / "own")
    (own / "custom_generate").mkdir()
    done = export(tmp_path / "again", **{"-m": str(own)})
    assert "a custom_generate of its own" in done.stderr
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_loaded_writes_nothing(
    export: Export, draft: Path, tmp_path: Path
) -> None:
    for wrong in (
        ["--draft-model", tmp_path / "nowhere"],
        ["--heads", draft],
        ["-m", tmp_path / "nowhere"],
    ):
        done = export(tmp_path / "out", *wrong)
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_an_error_half_way_leaves_nothing_that_was_written(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "profiles.db")

    monkeypatch.setattr("adaptspec.drop_in.directory.copy_profiles", full)
    done = export(tmp_path / "out", "--copy")
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_without_links_it_says_to_copy(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    done = export(tmp_path / "out")
    assert "copy the files with --copy" in done.stderr


def test_a_file_is_no_place(export: Export, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "must be a directory" in export(tmp_path / "out").stderr


def test_a_password_is_not_written_down(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Secret:
        url = "postgresql://me:***@host/db"

        def close(self) -> None:
            pass

        def profiles(self) -> list[Any]:
            return []

    monkeypatch.setattr(Host, "open_store", lambda *_: Secret())
    done = export(tmp_path / "out", **{"--db": "postgresql://me:secret@host/db"})
    assert done.exit_code == 1
    assert "needs a password" in done.stderr
    assert "secret" not in done.output
    assert list((tmp_path / "out").iterdir()) == []


def test_no_plugin_that_opens_databases_is_no_error(
    model: Path, tmp_path: Path
) -> None:
    host = Host({"bundled": adaptspec_plugins})
    line = ["export", str(tmp_path / "out"), "-m", str(model)]
    done = CliRunner().invoke(build_cli(host), line, obj=host)
    assert done.exit_code == 0, done.output
    assert read_settings(tmp_path / "out").db is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ('{"format": "adaptspec-directory-2"}', "draft_model"),
    ],
)
def test_damaged_settings_say_so_in_a_line(
    export: Export, tmp_path: Path, text: str | None, said: str
) -> None:
    assert export(tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / SETTINGS
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DirectoryError, match="write the directory anew") as caught:
        read_settings(tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
