"""Processes that write to one database at once, and one that is killed at it."""

from __future__ import annotations

import signal
from typing import Any

from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store


def test_processes_create_and_write_one_empty_database(
    empty_database: str, start_writer: Any
) -> None:
    names = ["a", "b", "c", "d"]
    for writer in [start_writer(name, 25) for name in names]:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    store = open_store(empty_database)
    assert [t.number for t in store.trials("shared")] == list(range(25))
    for name in names:
        assert [t.number for t in store.trials(name)] == list(range(25))
    shared = store.profiles(run="shared")
    assert sorted(int(p.prompt_class) for p in shared) == list(range(25))
    assert sorted(p.run for p in store.profiles(prompt_class="chat")) == names
    store.close()


def test_a_killed_writer_loses_nothing_it_finished(
    empty_database: str, start_writer: Any
) -> None:
    writer = start_writer("a", 10_000)
    seen = -1
    for line in writer.stdout:
        seen = int(line)
        if seen >= 20:
            break
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    store = open_store(empty_database)
    numbers = [t.number for t in store.trials("a")]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > seen
    store.add_profiles([example_profile(run="after")])
    assert len(store.profiles(run="after")) == 1
    store.close()
