"""``adaptspec profiles costs``: what forwards cost, of each model and machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts, HardwareCosts, store_costs
from adaptspec.testing.stores import example_profile
from adaptspec_profiles.sql import SqlStore

COSTS = HardwareCosts(
    ForwardCosts((128, 1024), (1, 8), ((0.03, 0.04), (0.05, 0.06))),
    None,
    "2026-11-29T12:00:00+00:00",
    20.0,
)


def run(*arguments: str) -> str:
    host = Host({"profiles": adaptspec_profiles.plugin})
    done = CliRunner().invoke(build_cli(host), ["profiles", "costs", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_costs_are_listed_of_every_environment_that_was_measured(
    tmp_path: Path,
) -> None:
    db = str(tmp_path / "p.db")
    store = SqlStore(f"sqlite:///{db}")
    known = example_profile()
    other = replace(
        known, run="2", environment=replace(known.environment, device_name="unmeasured")
    )
    store.add_profiles([known, other])
    store_costs(store, known.environment, COSTS)
    store.close()
    (listed,) = json.loads(run("--json", "--db", db))
    assert listed["target"] == COSTS.target.as_json()
    assert listed["environment"]["device_name"] == known.environment.device_name
    shown = run("--db", db)
    assert "1024" in shown
    assert "50.0" in shown  # milliseconds


def test_without_any_the_command_that_measures_them_is_named(tmp_path: Path) -> None:
    assert "adaptspec tune" in run("--db", str(tmp_path / "p.db"))
