"""What several servers on one machine are started with, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from adaptspec.engines.exporting.measured import choices_of, found_here
from adaptspec.engines.exporting.plan import Plan, by_class
from adaptspec.engines.exporting.sharing import shared
from adaptspec.engines.inference_engine import Launch
from adaptspec_profiles.memory import MemoryStore
from measured_engines import HERE, keep_run

CLASSES = "abc"
SHARE = "--gpu-memory-utilization"


def split(engine: str, device: str, count: int, *arguments: str) -> Plan:
    """As many servers as there are classes, each with a setting of its own."""
    environment = replace(HERE, engine=engine, device=device)
    store = MemoryStore()
    measured = {
        name: (1.0, {("ngram", number): 2.0})
        for number, name in enumerate(CLASSES[:count], start=1)
    }
    keep_run(store, measured, environment=environment)
    found = found_here(store, choices_of(store, engine, None), environment)
    plan = by_class(found, {}, lambda setting: Launch(["serve", *arguments]), 8001)
    return shared(plan, engine)


def shares(plan: Plan) -> list[float]:
    commands: Sequence[Sequence[str]] = [s.launch.command for s in plan.servers]
    return [float(c[c.index(SHARE) + 1]) for c in commands if SHARE in c]


@pytest.mark.parametrize("count", [2, 3])
def test_servers_of_vllm_share_a_gpu_and_start_one_after_the_other(count: int) -> None:
    plan = split("vllm", "cuda", count)
    found = shares(plan)
    assert len(found) == len(plan.servers) > 1
    assert 0.8 < sum(found) <= 0.92
    assert any("start each when the one before it is ready" in n for n in plan.notes)


def test_one_server_has_the_gpu_alone() -> None:
    plan = split("vllm", "cuda", 1)
    assert (shares(plan), plan.notes) == ([], [])


@pytest.mark.parametrize(
    "told", [[SHARE, "0.4"], [f"{SHARE}=0.4"], ["--gpu_memory_utilization", "0.4"]]
)
def test_a_share_that_the_tune_was_told_stays(told: list[str]) -> None:
    plan = split("vllm", "cuda", 2, *told)
    assert all(list(s.launch.command) == ["serve", *told] for s in plan.servers)
    assert any("needs a GPU of its own" in note for note in plan.notes)


def test_servers_of_sglang_need_a_gpu_each() -> None:
    found = split("vllm", "cuda", 2)
    plan = shared(replace(found, notes=[]), "sglang")
    assert any("needs a GPU of its own" in note for note in plan.notes)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_on_a_cpu_they_share_its_cores_and_nothing_is_added(engine: str) -> None:
    plan = split(engine, "cpu", 2)
    assert shares(plan) == []
    assert any("all 2 threads" in note for note in plan.notes)


def test_llama_cpp_takes_what_it_needs_of_a_gpu() -> None:
    plan = split("llama.cpp", "cuda", 2)
    assert shares(plan) == []
    (note,) = plan.notes
    assert "share it when both are busy" in note
