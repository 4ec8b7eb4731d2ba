"""Trials on a real Ray cluster of this machine: equal results, only on equal nodes."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tuner_fakes
from adaptspec.errors import AdaptSpecError
from adaptspec.workloads import Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_profiles.sql import SqlStore
from adaptspec_tuner.distributed.ray_pool import Bench, RayPool
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Sample, Setting
from adaptspec_tuner.searching.search import Search
from tuner_fakes import FakeMeasurer, Knob

ray = pytest.importorskip("ray", reason="needs adaptspec[ray]")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

PROMPTS = [Prompt(str(i), "chat", text="x") for i in range(2)]
PLACE: list[Any] = ["m", None, "float32", "cpu", "this", 1, None, {}]


class Measured(FakeMeasurer):
    """Fastest at seven; the first to measure four dies of it, where ``grave`` is."""

    def __init__(self, grave: str | None = None) -> None:
        self.grave = grave

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        if setting == PLAIN_SETTING:
            return Sample((1, 2), 10.0, 1.0)
        k = int(setting.params["k"])
        if self.grave is not None and k == 4:
            try:
                Path(self.grave).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return Sample((1, 2), 20.0 - abs(7 - k) + int(prompt.id), 1.0)


def build(grave: str | None = None) -> Bench:
    """On a node that has the resource ``odd``, another environment."""
    ray: Any = importlib.import_module("ray")
    here = ray.get_runtime_context().get_node_id()
    (node,) = [n for n in ray.nodes() if n["NodeID"] == here]
    name = "another" if "odd" in node["Resources"] else "this"
    return Bench(Measured(grave), [*PLACE[:4], name, *PLACE[5:]])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")
    utils: Any = importlib.import_module("ray.cluster_utils")
    for module in (sys.modules[__name__], tuner_fakes):  # nodes can't import them
        cloudpickle.register_pickle_by_value(module)
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = utils.Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(**small)
    cluster.add_node(**small, resources={"odd": 1})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def search(store: Any, pool: RayPool | None, warn: Any = pytest.fail) -> Search:
    found = Search(
        Measured(),
        store,
        "r1",
        in_time=lambda: True,
        warn=warn,
        doing=lambda text: None,
        objective="speed",
        most=100,
        storage=store.studies() if isinstance(store, SqlStore) else None,
        pool=pool,
    )
    found.add("chat", Knob, PROMPTS)
    found.race()
    return found


def by_setting(store: Any) -> dict[int, Any]:
    trials = store.trials("r1")
    found = {int(t.params["k"]): (t.state, t.value, t.detail) for t in trials}
    assert len(found) == len(trials)  # nothing twice
    return found


def test_nodes_like_this_one_find_what_one_process_finds(
    address: str, tmp_path: Path
) -> None:
    alone = MemoryStore()
    search(alone, None)
    told: list[str] = []
    stores: list[Any] = [SqlStore(f"sqlite:///{tmp_path / 'p.db'}"), MemoryStore()]
    pool = RayPool(address, build, PLACE, told.append)
    try:
        assert pool.size == 2
        assert len(told) == 1
        assert "left out: device_name another (here this)" in told[0]
        for shared in stores:
            search(shared, pool)
    finally:
        pool.close()
    one = by_setting(alone)
    for shared in stores:
        other = by_setting(shared)
        # One process prunes; what both measured whole is equal, the best among it.
        whole = {k for k in one.keys() & other.keys() if one[k][0] == "complete"}
        assert {k: one[k] for k in whole} == {k: other[k] for k in whole}
        assert 7 in whole
        assert max(other, key=lambda k: other[k][2]["ratio"]) == 7
        shared.close()


def test_what_a_dead_worker_was_at_is_tried_again_and_counted_once(
    address: str, tmp_path: Path
) -> None:
    told: list[str] = []
    store = MemoryStore()
    pool = RayPool(
        address, functools.partial(build, str(tmp_path / "grave")), PLACE, told.append
    )
    try:
        search(store, pool, told.append)
        assert pool.size == 2
    finally:
        pool.close()
    assert (tmp_path / "grave").exists()
    assert [text for text in told if "died" in text] == [
        "a worker died at knob {'k': 4}; trying again"
    ]
    state, value, _ = by_setting(store)[4]
    assert (state, value) == ("complete", 17.5)


def test_without_a_node_like_this_one_it_says_what_differs(address: str) -> None:
    told: list[str] = []
    with pytest.raises(AdaptSpecError, match="no node of the cluster"):
        RayPool(address, build, [*PLACE[:5], 2, *PLACE[6:]], told.append)
    assert len(told) == 3
    assert all("threads 1 (here 2)" in text for text in told)
