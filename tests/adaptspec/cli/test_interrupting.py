"""Ctrl-C ends every command with 130 and without a word, from the first import on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host

pytestmark = pytest.mark.slow

PRESSED = "raise KeyboardInterrupt\n"
# Compiled modules, whose importing was cut short, say so with an error of their own.
MADE_OF_IT = (
    "try:\n    raise KeyboardInterrupt\n"
    "except BaseException as error:\n    raise ImportError('initialization failed')\n"
)


@pytest.mark.parametrize("content", [PRESSED, MADE_OF_IT])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("pluggy", ["--version"]),
        ("click", ["--help"]),
        ("torch", ["tune", "--model", "m", "--db", "memory:"]),
        ("torch", ["generate", "--model", "m", "hello"]),
        ("sqlalchemy", ["profiles", "list"]),
    ],
)
def test_while_anything_is_imported(
    module: str, arguments: Sequence[str], content: str, tmp_path: Path
) -> None:
    if content == MADE_OF_IT and module in ("pluggy", "click"):
        pytest.skip("these have no compiled parts")
    (tmp_path / f"{module}.py").write_text(content)
    paths = [str(tmp_path), *(str(Path(p or ".").resolve()) for p in sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "adaptspec", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


class Commands:
    """Commands that are interrupted, that fail to write, and that are fine."""

    @hookimpl
    def register_commands(self, cli: click.Group) -> None:
        @cli.command()
        def load() -> None:
            raise KeyboardInterrupt

        @cli.command()
        def clean() -> None:
            try:
                raise KeyboardInterrupt
            finally:
                raise ValueError("the session can't be closed")

        @cli.command()
        def write() -> None:
            raise OSError(28, "No space left on device", "/mnt/out.json")


@pytest.mark.parametrize("command", ["load", "clean"])
def test_while_a_command_runs(command: str) -> None:
    done = CliRunner().invoke(build_cli(Host({"mine": Commands()})), [command])
    assert (done.exit_code, done.output) == (130, "")


def test_a_list_of_profiles_that_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def press(url: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptspec_profiles.open_store", press)
    host = Host({"profiles": adaptspec_profiles.plugin})
    done = CliRunner().invoke(build_cli(host), ["profiles", "list"])
    assert (done.exit_code, done.output) == (130, "")


def test_what_the_system_refuses_is_one_line() -> None:
    done = CliRunner().invoke(build_cli(Host({"mine": Commands()})), ["write"])
    assert done.exit_code == 1
    assert done.stderr == "Error: /mnt/out.json: No space left on device\n"
