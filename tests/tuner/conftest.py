"""``adaptspec tune`` as a process, on tiny random models."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adaptspec_plugins
import adaptspec_profiles.plugin
import adaptspec_tuner.plugin
from adaptspec.host import Host
from adaptspec.testing.fakes import noisy_draft, tiny_model, tiny_tokenizer

# The first-party plugins by name: the tests don't depend on what else is installed.
# Few settings are replayed: most of the time would go there, and finding the best is
# what test_replay.py is for.
PROGRAM = """
import adaptspec_plugins
from adaptspec import cli, host
from adaptspec_profiles import plugin as profiles
from adaptspec_tuner import phases, plugin as tuner
presearch = phases.presearch
phases.presearch = lambda *a, **k: presearch(*a, **{**k, "trials": 12})
mine = host.Host({"bundled": adaptspec_plugins, "profiles": profiles, "tuner": tuner})
host.Host.installed = classmethod(lambda cls: mine)
cli.main(arguments)
"""

ENVIRONMENT = {
    "ADAPTSPEC_NATIVE": "0",  # nothing here needs the kernel built first
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def host() -> Host:
    """What :data:`PROGRAM` has, in this process."""
    return Host(
        {
            "bundled": adaptspec_plugins,
            "profiles": adaptspec_profiles.plugin,
            "tuner": adaptspec_tuner.plugin,
        }
    )


@pytest.fixture
def start(fork: Any) -> Callable[..., Any]:
    """Starts ``tune`` with these arguments, after a text of the test's own."""

    def start(*arguments: str, first: str = "") -> Any:
        return fork(first + PROGRAM, ENVIRONMENT, arguments=["tune", *arguments])

    return start


@pytest.fixture
def serve() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts ``profiles serve``, which is read while it runs, until the end."""
    paths = [str(Path(p or ".").resolve()) for p in sys.path]
    started: list[subprocess.Popen[str]] = []

    def serve(db: Path) -> subprocess.Popen[str]:
        arguments = ["profiles", "serve", "--db", str(db), "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-c", f"arguments = {arguments}\n{PROGRAM}"],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield serve
    for process in started:
        with process:  # closes its pipes
            process.kill()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a target and of a draft that often agrees with it."""
    target = tiny_model("llama", tokenizer=tiny_tokenizer())
    folders = []
    for model in (target, noisy_draft(target)):
        folder = tmp_path_factory.mktemp("model")
        model.source.save_pretrained(folder)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def four_classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workload of four classes with four prompts each."""
    path = tmp_path_factory.mktemp("workload") / "prompts.jsonl"
    lines = [
        json.dumps({"class": name, "prompt": f"w{i} w3 w4 w{5 + i} w3 w4"})
        for name in ("a", "b", "c", "d")
        for i in range(2, 6)
    ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def rows() -> Callable[[Path, str], list[tuple[Any, ...]]]:
    """What SQLite itself answers, beside the writers; nothing before the tables."""

    def rows(db: Path, query: str) -> list[tuple[Any, ...]]:
        if not db.exists():
            return []
        with contextlib.closing(sqlite3.connect(db)) as connection:
            try:
                return connection.execute(query).fetchall()
            except sqlite3.OperationalError:
                return []

    return rows
