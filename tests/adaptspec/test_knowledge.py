"""Knowledge files: killed, shared, damaged, and of another model."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import adaptspec
from adaptspec.errors import KnowledgeError
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.knowledge import (
    EVERY_SECONDS,
    KnowledgeFile,
    KnowledgeKeeper,
    KnowledgeWarning,
)
from adaptspec.strategy import Drafter, Strategy, Target
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_profiles.memory import MemoryStore
from adaptspec_profiles.sql import SqlStore

MODEL = "0123456789abcdef"


class Counting(Strategy):
    """Counts events; what was counted since the last exchange is added to the file."""

    name = "counting"
    summary = "counts"
    knowledge = 1

    def __init__(self) -> None:
        super().__init__()
        self.fresh = 0
        self.total = 0

    def start(self, target: Target) -> Drafter:
        raise NotImplementedError

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        before = int(stored["count"]) if stored else 0
        self.total, self.fresh = before + self.fresh, 0
        return {"count": torch.tensor(self.total), "half": torch.ones(3).bfloat16()}


def exchanged(folder: Path, strategy: Counting, count: int = 0) -> int:
    strategy.fresh += count
    KnowledgeFile(folder, MODEL, type(strategy)).exchange(strategy)
    return strategy.total


def test_the_next_process_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    assert exchanged(tmp_path, Counting(), 3) == 3
    assert exchanged(tmp_path, Counting(), 4) == 7


def test_two_objects_that_share_a_file_lose_nothing_of_each_other(
    tmp_path: Path,
) -> None:
    one, other = Counting(), Counting()
    exchanged(tmp_path, one, 1)
    exchanged(tmp_path, other, 10)
    exchanged(tmp_path, one, 100)
    assert exchanged(tmp_path, other) == 111


def count_often(folder: str) -> None:
    strategy = Counting()
    for _ in range(15):
        exchanged(Path(folder), strategy, 1)


def test_four_processes_writing_at_once_lose_nothing(
    fork_call: Any, tmp_path: Path
) -> None:
    workers = [fork_call(count_often, str(tmp_path)) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert exchanged(tmp_path, Counting()) == 60


class Killed(Counting):
    """Dies in the middle of an exchange, the file's lock in its hands."""

    name = "counting"

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        answer = super().sync(stored)
        if self.total > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


def die(folder: str) -> None:
    exchanged(Path(folder), Killed(), 5)


def test_a_process_killed_while_it_holds_the_file_leaves_it_whole(
    fork_call: Any, tmp_path: Path
) -> None:
    exchanged(tmp_path, Counting(), 1)
    assert fork_call(die, str(tmp_path)).wait() == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exchanged(tmp_path, Counting(), 2) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" * len(content),
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"not a safetensors file",
    ],
    ids=["empty", "cut", "overwritten", "one bit", "text"],
)
def test_a_damaged_file_is_refused_by_name_and_replaced(
    tmp_path: Path, damage: Any
) -> None:
    file = KnowledgeFile(tmp_path, MODEL, Counting)
    exchanged(tmp_path, Counting(), 5)
    file.path.write_bytes(damage(file.path.read_bytes()))
    with pytest.warns(KnowledgeWarning, match=r"counting\.safetensors.*damaged"):
        assert exchanged(tmp_path, Counting(), 2) == 2
    assert exchanged(tmp_path, Counting()) == 2


def test_a_whole_file_that_the_strategy_stumbles_over_is_refused_and_replaced(
    tmp_path: Path,
) -> None:
    exchanged(tmp_path, Counting(), 5)

    class Otherwise(Counting):
        """The same name and version, and other tensors."""

        name = "counting"

        def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
            if stored is not None:
                _ = stored["counts"]
            return {"counts": torch.tensor(self.fresh)}

    file = KnowledgeFile(tmp_path, MODEL, Otherwise)
    with pytest.warns(
        KnowledgeWarning, match=r"counting\.safetensors.*taken in.*counts"
    ):
        file.exchange(Otherwise())
    file.exchange(Otherwise())  # what replaced it is its own


