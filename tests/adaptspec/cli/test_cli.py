"""The command line: errors are one line, JSON is JSON, broken plugins are named."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec import cli
from adaptspec._version import __version__
from adaptspec.errors import AdaptSpecError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer


class Broken:
    """A plugin whose strategies can't be had."""

    @hookimpl
    def register_strategies(self) -> list[Any]:
        raise RuntimeError("no such wheel")


@pytest.fixture
def plugins() -> dict[str, Any]:
    return {"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, plugins: dict[str, Any]) -> None:
    """``main`` finds these plugins, and leaves process-wide settings as they were."""
    monkeypatch.setattr(Host, "installed", classmethod(lambda cls: Host(plugins)))
    monkeypatch.delenv("ADAPTSPEC_DEBUG", raising=False)
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error" if name.startswith("TR") else "false")
    # main() replaces it for good; pytest records warnings through it.
    monkeypatch.setattr(cli, "warnings", types.SimpleNamespace())


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"adaptspec, version {__version__}"


def test_strategies_as_json_hold_what_the_host_holds(
    capsys: pytest.CaptureFixture[str], plugins: dict[str, Any]
) -> None:
    assert run("strategies", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    host = Host(plugins)
    assert {s["name"] for s in listed["strategies"]} == set(host.strategies)
    assert {s["name"] for s in listed["baselines"]} == set(host.baselines)
    found = {s["name"]: s for s in listed["strategies"]}["draft_model"]
    fields = host.strategy("draft_model").Params.model_fields
    assert [p["name"] for p in found["parameters"]] == list(fields)
    assert found["needs"] == ["a draft model with the target's vocabulary"]


def test_one_strategy_is_described_with_every_parameter(
    capsys: pytest.CaptureFixture[str], plugins: dict[str, Any]
) -> None:
    assert run("strategies", "prompt_lookup") == 0
    shown = capsys.readouterr().out
    for name in Host(plugins).strategy("prompt_lookup").Params.model_fields:
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["strategies", "guess"], "prompt_lookup"),
        (["generate", "  "], "the prompt is empty"),
        (["generate", "hi", "-p", "k", "3"], "--param needs --strategy"),
        (["generate", "-m", "./no/such/folder", "hi"], "./no/such/folder"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert said in lines[0]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(AdaptSpecError, match="the prompt is empty"):
        cli.main(["--debug", "generate", " "])


def test_a_broken_plugin_is_named_and_the_others_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    plugins: dict[str, Any],
) -> None:
    plugins["wobbly"] = Broken()
    with pytest.warns(UserWarning, match="wobbly"):
        assert run("strategies", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    errors = {p["name"]: p["error"] for p in listed["plugins"]}
    assert "no such wheel" in errors["wobbly"]
    assert errors["bundled"] is None
    assert "prompt_lookup" in {s["name"] for s in listed["strategies"]}


def test_generate_prints_the_text_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_module("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    words = tiny_tokenizer().decode([5, 6, 7, 5, 6, 7, 5])
    asked = ["generate", "-m", str(tmp_path), "--db", str(tmp_path / "p.db")]
    asked += ["--raw", "--json", "-n", "9"]
    found = {}
    for strategy in ("autoregressive", "prompt_lookup"):
        assert run(*asked, "-s", strategy, str(words)) == 0
        found[strategy] = json.loads(capsys.readouterr().out)
    plain, lookup = found["autoregressive"], found["prompt_lookup"]
    assert plain["token_ids"] == lookup["token_ids"]
    assert plain["tokens_per_forward"] == 1
    assert plain["strategy"] == "autoregressive"
    assert set(plain["seconds"]) == {
        *("classifying", "prefill", "target", "draft", "rest")
    }


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    tiny_module("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    return tmp_path


def test_generate_works_without_a_plugin_that_opens_profiles(
    folder: Path, capsys: pytest.CaptureFixture[str], plugins: dict[str, Any]
) -> None:
    del plugins["profiles"]
    asked = ["generate", "-m", str(folder), "--raw", "-n", "5", "w3 w4 w3"]
    assert run(*asked, "-s", "prompt_lookup") == 0
    assert "prompt_lookup (asked for)" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="no store of profiles"):
        assert run(*asked) == 0
    printed = capsys.readouterr().err
    assert "no working plugin opens one" in printed
    assert run(*asked, "--db", str(folder / "p.db")) == 1
    assert "no plugin opens the profile database" in capsys.readouterr().err


def test_generate_prints_one_line_on_stderr_whatever_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capsys.readouterr().err  # else this tests nothing
    asked = ["generate", "-m", str(folder), "--db", str(folder / "p.db"), "--raw"]
    assert run(*asked, "-n", "3", "-s", "autoregressive", "w3 w4") == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "tokens/s" in lines[0]
    AutoModelForCausalLM.from_pretrained(folder)  # bars are as they were
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stored_search_is_refused_with_an_option_that_lets_it_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((folder / "generation_config.json").read_text())
    stored |= {"num_beams": 4, "prompt_lookup_num_tokens": 3, "early_stopping": True}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    asked = ["generate", "-m", str(folder), "--db", str(folder / "p.db"), "--raw"]
    asked += ["--json", "-n", "5", "-s", "prompt_lookup", "w3 w4 w3"]
    assert run(*asked) == 1
    said = capsys.readouterr().err
    assert "num_beams=4" in said
    way = said.split("(adaptspec generate ")[1].split(")")[0].split()
    assert way == ["--control", "num_beams", "1"]
    assert run(*asked, *way) == 0
    plain = json.loads(capsys.readouterr().out)["token_ids"]
    assert len(plain) == 5
    more = [*way, "--control", "suppress_tokens", json.dumps(plain)]
    more += ["-c", "temperature", "0", "-c", "stop_strings", "w"]
    assert run(*asked, *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert not set(found["token_ids"]) & set(plain)
    assert (len(found["token_ids"]), found["finish"]) == (1, "stop")
    assert run(*asked, *way, "-c", "strategy", "x") == 1
    assert "strategy is no generation control" in capsys.readouterr().err
