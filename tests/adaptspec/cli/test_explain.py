"""``adaptspec explain`` says what generate would do, and decodes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.cli.explain import SHARED
from adaptspec.cli.generate import generate
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.profile import PLAIN
from adaptspec.streaming.stream import Stream
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from decided import keep

HOST = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def db(model: Path, tmp_path: Path) -> str:
    """Where prompt lookup is twice as fast on edits."""
    place = environment_of(load_model(model), None)
    ratios = [(PLAIN, {}, 1.0), ("prompt_lookup", {"draft_length": 5}, 2.0)]
    profiles = []
    for strategy, params, ratio in ratios:
        measured = replace(
            example_profile().measurement,
            ratio=ratio,
            interval_low=0.9 * ratio,
            interval_high=1.1 * ratio,
            tokens_per_second=12.5 * ratio,
        )
        profiles.append(
            example_profile(
                environment=place,
                prompt_class="edit",
                strategy=strategy,
                params=params,
                measurement=measured,
            )
        )
    path = str(tmp_path / "p.db")
    store = open_store(path)
    keep(store, profiles)
    store.close()
    return path


@pytest.fixture
def explain(model: Path, db: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    def step(*_: object) -> None:
        raise AssertionError("something was decoded")

    monkeypatch.setattr(Stream, "_step", step)

    def run(*arguments: str) -> Result:
        given = ["explain", "-m", str(model), "--db", db, *arguments]
        return CliRunner().invoke(build_cli(HOST), given, obj=HOST)

    return run


@pytest.mark.parametrize("prompt", [[], ["w2 w3"]])
def test_it_says_class_strategy_parameters_reason_and_speed(
    explain: Any, prompt: list[str]
) -> None:
    done = explain("--class", "edit", *prompt)
    assert done.exit_code == 0, done.output
    said = dict(line.split(":", 1) for line in done.stdout.splitlines())
    said = {name: value.strip() for name, value in said.items()}
    assert said["class"] == "edit"
    assert said["strategy"] == "prompt_lookup"
    assert said["parameters"] == "draft_length=5"
    assert "2.00x plain decoding" in said["reason"]
    assert said["expected"] == (
        "2.00x plain decoding (1.80 to 2.20), 25.0 tokens/s (4 prompts)"
    )
    assert said["output"].startswith("outputs equal plain decoding's")


def test_it_says_where_logits_depend_on_the_pass(
    explain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "rounding", "bits differ in a tree of 13")
    said = "outputs equal plain decoding's up to near ties: bits differ in a tree of 13"
    assert f"output:     {said}\n" in explain("--class", "edit").stdout
    assert json.loads(explain("--class", "edit", "--json").stdout)["output"] == said


def test_json_says_the_same(explain: Any) -> None:
    data = json.loads(explain("--class", "edit", "--json").stdout)
    assert data["strategy"] == "prompt_lookup"
    assert data["params"] == {"draft_length": 5}
    assert data["expected"]["tokens_per_second"] == 25.0


def test_a_class_that_was_not_measured_says_why(explain: Any) -> None:
    done = explain("--class", "poetry")
    assert done.exit_code == 0, done.output
    assert "reason:" in done.stdout
    assert "'poetry'" in done.stdout
    assert "expected:" in done.stdout


def test_a_speed_that_was_measured_elsewhere_is_not_expected_here(
    explain: Any,
) -> None:
    done = explain("--class", "edit", "--threads", "2")
    assert done.exit_code == 0, done.output
    assert "threads" in done.stdout
    assert "expected:   not measured here" in done.stdout


def test_its_options_are_those_of_generate() -> None:
    assert set(SHARED) <= {parameter.name for parameter in generate.params}


def test_it_explains_a_compiled_model(
    explain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = "adaptspec.model.language_model.compile_parts"
    monkeypatch.setattr(parts, lambda *_: 1)  # compiling takes seconds
    assert ", compiled" not in explain("--class", "edit").stdout
    done = explain("--class", "edit", "--compile")
    assert done.exit_code == 0, done.output
    assert ", compiled)" in done.stdout  # what it was measured with isn't