@pytest.mark.slow
def test_a_file_system_without_locks_is_told_once_and_decoding_goes_on(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*arguments: Any, **named: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.warns(KnowledgeWarning, match="flock.*learn=True") as told:
        assert learnt(host, tmp_path, 2, learn=True) == [1, 2]
    assert len([w for w in told if w.category is KnowledgeWarning]) == 1


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    class Newer(Counting):
        name = "counting"
        knowledge = 2

    exchanged(tmp_path, Counting(), 5)
    with pytest.warns(KnowledgeWarning, match="version is '1', not '2'"):
        assert exchanged(tmp_path, Newer(), 1) == 1


def test_models_and_strategies_have_files_of_their_own(tmp_path: Path) -> None:
    exchanged(tmp_path, Counting(), 5)
    other = Counting()
    KnowledgeFile(tmp_path, "another", Counting).exchange(other)
    assert other.total == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KnowledgeError, match=r"can't write .*learn=True"):
        exchanged(tmp_path / "file", Counting(), 1)


def test_nothing_but_the_file_and_its_lock_is_left(tmp_path: Path) -> None:
    exchanged(tmp_path, Counting(), 1)
    left = {path.name for path in (tmp_path / MODEL).iterdir()}
    assert left <= {"counting.safetensors", "counting.safetensors.lock"}


def learnt(host: Host, folder: Path, requests: int, **options: Any) -> list[int]:
    """How many requests the strategy knew of at each of ``requests``."""
    known = []
    store = SqlStore(str(folder / "profiles.db"))
    decoder = adaptspec.load(
        tiny_module("llama"), db=store, tokenizer=tiny_tokenizer(), host=host, **options
    )
    for _ in range(requests):
        Requests.seen.clear()
        decoder.generate([1, 2, 3], strategy="requests", max_new_tokens=2)
        known.extend(Requests.seen)
    store.close()
    del decoder  # saves, as the interpreter's exit does
    gc.collect()
    return known


class Requests(Autoregressive):
    """Plain decoding that knows how often it was asked."""

    name = "requests"
    summary = "counts requests"
    knowledge = 1
    seen: ClassVar[list[int]] = []

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self.total = self.fresh = 0

    def start(self, target: Target) -> Drafter:
        self.fresh += 1
        self.seen.append(self.total + self.fresh)
        return super().start(target)

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        before = int(stored["count"]) if stored else 0
        self.total, self.fresh = before + self.fresh, 0
        return {"count": torch.tensor(self.total)}


@pytest.fixture
def host() -> Host:
    plugin = SimpleNamespace(
        register_strategies=hookimpl(
            lambda: [Autoregressive, Requests], specname="register_strategies"
        )
    )
    return Host({"test": plugin})


@pytest.mark.slow
def test_a_decoder_goes_on_with_what_the_last_one_learnt(
    tmp_path: Path, host: Host
) -> None:
    assert learnt(host, tmp_path, 3, learn=True) == [1, 2, 3]
    assert learnt(host, tmp_path, 1, learn=True) == [4]
    assert (tmp_path / "knowledge").is_dir()


@pytest.mark.slow
def test_nothing_of_an_output_is_written_unless_asked_for(
    tmp_path: Path, host: Host
) -> None:
    assert learnt(host, tmp_path, 2) == [1, 2]
    assert not (tmp_path / "knowledge").exists()
    learnt(host, tmp_path, 2, learn=True)
    assert learnt(host, tmp_path, 1) == [1]


def test_a_store_without_a_folder_keeps_nothing(host: Host) -> None:
    decoder = adaptspec.load(
        tiny_module("llama"),
        db=MemoryStore(),
        tokenizer=tiny_tokenizer(),
        host=host,
        learn=True,
    )
    assert decoder.generate([1], strategy="requests", max_new_tokens=1).token_ids


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_told_once_and_decoding_goes_on(
    tmp_path: Path, host: Host
) -> None:
    (tmp_path / "knowledge").write_text("in the way")
    with pytest.warns(KnowledgeWarning, match="can't write") as told:
        assert learnt(host, tmp_path, 2, learn=True) == [1, 2]
    assert len([w for w in told if w.category is KnowledgeWarning]) == 1


def test_a_keeper_writes_when_the_last_time_is_long_ago(tmp_path: Path) -> None:
    now = [0.0]
    keeper = KnowledgeKeeper(tmp_path, MODEL, lambda: now[0])
    strategy = Counting()
    keeper.adopt(strategy)
    strategy.fresh = 5
    now[0] = EVERY_SECONDS - 1
    keeper.refresh()
    assert exchanged(tmp_path, Counting()) == 0
    now[0] += 1
    keeper.refresh()
    assert exchanged(tmp_path, Counting()) == 5
