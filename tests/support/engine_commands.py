"""The command line with scripted engines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from click.testing import CliRunner, Result

import adaptspec_profiles.plugin
import adaptspec_tuner.plugin
from adaptspec.cli import build_cli
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.testing.scripted_engine import ScriptedEngine, copies_and_drafts

TRUTH = copies_and_drafts({"summary": (0.8, 0.6), "code": (0.2, 0.9)})


def run(engines: Sequence[type], *arguments: object) -> Result:
    """The command line with these engines alone."""
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: list(engines)))
    host = Host(
        {
            "scripted": plugin,
            "profiles": adaptspec_profiles.plugin,
            "tuner": adaptspec_tuner.plugin,
        }
    )
    return CliRunner().invoke(
        build_cli(host),
        [str(argument) for argument in arguments],
        env={"COLUMNS": "120"},
    )


def tune(cls: type[ScriptedEngine], workload: Path, *more: object) -> Result:
    """A tune of a few trials."""
    return run(
        [cls],
        *("tune", "--engine", cls.name, "--model", "m.gguf", "--workload", workload),
        *("--budget", "10 trials", "--db", workload.parent / "p.db", *more),
    )


def compare(engines: Sequence[type], workload: Path, *more: object) -> Result:
    """A comparison."""
    return run(
        engines,
        *("compare", "--model", "m", "--workload", workload, *more),
        *("--db", workload.parent / "p.db"),
    )
