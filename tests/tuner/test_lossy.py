"""Lossy strategies are measured when asked for, labelled always, chosen never."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import tiny_model, tiny_tokenizer
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.options import TuneOptions, chosen_strategies
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.reporting.tables import print_result
from adaptspec_tuner.tune import tune


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return attach_tiny_heads(tiny_model("llama", tokenizer=tiny_tokenizer()))


@pytest.fixture(scope="module")
def tuned(
    host: Host, model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneResult, Path]:
    db = tmp_path_factory.mktemp("profiles") / "p.db"
    prompts = tuple(
        Prompt(f"p{i}", "chat", f"w{i} w3 w4 w3", max_new_tokens=6) for i in range(2, 6)
    )
    result = tune(
        model,
        workload=Workload("mine", prompts),
        options=TuneOptions(
            budget_trials=1,
            trials=1,
            strategies=["medusa_typical"],
            allow_lossy=True,
        ),
        db=str(db),
        host=host,
    )
    return result, db


def test_lossy_strategies_are_left_out_unless_allowed(host: Host) -> None:
    names = {cls.name for cls in chosen_strategies(host, None, False)}
    assert "medusa" in names
    assert "medusa_typical" not in names
    assert {cls.name for cls in chosen_strategies(host, None, True)} - names == {
        "medusa_typical"
    }
    with pytest.raises(AdaptSpecError, match=r"medusa_typical is lossy.*--allow-lossy"):
        chosen_strategies(host, ["medusa_typical"], False)


@pytest.mark.slow
def test_a_lossy_result_is_labelled_and_not_chosen(
    tuned: tuple[TuneResult, Path], host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    result, db = tuned
    (found,) = result.as_json()["classes"]
    assert found["winner"] == "autoregressive"
    labels = {r["strategy"]: r["lossless"] for r in found["results"]}
    assert labels == {"autoregressive": True, "medusa_typical": False}
    from rich.console import Console

    console = Console(width=200)
    print_result(result, console)
    assert "medusa_typical (NOT LOSSLESS)" in capsys.readouterr().out

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(
            build_cli(host), [*arguments, "--db", str(db)], obj=host, env=WIDE
        )
        assert done.exit_code == 0, done.output
        return done.output

    assert "medusa_typical (LOSSY)" in run("profiles", "list")
    listed: list[dict[str, Any]] = json.loads(run("profiles", "list", "--json"))
    lossy = [p for p in listed if not p["lossless"]]
    # Of its class, and over all classes.
    assert {p["strategy"] for p in lossy} == {"medusa_typical"}
    assert "lossless: False" in run("profiles", "show", str(lossy[0]["id"]))


def test_lossy_strategies_are_labelled_where_strategies_are_listed(host: Host) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(
            build_cli(host), ["strategies", *arguments], obj=host, env=WIDE
        )
        assert done.exit_code == 0, done.output
        return done.output

    assert "medusa_typical [LOSSY]" in run()
    assert "LOSSY: changes the distribution" in run("medusa_typical")
    assert "LOSSY" not in run("medusa")
    assert json.loads(run("medusa_typical", "--json"))["lossless"] is False


WIDE = {"COLUMNS": "300"}
