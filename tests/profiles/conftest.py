"""Databases of both kinds, and processes that write to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adaptspec.testing.stores import example_profile
from adaptspec_profiles.as_json import profile_to_json

# Trials, records and profiles, some of them everybody's; then one profile of its own.
WRITER = """
import json, sys
from dataclasses import replace
from adaptspec.profile import Trial
from adaptspec_profiles import open_store
from adaptspec_profiles.as_json import profile_from_json
url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
profile = profile_from_json(json.loads(sys.argv[4]))
store = open_store(url)
for number in range(count):
    store.add_trial(Trial("shared", "chat", "x", number, {"by": name}, "complete", 1.0))
    store.add_trial(Trial(name, "chat", "x", number, {}, "complete", 1.0))
    store.put_record("shared", f"key {number}", {"by": name})
    store.add_profiles([replace(profile, run="shared", prompt_class=str(number))])
    print(number, flush=True)
store.add_profiles([replace(profile, run=name)])
store.close()
"""

StartWriter = Callable[[str, int], "subprocess.Popen[str]"]


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Its URL; of SQLite's, not even the file is there."""
    if request.param == "sqlite":
        return str(tmp_path / "p.db")
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def start_writer(empty_database: str) -> Iterator[StartWriter]:
    """``start_writer(name, count)`` starts a process; it prints what it has written."""
    profile = json.dumps(profile_to_json(example_profile()))
    started: list[subprocess.Popen[str]] = []

    def start(name: str, count: int) -> subprocess.Popen[str]:
        arguments = (empty_database, name, str(count), profile)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its pipe
            process.kill()
